// SPDX-License-Identifier: Apache-2.0
#include "gemma4/text/vocabulary.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <filesystem>
#include <string>

#include "gemma4/text/tokenizer.hpp"
#include "tests/support/toy_vocabulary.hpp"

/// Vocabularies that are refused, and by what words.
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

TEST(Vocabulary, AFileWithoutAVocabularyIsRefused) {
  try {
    static_cast<void>(vocabulary_data(GgufFile::open(kData / "nano/nano-Q4_K_M-logits.gguf")));
    FAIL() << "accepted";
  } catch (const FormatError& error) {
    EXPECT_NE(std::string(error.what()).find("tokenizer.ggml.model"), std::string::npos) << error.what();
  }
}

}  // namespace
