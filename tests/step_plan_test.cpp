// SPDX-License-Identifier: Apache-2.0
#include "gemma4/plan/step_plan.hpp"

#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "tests/support/refuses.hpp"

namespace {

using namespace gemma4;

std::vector<StepPlan> example() {
  return {{.name = "decode",
           .n_token = 1,
           .rows = {{.component = "attention_full", .path = "split", .tile = "d512", .n_split = 33, .bytes = 4096},
                    {.component = "down", .path = "int8", .why = "no other"}}}};
}

TEST(StepPlan, EqualPlansHaveEqualDigestsAndEveryFieldCounts) {
  const std::string digest_of_example = digest(example());
  EXPECT_EQ(digest(example()), digest_of_example);
  EXPECT_EQ(digest_of_example.size(), 16u);
  EXPECT_EQ(digest({}), "cbf29ce484222325") << "the offset of FNV-1a";
  const auto differs = [&](auto&& change) {
    std::vector<StepPlan> plans = example();
    change(plans);
    return digest(plans) != digest_of_example;
  };
  EXPECT_TRUE(differs([](auto& plans) { plans[0].name = "prefill"; }));
  EXPECT_TRUE(differs([](auto& plans) { plans[0].n_token = 2; }));
  EXPECT_TRUE(differs([](auto& plans) { plans[0].rows[0].component = "attention"; }));
  EXPECT_TRUE(differs([](auto& plans) { plans[0].rows[0].path = "whole"; }));
  EXPECT_TRUE(differs([](auto& plans) { plans[0].rows[0].tile = "d256"; }));
  EXPECT_TRUE(differs([](auto& plans) { plans[0].rows[0].n_split = 1; }));
  EXPECT_TRUE(differs([](auto& plans) { plans[0].rows[0].bytes = 0; }));
  EXPECT_TRUE(differs([](auto& plans) { plans[0].rows[1].why.clear(); }));
  EXPECT_TRUE(differs([](auto& plans) { std::swap(plans[0].rows[0], plans[0].rows[1]); }));
  EXPECT_TRUE(differs([](auto& plans) {  // the same letters, cut elsewhere
    plans[0].rows[1].component = "dow", plans[0].rows[1].path = "nint8";
  }));
}

TEST(StepPlan, RowsAreFoundByComponentAndPrinted) {
  const StepPlan plan = example().front();
  EXPECT_EQ(plan.row("down").why, "no other");
  EXPECT_TRUE(testkit::refuses([&] { (void)plan.row("up"); }, {"'up'", "decode"}));
  std::ostringstream text;
  print_step_plan(text, plan);
  for (const char* part : {"decode, 1 token", "attention_full", "d512", "33", "4096 B", "no other"}) {
    EXPECT_NE(text.str().find(part), std::string::npos) << part;
  }
}

}  // namespace
