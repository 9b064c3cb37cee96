// SPDX-License-Identifier: Apache-2.0
#include "gemma4/kv_format.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "gemma4/cache_formats.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace {

using namespace gemma4;
using namespace gemma4::testkit;

std::int64_t bytes_of(const std::string& name, std::int64_t head_dim) {
  const auto format = std::get<KvFormat>(parse_cache_spec(name));
  return format.allocated_row_bytes(CacheSide::kKey, head_dim) +
         format.allocated_row_bytes(CacheSide::kValue, head_dim);
}

TEST(KvFormat, NamesMeanWhatTheGrammarSays) {
  const auto options = [](const std::string& name) { return std::get<KvFormat>(parse_cache_spec(name)).options; };
  EXPECT_EQ(options("kv5r4"), KvOptions{});
  EXPECT_EQ(options("kv3r6"), (KvOptions{.v_bits = 3, .r_bits = 6}));
  EXPECT_EQ(options("kv4r4-raw"), (KvOptions{.norm = NormKind::kRaw, .v_bits = 4}));
  EXPECT_EQ(options("kv6r5-cut-raw-haar"), (KvOptions{.rotation = RotationKind::kDenseHaar,
                                                      .codebook = CodebookKind::kCutAtThreeSigma,
                                                      .norm = NormKind::kRaw,
                                                      .v_bits = 6,
                                                      .r_bits = 5}));
  EXPECT_TRUE(options("kv5r4").has_codes());
  EXPECT_FALSE(options("kv16r16").has_codes());
}

TEST(KvFormat, EveryFormatHasItsOwnNameThatReadsBack) {
  std::set<std::string> names = {"kv16r16"};
  std::size_t count = 1;
  for (int i = 0; i < 4 * 4 * 8; ++i) {
    const KvOptions options{.rotation = (i & 1) != 0 ? RotationKind::kDenseHaar : RotationKind::kSignedHadamard,
                            .codebook = (i & 2) != 0 ? CodebookKind::kCutAtThreeSigma : CodebookKind::kFull,
                            .norm = (i & 4) != 0 ? NormKind::kRaw : NormKind::kCorrected,
                            .v_bits = 3 + i / 8 % 4,
                            .r_bits = 3 + i / 32};
    const CacheSpec spec = KvFormat{options};
    EXPECT_EQ(parse_cache_spec(to_string(spec)), spec) << to_string(spec);
    names.insert(to_string(spec));
    ++count;
  }
  EXPECT_EQ(names.size(), count);
  EXPECT_EQ(to_string(parse_cache_spec("kv16r16")), "kv16r16");
  EXPECT_NE(with_seed(parse_cache_spec("kv5r4"), 3), parse_cache_spec("kv5r4"));
  EXPECT_EQ(with_seed(parse_cache_spec("kv16r16"), 3), parse_cache_spec("kv16r16")) << "nothing in it is random";
}

TEST(KvFormat, AWrongNameIsRefusedWithItselfAndTheGrammar) {
  for (const std::string name : {"kv5", "kv5r", "kv5r7", "kv2r4", "kv5r4x", "kv5r4-raw-cut", "kv16", "kv16r4", "kv5r16",
                                 "kv16r16-raw", "kv55r4", "kv5r4-had", "kv5r4 "}) {
    EXPECT_TRUE(refuses([&] { (void)parse_cache_spec(name); }, {"'" + name + "'", std::string(KvFormat::kGrammar)}));
  }
  for (const std::string name : {"kv", "kvr", "kvx5r4", "KV5r4", "kv-5r4"}) {
    EXPECT_TRUE(refuses([&] { (void)parse_cache_spec(name); }, {"'" + name + "'", CacheFormats::grammar()}));
  }
}

TEST(KvFormat, BytesOfATokenAndHead) {
  EXPECT_EQ(bytes_of("kv5r4", 512), 388);
  EXPECT_EQ(bytes_of("kv4r4", 512), 324);
  EXPECT_EQ(bytes_of("kv6r5", 512), 468);
  EXPECT_EQ(bytes_of("kv3r3", 512), 244);
  EXPECT_EQ(bytes_of("kv16r16", 512), 1280);
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    for (int v = 3; v <= 6; ++v) {
      for (int r = 3; r <= 6; ++r) {
        EXPECT_EQ(bytes_of("kv" + std::to_string(v) + "r" + std::to_string(r), head_dim),
                  head_dim * (4 * v + r) / 32 + 4);
      }
    }
  }
}

TEST(KvFormat, RotatedPlacesAreTheFirstPairsOfBothHalves) {
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    std::set<std::int64_t> places;
    for (std::int64_t j = 0; j < kv_rotated_size(head_dim); ++j) places.insert(kv_rotated_place(head_dim, j));
    ASSERT_EQ(static_cast<std::int64_t>(places.size()), head_dim / 4);
    for (std::int64_t place = 0; place < head_dim; ++place) {
      const bool rotated = place < head_dim / 8 || (place >= head_dim / 2 && place < head_dim / 2 + head_dim / 8);
      EXPECT_EQ(places.contains(place), rotated) << place;
      EXPECT_EQ(kv_is_rotated(head_dim, place), rotated) << place;
    }
    EXPECT_EQ(kv_rotated_place(head_dim, head_dim / 8), head_dim / 2) << "second halves follow the first ones";
  }
}

