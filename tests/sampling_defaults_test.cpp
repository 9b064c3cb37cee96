// SPDX-License-Identifier: Apache-2.0
#include "gemma4/text/sampling_defaults.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <limits>
#include <string>

#include "tests/support/gguf_edit.hpp"
#include "tests/support/temp_dir.hpp"

/// How a file wants its model sampled.
namespace {

using namespace gemma4;
using testkit::GgufEdit;

SamplingDefaults defaults_of(const std::function<void(GgufEdit&)>& change) {
  const testkit::TempDir folder;
  GgufEdit edit;
  edit.set("general.architecture", std::string("gemma4"));
  change(edit);
  edit.write(folder.file("m.gguf"));
  return sampling_defaults(GgufFile::open(folder.file("m.gguf")));
}

std::string refusal(const std::function<void(GgufEdit&)>& change) {
  try {
    static_cast<void>(defaults_of(change));
  } catch (const FormatError& error) {
    return error.what();
  }
  return "";
}

TEST(SamplingDefaults, AreTheFilesAndNothingWhereItSaysNothing) {
  EXPECT_EQ(defaults_of([](GgufEdit&) {}), SamplingDefaults{});
  const SamplingDefaults found = defaults_of([](GgufEdit& edit) {  // as published files have it
    edit.set("general.sampling.temp", 1.0f).set("general.sampling.top_k", std::int32_t{64});
    edit.set("general.sampling.top_p", 0.95f);
  });
  EXPECT_EQ(found, (SamplingDefaults{.temperature = 1.0f, .top_k = 64, .top_p = 0.95f, .notes = {}}));
}

TEST(SamplingDefaults, AnyStoredNumberIsTakenAndOffIsOff) {
  const SamplingDefaults found = defaults_of([](GgufEdit& edit) {
    edit.set("general.sampling.temp", std::uint8_t{1}).set("general.sampling.top_k", 64.0);
    edit.set("general.sampling.top_p", 1.5);
  });
  EXPECT_EQ(found, (SamplingDefaults{.temperature = 1.0f, .top_k = 64, .top_p = 1.0f, .notes = {}}));
  EXPECT_EQ(defaults_of([](GgufEdit& edit) { edit.set("general.sampling.top_k", std::int32_t{-1}); }).top_k, 0);
}

TEST(SamplingDefaults, WhatNoSettingCanBeIsRefusedByKeyAndValue) {
  const auto message = [](const char* key, auto value) {
    return refusal([&](GgufEdit& edit) { edit.set(concat("general.sampling.", key), value); });
  };
  EXPECT_NE(message("temp", -1.0f).find("general.sampling.temp is -1, expected 0"), std::string::npos);
  EXPECT_NE(message("temp", std::numeric_limits<double>::quiet_NaN()).find("temp is nan"), std::string::npos);
  EXPECT_NE(message("temp", 1e300).find("temp is 1e+300"), std::string::npos) << "infinite as the setting";
  EXPECT_NE(message("temp", std::string("warm")).find("general.sampling.temp"), std::string::npos);
  EXPECT_NE(message("top_k", 1.5).find("top_k is 1.5"), std::string::npos);
  EXPECT_NE(message("top_k", std::int64_t{1} << 31).find("top_k is 2.14748e+09"), std::string::npos);
  EXPECT_NE(message("top_k", std::numeric_limits<double>::quiet_NaN()).find("top_k is nan"), std::string::npos);
  EXPECT_NE(message("top_p", 0.0f).find("top_p is 0"), std::string::npos);
  EXPECT_NE(message("top_p", std::numeric_limits<float>::quiet_NaN()).find("top_p is nan"), std::string::npos);
}

TEST(SamplingDefaults, WhatTheSamplerDoesNotDoIsSaid) {
  const SamplingDefaults off = defaults_of([](GgufEdit& edit) {
    edit.set("general.sampling.min_p", 0.0f).set("general.sampling.penalty_repeat", 1.0f);
    edit.set("general.sampling.mirostat", std::int32_t{0});
  });
  EXPECT_TRUE(off.notes.empty());
  const SamplingDefaults on = defaults_of([](GgufEdit& edit) { edit.set("general.sampling.min_p", 0.05f); });
  ASSERT_EQ(on.notes.size(), 1u);
  EXPECT_NE(on.notes.front().find("general.sampling.min_p is 0.05"), std::string::npos) << on.notes.front();
}

TEST(SamplingDefaults, FlagsGoBeforeThem) {
  const SamplingDefaults defaults{.temperature = 1.0f, .top_k = 64, .top_p = 0.95f, .notes = {}};
  SamplerSettings all;
  EXPECT_EQ(apply_sampling_defaults(all, defaults, {}),
            "sampling as the file says: --temperature 1, --top-k 64, --top-p 0.95");
  EXPECT_EQ(all.temperature, 1.0f);
  EXPECT_EQ(all.top_k, 64);
  EXPECT_EQ(all.top_p, 0.95f);
  SamplerSettings greedy;
  EXPECT_EQ(apply_sampling_defaults(greedy, defaults, {.temperature = true}),
            "sampling as the file says: --top-k 64, --top-p 0.95");
  EXPECT_EQ(greedy.temperature, 0.0f) << "given";
  SamplerSettings untouched;
  EXPECT_EQ(apply_sampling_defaults(untouched, defaults, {.temperature = true, .top_k = true, .top_p = true}), "");
  EXPECT_EQ(untouched.top_k, 0);
  EXPECT_EQ(apply_sampling_defaults(untouched, {}, {}), "");
}

}  // namespace
