// SPDX-License-Identifier: Apache-2.0
#include "gemma4/text/vocabulary.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "gemma4/text/tokenizer.hpp"
#include "tests/support/gguf_edit.hpp"
#include "tests/support/temp_dir.hpp"
#include "tests/support/toy_vocabulary.hpp"

/// What a vocabulary is made of, and which are refused, and by what words.
namespace {

using namespace gemma4;
using testkit::toy_vocabulary;

const std::filesystem::path kData = GEMMA4_TEST_DATA;

struct BadVocabulary {
  const char* name;
  void (*spoil)(VocabularyData&);
  const char* message;  // that the error must contain
};

std::int32_t number(TokenType type) {
  return static_cast<std::int32_t>(type);
}

const BadVocabulary kBad[] = {
    {"no_tokens", [](VocabularyData& d) { d.tokens.clear(), d.types.clear(); },
     "tokens: expected 1 to 2147483647 tokens, found 0"},
    {"types_too_few", [](VocabularyData& d) { d.types.pop_back(); },
     "token_type: expected 284 types, one a token, found 283"},
    {"types_too_many", [](VocabularyData& d) { d.types.push_back(1); }, "expected 284 types, one a token, found 285"},
    {"type_zero", [](VocabularyData& d) { d.types[9] = 0; }, "token_type[9]: expected a type from 1 to 6, found 0"},
    {"type_seven", [](VocabularyData& d) { d.types[9] = 7; }, "token_type[9]: expected a type from 1 to 6, found 7"},
    {"empty_token", [](VocabularyData& d) { d.tokens[3].clear(); }, "tokens[3]: expected a text, found an empty one"},
    {"repeated_token", [](VocabularyData& d) { d.tokens[3] = "<bos>"; },
     "tokens[3]: expected unique tokens, found '<bos>', which is also id 2"},
    {"byte_missing", [](VocabularyData& d) { d.types[8] = number(TokenType::kNormal); },
     "expected a byte token for each byte, found none for byte 0"},
    {"byte_malformed", [](VocabularyData& d) { d.tokens[8] = "<0x0g>"; },
     "tokens[8]: expected a byte token <0x00> to <0xFF>, found '<0x0g>'"},
    {"byte_lower_case", [](VocabularyData& d) { d.tokens[8 + 0xAB] = "<0xab>"; }, "found '<0xab>'"},
    {"no_space_mark", [](VocabularyData& d) { d.types[267] = number(TokenType::kControl); },
     "expected a normal token for the space mark U+2581, found none"},
    {"merge_without_space", [](VocabularyData& d) { d.merges[1] = "ab"; },
     "merges[1]: expected two tokens with one space between, found 'ab'"},
    {"merge_with_two_spaces", [](VocabularyData& d) { d.merges[1] = "a  b"; },
     "merges[1]: expected two tokens with one space between"},
    {"merge_without_left", [](VocabularyData& d) { d.merges[1] = " b"; }, "merges[1]: expected two tokens"},
    {"merge_without_right", [](VocabularyData& d) { d.merges[1] = "a "; }, "merges[1]: expected two tokens"},
    {"merge_empty", [](VocabularyData& d) { d.merges[1] = ""; }, "merges[1]: expected two tokens"},
    {"merge_unknown_left", [](VocabularyData& d) { d.merges[1] = "q b"; },
     "merges[1]: expected tokens of the vocabulary, found 'q', which is none"},
    {"merge_unknown_right", [](VocabularyData& d) { d.merges[1] = "a q"; }, "found 'q', which is none"},
    {"merge_unknown_result", [](VocabularyData& d) { d.merges[1] = "c c"; }, "found 'cc', which is none"},
    {"merge_repeated", [](VocabularyData& d) { d.merges[3] = "b c"; },
     "merges[3]: expected unique merges, found 'b c', which is also merge 0"},
    {"bos_out_of_range", [](VocabularyData& d) { d.bos_id = 284; },
     "bos_token_id: expected an id below 284, found 284"},
    {"bos_below_none", [](VocabularyData& d) { d.bos_id = -2; }, "bos_token_id: expected an id below 284, found -2"},
    {"eos_out_of_range", [](VocabularyData& d) { d.eos_id = 1LL << 40; },
     "eos_token_id: expected an id below 284, found 1099511627776"},
    {"end_out_of_range",
     [](VocabularyData& d) {
       d.ends = {{"eot_token_id", 5}, {"eos_token_ids", 284}};
     },
     "eos_token_ids: expected an id below 284, found 284"},
    {"end_below_none",
     [](VocabularyData& d) {
       d.ends = {{"eot_token_id", -1}};
     },
     "eot_token_id: expected an id below 284, found -1"},
    {"add_bos_without_bos", [](VocabularyData& d) { d.bos_id = -1; },
     "add_bos_token: expected a bos_token_id with it, found none"},
};

class VocabularyRefuses : public testing::TestWithParam<BadVocabulary> {};

TEST_P(VocabularyRefuses, NamingWhatIsWrong) {
  VocabularyData data = toy_vocabulary();
  ASSERT_NO_THROW(Tokenizer{data});
  GetParam().spoil(data);
  try {
    const Tokenizer tokenizer(data);
    FAIL() << "accepted";
  } catch (const FormatError& error) {
    EXPECT_NE(std::string(error.what()).find(GetParam().message), std::string::npos) << error.what();
    EXPECT_TRUE(std::string(error.what()).starts_with("toy: tokenizer.ggml."));
  }
}

INSTANTIATE_TEST_SUITE_P(Toy, VocabularyRefuses, testing::ValuesIn(kBad),
                         [](const auto& info) { return std::string(info.param.name); });

// ---- ends: by key and by text

using Ids = std::vector<std::int32_t>;

TEST(EndTokens, AreTheUnionOfKeysAndTextsWhateverTheirTypes) {
  for (const TokenType type : {TokenType::kNormal, TokenType::kControl, TokenType::kUserDefined, TokenType::kUnused}) {
    VocabularyData data = toy_vocabulary();
    data.eos_id = 5;  // as -it files have it: the end of the sequence is named nowhere
    data.tokens[4] = "<|tool_response>";
    for (const std::size_t id : {1, 4, 5}) data.types[id] = number(type);
    EXPECT_EQ(end_tokens(Vocabulary(data)), (Ids{1, 4, 5}));
    data.eos_id = -1;
    EXPECT_EQ(end_tokens(Vocabulary(data)), (Ids{1, 4, 5})) << "no key at all";
    data.ends = {{"eot_token_id", 280}, {"eos_token_ids", 1}, {"eos_token_ids", 281}};
    EXPECT_EQ(end_tokens(Vocabulary(data)), (Ids{1, 4, 5, 280, 281})) << "and those that only a key names";
  }
  EXPECT_EQ(end_tokens(Vocabulary(toy_vocabulary())), (Ids{1, 5})) << "the control: this one has no tool response";
}

TEST(EndTokens, AnHtmlTagIsNoneWhoeverNamesIt) {
  VocabularyData data = toy_vocabulary();
  testkit::add_token(data, "</s>", TokenType::kControl);
  const auto tag = static_cast<std::int32_t>(data.tokens.size() - 1);
  EXPECT_EQ(end_tokens(Vocabulary(data)), (Ids{1, 5}));
  data.eos_id = tag;
  const Vocabulary vocabulary(data);
  EXPECT_EQ(end_tokens(vocabulary), (Ids{1, 5}));
  ASSERT_EQ(vocabulary.notes().size(), 1u);
  EXPECT_NE(vocabulary.notes().front().find("eos_token_id names </s>"), std::string::npos)
      << vocabulary.notes().front();
}

/// The micro model with one thing changed, as a file.
struct Micro {
  explicit Micro(const std::function<void(testkit::GgufEdit&)>& change) {
    testkit::GgufEdit edit = testkit::micro_model();
    change(edit);
    edit.write(folder.file("micro.gguf"));
  }
  [[nodiscard]] Vocabulary vocabulary() const {
    return Vocabulary(vocabulary_data(GgufFile::open(folder.file("micro.gguf"))));
  }
  [[nodiscard]] std::string refusal() const {
    try {
      static_cast<void>(vocabulary());
    } catch (const FormatError& error) {
      return error.what();
    }
    return "";
  }
  testkit::TempDir folder;
};

TEST(EndTokens, EveryKeyOfAFileIsRead) {
  const Ids plain = {1, 6};  // <eos> and <turn|> of the synthetic vocabulary
  EXPECT_EQ(end_tokens(Micro([](auto&) {}).vocabulary()), plain);
  for (const char* key : {"eos_token_id", "eot_token_id", "eom_token_id"}) {
    const Micro one([&](auto& edit) { edit.set(concat("tokenizer.ggml.", key), std::uint32_t{300}); });
    EXPECT_EQ(end_tokens(one.vocabulary()), (Ids{1, 6, 300})) << key;
  }
  const Micro list([](auto& edit) { edit.set_array("tokenizer.ggml.eos_token_ids", Ids{1, 300, 301}); });
  EXPECT_EQ(end_tokens(list.vocabulary()), (Ids{1, 6, 300, 301}));
  const Micro single([](auto& edit) { edit.set("tokenizer.ggml.eos_token_ids", std::uint64_t{301}); });
  EXPECT_EQ(end_tokens(single.vocabulary()), (Ids{1, 6, 301}));
  const Micro none([](auto& edit) { edit.set_array("tokenizer.ggml.eos_token_ids", Ids{}); });
  EXPECT_EQ(end_tokens(none.vocabulary()), plain);
}

TEST(EndTokens, KeysOfAWrongTypeAreRefusedByName) {
  const Micro words(
      [](auto& edit) { edit.set_array("tokenizer.ggml.eos_token_ids", std::vector<std::string>{"<eos>"}); });
  EXPECT_NE(words.refusal().find("tokenizer.ggml.eos_token_ids"), std::string::npos) << words.refusal();
  const Micro beyond([](auto& edit) { edit.set_array("tokenizer.ggml.eos_token_ids", Ids{1, 320}); });
  EXPECT_NE(beyond.refusal().find("eos_token_ids: expected an id below 320, found 320"), std::string::npos)
      << beyond.refusal();
}

TEST(Vocabulary, AFileWithoutAVocabularyIsRefused) {
  const Micro none([](auto& edit) { edit.drop_key("tokenizer.ggml.model"); });
  EXPECT_NE(none.refusal().find("tokenizer.ggml.model"), std::string::npos) << none.refusal();
}

// ---- the begin of a sequence

TEST(Bos, IsAddedWhateverTheFileSaysAndTheFileIsNamed) {
  for (const bool said : {false, true}) {
    const Micro micro([&](auto& edit) { edit.set("tokenizer.ggml.add_bos_token", said); });
    const Vocabulary vocabulary = micro.vocabulary();
    EXPECT_TRUE(vocabulary.add_bos());
    EXPECT_EQ(vocabulary.notes().size(), said ? 0u : 1u);
    if (said) continue;
    EXPECT_NE(vocabulary.notes().front().find("add_bos_token is false"), std::string::npos);
  }
  const Micro silent([](auto& edit) { edit.drop_key("tokenizer.ggml.add_bos_token"); });
  EXPECT_TRUE(silent.vocabulary().add_bos());
  EXPECT_TRUE(silent.vocabulary().notes().empty());
}

TEST(Bos, IsFoundByItsTextWhereNoKeyNamesIt) {
  const Micro unnamed([](auto& edit) { edit.drop_key("tokenizer.ggml.bos_token_id"); });
  EXPECT_EQ(unnamed.vocabulary().bos_id(), 2);
  const Micro wrong([](auto& edit) { edit.set("tokenizer.ggml.add_bos_token", std::uint32_t{1}); });
  EXPECT_NE(wrong.refusal().find("add_bos_token"), std::string::npos) << wrong.refusal();
}

// ---- another converter's name for the same lists

TEST(TokenizerModel, LlamaWithTheGemma4PreTokenizerIsReadWhereItsListsSuffice) {
  const auto llama = [](testkit::GgufEdit& edit) {
    edit.set("tokenizer.ggml.model", std::string("llama")).set("tokenizer.ggml.pre", std::string("gemma4"));
  };
  const Micro whole(llama);
  EXPECT_EQ(whole.refusal(), "");
  EXPECT_EQ(whole.vocabulary().size(), 320);
  for (const char* list : {"tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.merges"}) {
    const Micro lacking([&](testkit::GgufEdit& edit) {
      llama(edit);
      edit.drop_key(list);
    });
    EXPECT_NE(lacking.refusal().find(concat("the list ", list, " is missing")), std::string::npos) << lacking.refusal();
  }
  const Micro scores([&](testkit::GgufEdit& edit) {
    llama(edit);
    edit.drop_key("tokenizer.ggml.scores");
  });
  EXPECT_EQ(scores.refusal(), "") << "scores are not read";
  for (const char* pre : {"", "default", "gemma3"}) {
    const Micro other([&](testkit::GgufEdit& edit) {
      llama(edit);
      edit.set("tokenizer.ggml.pre", std::string(pre));
    });
    EXPECT_NE(other.refusal().find(concat("'llama' with tokenizer.ggml.pre '", pre, "'")), std::string::npos)
        << other.refusal();
  }
}

}  // namespace
