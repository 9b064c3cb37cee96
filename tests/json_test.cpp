// SPDX-License-Identifier: Apache-2.0
// The reader of the golden JSON files is code under test: a value read wrongly could hide a difference.
#include "tests/support/json.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace {

using gemma4::testkit::parse_json;

TEST(Json, ReadsEveryKindOfValue) {
  const auto json = parse_json(R"( {"a": [1, -2.5e1, 0.125], "b": {"c": "d"}, "e": [], "f": {}, "g": [true, null]} )");
  EXPECT_EQ(json["a"].numbers<double>(), (std::vector<double>{1, -25, 0.125}));
  EXPECT_EQ(json["b"]["c"].string(), "d");
  EXPECT_TRUE(json["e"].array().empty());
  EXPECT_TRUE(json["f"].object().empty());
}

TEST(Json, EscapesBecomeUtf8) {
  EXPECT_EQ(parse_json(R"("\"\\\/\b\f\n\r\t")").string(), "\"\\/\b\f\n\r\t");
  EXPECT_EQ(parse_json(R"("\u0000")").string(), std::string(1, '\0'));
  EXPECT_EQ(parse_json(R"("\u00e9\u4f60\ud83d\ude00")").string(), "é你\U0001F600");
}

TEST(Json, MalformedTextIsRefused) {
  for (const char* text : {"", "[1", "[1 2]", "{\"a\" 1}", "{1: 2}", "\"a", "\"\\q\"", "\"\\u12\"", "\"\\ud83d\"",
                           "1 2", "nul", "--1", "[1,]"}) {
    EXPECT_THROW(static_cast<void>(parse_json(text)), std::runtime_error) << text;
  }
}

TEST(Json, AValueOfAnotherKindIsRefused) {
  const auto json = parse_json(R"({"a": "1"})");
  EXPECT_THROW(static_cast<void>(json["a"].number()), std::runtime_error);
  EXPECT_THROW(static_cast<void>(json["b"]), std::runtime_error);
  EXPECT_THROW(static_cast<void>(json.array()), std::runtime_error);
}

}  // namespace
