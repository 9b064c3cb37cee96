// SPDX-License-Identifier: Apache-2.0
#include "gemma4/plan/execution.hpp"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "tests/support/refuses.hpp"

namespace {

using namespace gemma4;

TEST(Execution, EveryFieldIsOneRowOfTheTable) {
  std::set<std::string_view> names;
  ExecutionPolicy policy;
  for (const ExecutionSwitch& entry : kExecutionSwitches) {
    EXPECT_TRUE(names.insert(entry.name).second) << entry.name;
    EXPECT_TRUE(policy.*entry.field) << entry.name << ": on to begin with, and no other row's field";
    policy.*entry.field = false;
    EXPECT_FALSE(entry.help.empty()) << entry.name;
    EXPECT_TRUE(entry.acts_in(Phase::kDecode) || entry.acts_in(Phase::kPrefill)) << entry.name;
  }
  EXPECT_EQ(sizeof(ExecutionPolicy), kExecutionSwitches.size()) << "a field that no row speaks of";
}

TEST(Execution, NamesSwitchOffTheirFieldAndReadBack) {
  for (const ExecutionSwitch& entry : kExecutionSwitches) {
    const ExecutionPolicy policy = policy_without(std::vector<std::string>{std::string(entry.name)});
    EXPECT_FALSE(policy.*entry.field);
    EXPECT_EQ(off_text(policy), entry.name);
    for (const ExecutionSwitch& other : kExecutionSwitches) {
      EXPECT_EQ(policy.*other.field, &other != &entry) << entry.name << " and " << other.name;
    }
  }
  EXPECT_EQ(off_text({}), "");
  EXPECT_EQ(off_text(policy_without(std::vector<std::string>{"graph", "split_k"})), "split_k+graph");
}

TEST(Execution, AnUnknownNameIsRefusedWithThoseThatThereAre) {
  EXPECT_TRUE(testkit::refuses([] { (void)policy_without(std::vector<std::string>{"fast_mode"}); },
                               {"'fast_mode'", "kv_len_clamp", "graph"}));
}

}  // namespace
