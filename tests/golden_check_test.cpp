// SPDX-License-Identifier: Apache-2.0
#include "reference/golden_check.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>

/// The comparison with a golden case is code under test: the case itself passes, and each thing that is spoiled in it
/// shows in the figure that is there for it.
namespace {

using namespace gemma4;
using reference::compare_with_golden;
using reference::Tq4GoldenComparison;

const Tq4Golden& golden_case() {
  static const Tq4Golden golden = read_tq4_golden(std::string(GEMMA4_TEST_DATA) + "/tq4/tq4-d64-h4x2-q1-kv40of64.gguf");
  return golden;
}

Tq4GoldenComparison spoiled(const std::function<void(Tq4Golden&)>& spoil) {
  Tq4Golden golden = golden_case();
  spoil(golden);
  return compare_with_golden(golden);
}

TEST(GoldenCheck, TheCasePasses) {
  const Tq4GoldenComparison result = compare_with_golden(golden_case());
  EXPECT_EQ(result.n_value, 2 * 2 * 64 * 64) << "K and V, heads, rows, values";
  EXPECT_EQ(result.n_other_code, 0);
  EXPECT_LE(result.n_tie, 2);
  EXPECT_LE(result.norm_error, reference::kNormRoundoff);
  EXPECT_GT(result.norm_error, reference::kNormRoundoff / 8) << "ours are rounded to bf16";
  EXPECT_GT(result.decompressed_rms, 0.09) << "4 bits leave an error of 0.0095 of the square";
  EXPECT_LT(result.decompressed_rms, 0.11);
  EXPECT_LE(result.decoded_error, 1e-5) << "double against float32 results";
  EXPECT_LE(result.attention_miss, 1.0);
  EXPECT_GT(result.attention_miss, 0.01);
}

TEST(GoldenCheck, EachSpoiledPartShows) {
  const Tq4GoldenComparison clean = compare_with_golden(golden_case());
  // A code of K, one of V: the low nibble of a byte, far from its neighbour.
  EXPECT_EQ(spoiled([](Tq4Golden& g) { g.k_codes[7] ^= 8; }).n_other_code, 1);
  EXPECT_EQ(spoiled([](Tq4Golden& g) { g.v_codes[9] ^= 0x80; }).n_other_code, 1);
  EXPECT_EQ(spoiled([](Tq4Golden& g) { g.v_codes.back() ^= 0x88; }).n_other_code, 2) << "the tail is compared too";
  EXPECT_NEAR(spoiled([](Tq4Golden& g) { g.k_norm[3] *= 1.05f; }).norm_error, 0.05, 0.01);
  EXPECT_NEAR(spoiled([](Tq4Golden& g) { g.v_norm.back() *= 0.8f; }).norm_error, 0.25, 0.01);
  const Tq4GoldenComparison moved = spoiled([](Tq4Golden& g) { g.out_tq4[5] += 0.25f; });
  EXPECT_NEAR(moved.decoded_error, 0.25, 1e-4);
  EXPECT_GT(moved.attention_miss, 1.0);
  // Norms and codes that the attention reads: its result is no longer the golden one, in both of its figures.
  for (const auto& result : {spoiled([](Tq4Golden& g) {
                               for (float& n : g.v_norm) n *= 1.05f;
                             }),
                             spoiled([](Tq4Golden& g) {
                               for (float& n : g.k_norm) n *= 1.5f;
                             })}) {
    EXPECT_GT(result.decoded_error, 100 * clean.decoded_error);
  }
  // A result that is no number is the worst there is.
  const Tq4GoldenComparison lost =
      spoiled([](Tq4Golden& g) { g.out_tq4[1] = std::numeric_limits<float>::quiet_NaN(); });
  EXPECT_TRUE(std::isinf(lost.decoded_error));
  EXPECT_TRUE(std::isinf(lost.attention_miss));
  // Another original row: its codes, its norm and its error are others. Rows of the tail do not count for the error.
  const auto scaled = [](std::size_t row, float factor) {
    return spoiled([=](Tq4Golden& g) {
      for (std::size_t i = 0; i < 64; ++i) g.k[row * 64 + i] *= factor;
    });
  };
  EXPECT_NEAR(scaled(2, 2.0f).norm_error, 1.0, 0.02);
  EXPECT_EQ(scaled(2, 2.0f).n_other_code, 0) << "the codes are those of the direction";
  EXPECT_GT(scaled(2, -1.0f).n_other_code, 50);
  EXPECT_EQ(scaled(50, 2.0f).decompressed_rms, clean.decompressed_rms);
  EXPECT_NE(scaled(39, 2.0f).decompressed_rms, clean.decompressed_rms);
}

}  // namespace
