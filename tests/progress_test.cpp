// SPDX-License-Identifier: Apache-2.0
#include "gemma4/report/progress.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <limits>
#include <sstream>
#include <string>

#include "gemma4/report/nvtx.hpp"

namespace {

using gemma4::Progress;
using gemma4::ProgressMode;

/// A stream and a clock that the test moves.
struct Screen {
  std::ostringstream stream;
  double now = 1000;

  gemma4::ProgressOptions options(ProgressMode mode) {
    return {.mode = mode, .unit = "tokens", .stream = &stream, .clock = [this] { return now; }};
  }
  [[nodiscard]] std::string text() const { return stream.str(); }
  [[nodiscard]] auto count(char c) const {
    const std::string all = text();
    return std::count(all.begin(), all.end(), c);
  }
};

TEST(Progress, SilentWritesNothing) {
  Screen screen;
  {
    Progress bar("prefill", 10, screen.options(ProgressMode::kSilent));
    for (int i = 1; i <= 10; ++i) screen.now += 1, bar.update(i);
    bar.finish();
    Progress abandoned("prefill", 10, screen.options(ProgressMode::kSilent));
  }
  EXPECT_EQ(screen.text(), "");
}

TEST(Progress, LinesAreOneForEachTenPercent) {
  Screen screen;
  Progress bar("prefill", 1000, screen.options(ProgressMode::kLines));
  EXPECT_EQ(screen.text(), "");
  for (int i = 1; i <= 500; ++i) screen.now += 0.01, bar.advance();
  EXPECT_EQ(screen.count('\n'), 5);
  EXPECT_NE(screen.text().find("prefill 50 % (500 of 1000 tokens, 100 tokens/s, ETA 0:05)\n"), std::string::npos)
      << screen.text();
  for (int i = 501; i <= 1000; ++i) screen.now += 0.01, bar.advance();
  bar.finish();
  EXPECT_EQ(screen.count('\n'), 11);
  EXPECT_TRUE(screen.text().ends_with("prefill: 1000 tokens in 0:10, 100 tokens/s\n")) << screen.text();
  EXPECT_EQ(screen.count('\r'), 0) << "no terminal codes in a log";
}

TEST(Progress, BarIsRedrawnAtMostTenTimesASecond) {
  Screen screen;
  Progress bar("prefill", 10000, screen.options(ProgressMode::kBar));
  for (int i = 1; i <= 10000; ++i) screen.now += 0.0005, bar.update(i);  // 5 s
  const auto redraws = screen.count('\r');
  EXPECT_LE(redraws, 51);
  EXPECT_GE(redraws, 40);
  EXPECT_EQ(screen.count('\n'), 0);
  EXPECT_NE(screen.text().find("[############------------] 50 %"), std::string::npos);
  bar.finish();
  bar.finish();
  EXPECT_EQ(screen.count('\n'), 1) << "the line is closed once";
}

TEST(Progress, LineOfAnAbandonedBarIsClosed) {
  Screen screen;
  { Progress bar("prefill", 10, screen.options(ProgressMode::kBar)); }
  EXPECT_TRUE(screen.text().ends_with("\n"));
}

RC_GTEST_PROP(Progress, NeverShowsANumberThatIsNone, (std::int64_t total, const std::vector<std::int16_t>& steps)) {
  for (const ProgressMode mode : {ProgressMode::kBar, ProgressMode::kLines}) {
    Screen screen;
    Progress bar("prefill", total, screen.options(mode));
    for (const std::int16_t step : steps) {
      screen.now += step % 3 == 0 ? 0.0 : 0.3;  // the clock may stand still
      bar.update(step);
    }
    bar.finish();
    for (const char* bad : {"nan", "inf", "-nan"}) RC_ASSERT(screen.text().find(bad) == std::string::npos);
    RC_ASSERT(screen.text().ends_with("\n"));
  }
  // Control: what the division would have shown.
  RC_ASSERT(gemma4::short_count(1.0 / 0.0).find("inf") != std::string::npos);
}

TEST(Progress, CountsAndDurationsAreShort) {
  EXPECT_EQ(gemma4::short_count(0), "0");
  EXPECT_EQ(gemma4::short_count(999), "999");
  EXPECT_EQ(gemma4::short_count(1234), "1.23k");
  EXPECT_EQ(gemma4::short_count(999999), "1M");
  EXPECT_EQ(gemma4::short_count(45.6e9), "45.6G");
  EXPECT_EQ(gemma4::duration_text(7.4), "0:07");
  EXPECT_EQ(gemma4::duration_text(754), "12:34");
  EXPECT_EQ(gemma4::duration_text(3723), "1:02:03");
  EXPECT_EQ(gemma4::duration_text(std::numeric_limits<double>::infinity()), "?");
}

TEST(NvtxRange, IsNothing) {
  const gemma4::NvtxRange range("prefill");
  static_assert(std::is_empty_v<gemma4::NvtxRange>);
  static_assert(!gemma4::ProfilerRange<int> && !gemma4::ProfilerRange<std::string>, "the concept refuses other types");
}

}  // namespace