RC_GTEST_PROP(KvFormat, TheScaleIsThePowerOfTwoBelowTheLargerWeight, (float a, float b)) {
  const float largest = std::max(std::abs(a), std::abs(b));
  const float scale = kv_rotated_scale(a, b);
  RC_ASSERT(scale == kv_rotated_scale(b, -a));
  if (!std::isnormal(largest)) return;
  int exponent = 0;
  RC_ASSERT(std::frexp(scale, &exponent) == 0.5f);
  RC_ASSERT(scale <= largest && largest < 2 * scale);
}

TEST(KvFormat, ThePairOfAValueShareItsScale) {
  std::vector<float> w(64, 0.3f);
  EXPECT_EQ(kv_rotated_scale(0.0f, 0.0f), 1.0f);
  EXPECT_EQ(kv_rotated_scale(1e-45f, 0.0f), 1.0f);
  w[3] = -5.0f;
  w[32 + 4] = 9.0f;
  w[8] = 100.0f;  // not a rotated place
  for (std::int64_t j = 0; j < 16; ++j) {
    EXPECT_EQ(kv_rotated_scale(w.data(), 64, j), j % 8 == 3 ? 4.0f : (j % 8 == 4 ? 8.0f : 0.25f)) << j;
  }
}

// ---- the tables

class KvCodebookOf : public testing::TestWithParam<int> {};

TEST_P(KvCodebookOf, FullTableIsTheFixedPointOfLloydsRules) {
  const KvCodebook table = solve_kv_codebook(CodebookKind::kFull, GetParam(), 1);
  ASSERT_EQ(table.n_half, 1 << (GetParam() - 1));
  for (int m = 0; m < table.n_half; ++m) {
    const double lower = m == 0 ? 0.0 : table.edge[m - 1];
    const double upper = m + 1 < table.n_half ? table.edge[m] : std::numeric_limits<double>::infinity();
    EXPECT_TRUE(close(table.level[m], gemma4::detail::normal_cell_mean(lower, upper), 2e-6)) << m;
    if (m + 1 < table.n_half) {
      EXPECT_TRUE(close(table.edge[m], 0.5 * (table.level[m] + table.level[m + 1]), 1e-6));
    }
  }
  for (int m = table.n_half; m < KvCodebook::kMaxHalf; ++m) EXPECT_EQ(table.level[m], 0.0f);
}

TEST_P(KvCodebookOf, ScalesWithTheLengthOfTheVector) {
  for (const auto kind : {CodebookKind::kFull, CodebookKind::kCutAtThreeSigma}) {
    const KvCodebook unit = solve_kv_codebook(kind, GetParam(), 1), table = solve_kv_codebook(kind, GetParam(), 128);
    for (int m = 0; m < unit.n_half; ++m) {
      EXPECT_FLOAT_EQ(table.level[m] * std::sqrt(128.0f), unit.level[m]);
      EXPECT_FLOAT_EQ(m + 1 < unit.n_half ? table.edge[m] * std::sqrt(128.0f) : 0.0f,
                      m + 1 < unit.n_half ? unit.edge[m] : 0.0f);
    }
  }
}

TEST_P(KvCodebookOf, TheIndexCountsTheEdgesBelow) {
  const KvCodebook table = solve_kv_codebook(CodebookKind::kFull, GetParam(), 64);
  const auto count = [&](float x) {
    int below = 0;
    for (int m = 0; m + 1 < table.n_half; ++m) below += table.edge[m] < x ? 1 : 0;
    return below;
  };
  for (int i = 0; i < 4000; ++i) {
    const float x = static_cast<float>(i) * 2e-4f;
    ASSERT_EQ(table.index(x), count(x)) << x;
  }
  for (int m = 0; m + 1 < table.n_half; ++m) {
    EXPECT_EQ(table.index(table.edge[m]), m) << "a tie goes towards zero";
    EXPECT_EQ(table.index(std::nextafter(table.edge[m], 1.0f)), m + 1);
    EXPECT_EQ(table.index(static_cast<double>(table.edge[m]) * (1 + 1e-12)), m + 1) << "in the wider type";
  }
  EXPECT_EQ(table.index(std::numeric_limits<float>::infinity()), table.n_half - 1);
  EXPECT_EQ(table.index(std::numeric_limits<float>::quiet_NaN()), 0);
}

INSTANTIATE_TEST_SUITE_P(Bits, KvCodebookOf, testing::Range(3, 7), testing::PrintToStringParamName());

TEST(KvCodebook, FourBitsAndThreeAreThoseOfTq4) {
  for (const auto kind : {CodebookKind::kFull, CodebookKind::kCutAtThreeSigma}) {
    for (const int bits : {3, 4}) {
      const KvCodebook table = solve_kv_codebook(kind, bits, 512);
      const Codebook tq4 = solve_codebook(kind, bits, 512);
      for (int m = 0; m < table.n_half; ++m) {
        const float level = tq4.centroids[static_cast<std::size_t>(table.n_half + m)];
        EXPECT_TRUE(close(table.level[m], level, 0x1p-23 * level)) << bits << ", " << m;
      }
    }
  }
}

TEST(KvCodebook, RefusesOtherWidths) {
  EXPECT_TRUE(refuses([] { (void)solve_kv_codebook(CodebookKind::kFull, 2, 64); }, {"bits 2", "3 to 6"}));
  EXPECT_TRUE(refuses([] { (void)solve_kv_codebook(CodebookKind::kFull, 7, 64); }, {"bits 7", "3 to 6"}));
  EXPECT_TRUE(refuses([] { (void)solve_kv_codebook(CodebookKind::kFull, 4, 0); }, {"n 0"}));
}

}  // namespace
