// SPDX-License-Identifier: Apache-2.0
#include "gemma4/config_json.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <string>

#include "gemma4/json.hpp"

namespace {

using gemma4::config_from_json;
using gemma4::FormatError;
using gemma4::parse_json;

const std::string kNano = R"({"vocab": 4096, "hidden": 512, "ffn_hidden": 768, "n_head": 8, "n_layer": 12,
  "window": 512, "sliding": {"head_dim": 64, "n_head_kv": 4}, "full": {"head_dim": 256, "n_head_kv": 1}})";

std::string replaced(std::string text, const std::string& from, const std::string& to) {
  const std::size_t at = text.find(from);
  if (at == text.npos) throw std::logic_error("no '" + from + "' in the text");
  return text.replace(at, from.size(), to);
}

std::string refusal(const std::string& text) {
  try {
    (void)config_from_json(text, "shape.json");
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

TEST(ConfigJson, NanoFromItsDimensions) {
  EXPECT_EQ(config_from_json(kNano, "shape.json"), gemma4::gemma4_nano());
}

TEST(ConfigJson, OptionalKeysReplaceTheDefaults) {
  const std::string text =
      replaced(replaced(kNano, "\"n_layer\": 12", R"("is_sliding": [1, 0, 0], "softcap": 20, "context": 4096)"),
               "\"n_head_kv\": 1", R"("n_head_kv": 2, "rope_theta": 5e5, "rope_pairs": 7)");
  const gemma4::ModelConfig config = config_from_json(text, "shape.json");
  EXPECT_EQ(config.is_sliding, (std::vector<std::uint8_t>{1, 0, 0}));
  EXPECT_EQ(config.softcap, 20.0f);
  EXPECT_EQ(config.context, 4096);
  EXPECT_EQ(config.full, (gemma4::AttentionConfig{256, 2, 5e5, 7}));
  EXPECT_EQ(config.sliding, gemma4::gemma4_nano().sliding);
}

TEST(ConfigJson, EveryMistakeIsNamed) {
  const auto expect = [](const std::string& text, const std::string& part) {
    const std::string message = refusal(text);
    EXPECT_NE(message.find(part), message.npos) << "'" << message << "' lacks '" << part << "'";
  };
  for (const char* key : {"vocab", "hidden", "ffn_hidden", "n_head", "n_layer", "window", "sliding", "full"}) {
    expect(replaced(kNano, "\"" + std::string(key) + "\"", "\"x\""), key);
  }
  expect(replaced(kNano, "512,", "512.5,"), "key 'hidden' is 512.5, expected a whole number");
  expect(replaced(kNano, "512,", "1e300,"), "expected a whole number");
  expect(replaced(kNano, "4096", "\"many\""), "key 'vocab' is a string, expected a number");
  expect(replaced(kNano, "{\"head_dim\": 64, \"n_head_kv\": 4}", "64"), "sliding: expected an object, found a number");
  expect(replaced(kNano, "\"n_head_kv\": 1", "\"n_head_kv\": 1, \"heads\": 2"), "full: key 'heads' is not known");
  expect(replaced(kNano, "\"n_layer\": 12", "\"n_layer\": 12, \"is_sliding\": [1]"), "'n_layer' and 'is_sliding'");
  expect(replaced(kNano, "\"n_layer\": 12", "\"is_sliding\": [1, 2]"), "index 1: expected 0 or 1");
  expect(replaced(kNano, "\"n_layer\": 12", "\"n_layer\": 1000000"), "expected 1 to 4096");
  expect(replaced(kNano, "\"head_dim\": 64", "\"head_dim\": 65"), "sliding head_dim is 65");
  expect(replaced(kNano, "\"vocab\": 4096", "\"vocab\": 4096, \"vocab\": 1"), "key 'vocab' is there twice");
}

TEST(Json, ReadsEveryKindOfValue) {
  const auto value = parse_json(R"( {"a": [null, true, false, -1.5e2, "x\n\u0041\"é"], "b": {}, "c": []} )", "t");
  const auto& a = *value.object()->at("a").array();
  ASSERT_EQ(a.size(), 5u);
  EXPECT_TRUE(a[0].is_null());
  EXPECT_TRUE(*a[1].boolean());
  EXPECT_FALSE(*a[2].boolean());
  EXPECT_EQ(*a[3].number(), -150.0);
  EXPECT_EQ(*a[4].string(), "x\nA\"é");
  EXPECT_TRUE(value.object()->at("b").object()->empty());
  EXPECT_TRUE(value.object()->at("c").array()->empty());
  EXPECT_EQ(a[3].string(), nullptr);
}

TEST(Json, EscapesBecomeUtf8) {
  EXPECT_EQ(*parse_json(R"("\"\\\/\b\f\n\r\t")", "t").string(), "\"\\/\b\f\n\r\t");
  EXPECT_EQ(*parse_json(R"("\u0000")", "t").string(), std::string(1, '\0'));
  EXPECT_EQ(*parse_json(R"("\u00e9\u4f60\ud83d\ude00")", "t").string(), "é你\U0001F600");
}

TEST(Json, RefusesWhatIsMalformed) {
  for (const char* text : {"",
                           " ",
                           "{",
                           "[1,",
                           "[1 2]",
                           "{\"a\" 1}",
                           "{a: 1}",
                           "{\"a\": 1,}",
                           "[1,]",
                           "\"x",
                           "\"\\q\"",
                           "\"\\ud83d\"",
                           "\"\\ud83d\\u0041\"",
                           "\"\\ude00\"",
                           "\"\\u41\"",
                           "tru",
                           "01",
                           "-01",
                           "+1",
                           ".5",
                           "-",
                           "1 1",
                           "nan",
                           "1e999",
                           "\"\x01\""}) {
    EXPECT_THROW((void)parse_json(text, "t"), FormatError) << text;
  }
  EXPECT_THROW((void)parse_json(std::string(100000, '['), "t"), FormatError) << "deep nesting is no stack overflow";
}

RC_GTEST_PROP(Json, CutTextIsNeverTaken, ()) {
  const auto length = *rc::gen::inRange<std::size_t>(0, kNano.size());
  RC_ASSERT_THROWS_AS((void)parse_json(std::string_view(kNano).substr(0, length), "t"), FormatError);
  RC_ASSERT(parse_json(kNano, "t").object() != nullptr);  // control: the whole text is taken
}

RC_GTEST_PROP(Json, AnyBytesAreTakenOrRefused, (const std::string& text)) {
  try {
    (void)parse_json(text, "t");
  } catch (const FormatError&) {
  }
}

}  // namespace
