// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/model/accuracy.hpp"
#include "tests/support/gguf_edit.hpp"
#include "tests/support/temp_dir.hpp"

/// Files of key recall that would measure something else than they say.
namespace {

using namespace gemma4;
using testkit::GgufEdit;
using testkit::TempDir;

bool holds(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

/// Two questions on one document of 16 tokens: answers of two tokens in rows of four.
std::string recall_refusal(std::vector<std::int32_t> answers, std::vector<std::int32_t> ids = {}) {
  const TempDir folder;
  GgufEdit edit;
  const auto add = [&](const char* name, std::vector<std::int64_t> dims, const std::vector<std::int32_t>& values) {
    const auto bytes = std::as_bytes(std::span(values));
    edit.tensors().push_back({name, 26, std::move(dims), std::vector<std::byte>(bytes.begin(), bytes.end())});
  };
  if (ids.empty()) ids.assign(16, 7);
  add("ids", {16, 1}, ids);
  add("query_doc", {2}, {0, 0}), add("query_position", {2}, {3, 9}), add("distance", {2}, {2, 5});
  add("answer", {4, 2}, answers);
  edit.set("general.architecture", std::string("golden")).write(folder.file("recall.gguf"));
  try {
    const RecallTask task = read_recall_task(folder.file("recall.gguf"), 320);
    EXPECT_EQ(task.questions[1].answer, (std::vector<std::int32_t>{5, 6}));
  } catch (const FormatError& error) {
    EXPECT_TRUE(holds(error.what(), "recall.gguf: "));
    return error.what();
  }
  return "";
}

TEST(RecallFile, AnswersOfARecallFileAreTokensAndThenPadding) {
  EXPECT_EQ(recall_refusal({1, -1, -1, -1, 5, 6, -1, -1}), "") << "the control";
  EXPECT_EQ(recall_refusal({1, 2, 3, 4, 5, 6, -1, -1}), "") << "the control: nothing to pad";
  EXPECT_TRUE(holds(recall_refusal({-1, 1, 2, -1, 5, 6, -1, -1}), "question 0, column 0 of 'answer': padding (-1)"));
  EXPECT_TRUE(holds(recall_refusal({1, 2, -1, -1, 5, -1, 6, -1}), "question 1, column 1 of 'answer': padding (-1)"));
  EXPECT_TRUE(holds(recall_refusal({-1, -1, -1, -1, 5, 6, -1, -1}), "question 0 of 'answer': nothing but padding"));
  EXPECT_TRUE(holds(recall_refusal({1, 320, -1, -1, 5, 6, -1, -1}),
                    "question 0, column 1 of 'answer': id 320 is outside the vocabulary [0, 320)"));
  EXPECT_TRUE(holds(recall_refusal({1, -1, -1, -1, -2, 6, -1, -1}), "question 1, column 0 of 'answer': id -2"));
  EXPECT_TRUE(holds(recall_refusal({1, -2, -1, -1, 5, 6, -1, -1}), "question 0, column 1 of 'answer': id -2"));
  std::vector<std::int32_t> ids(16, 7);
  ids[5] = 400;
  EXPECT_TRUE(holds(recall_refusal({1, -1, -1, -1, 5, 6, -1, -1}, ids), "document 0, column 5 of 'ids': id 400"));
}

}  // namespace
