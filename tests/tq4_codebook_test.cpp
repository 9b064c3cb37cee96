// SPDX-License-Identifier: Apache-2.0
#include "gemma4/tq4_codebook.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>
#include <numbers>
#include <stdexcept>
#include <string>
#include <vector>

#include "gemma4/json.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/text_file.hpp"

namespace {

using namespace gemma4;
using testkit::close;

constexpr std::int64_t kHeadDims[] = {64, 128, 256, 512};
constexpr int kBits[] = {2, 3, 4};

std::span<const float> levels(const Codebook& book) {
  return {book.centroids.data(), static_cast<std::size_t>(book.n_level)};
}
std::span<const float> edges(const Codebook& book) {
  return {book.boundaries.data(), static_cast<std::size_t>(book.n_level - 1)};
}

/// The integral of f over [a, b] by Simpson's rule with 2000 intervals: its error is far below 1e-10 for the smooth
/// densities here. It shares nothing with the closed forms under test.
template <class TFunction>
double integral(double a, double b, const TFunction& f) {
  constexpr int kIntervals = 2000;
  const double step = (b - a) / kIntervals;
  double sum = f(a) + f(b);
  for (int i = 1; i < kIntervals; ++i) sum += (i % 2 == 1 ? 4.0 : 2.0) * f(a + i * step);
  return sum * step / 3.0;
}

double density(double x) {
  return std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::numbers::pi);
}

/// The peer's tables: name -> centroids, boundaries.
JsonValue peer_codebooks() {
  return parse_json(testkit::read_text(std::string(GEMMA4_TEST_DATA) + "/tq4/codebooks.json"), "codebooks.json");
}

std::vector<std::vector<float>> json_tables(const JsonValue& codebooks, const std::string& name) {
  std::vector<std::vector<float>> tables;
  for (const JsonValue& table : *codebooks.object()->at(name).array()) {
    auto& values = tables.emplace_back();
    for (const JsonValue& value : *table.array()) values.push_back(static_cast<float>(*value.number()));
  }
  return tables;
}

TEST(Tq4Codebook, FullTableObeysBothOfLloydsRules) {
  // Levels and edges are floats of at most 2.8: half a unit in the last place is 1.2e-7.
  for (const int bits : kBits) {
    const Codebook book = solve_codebook(CodebookKind::kFull, bits, 4);  // levels at half their unit size
    for (int i = 0; i < book.n_level; ++i) {
      const auto at = static_cast<std::size_t>(i);
      const double lower = i == 0 ? -12.0 : 2.0 * book.boundaries[at - 1];
      const double upper = i + 1 == book.n_level ? 12.0 : 2.0 * book.boundaries[at];
      const double mass = integral(lower, upper, density);
      const double mean = integral(lower, upper, [](double x) { return x * density(x); }) / mass;
      EXPECT_TRUE(close(2.0 * book.centroids[at], mean, 4e-7)) << bits << " bits, level " << i;
      if (i + 1 < book.n_level) {
        EXPECT_TRUE(close(book.boundaries[at], 0.5 * (book.centroids[at] + book.centroids[at + 1]), 2e-7));
      }
    }
  }
}

TEST(Tq4Codebook, FullLevelsAreThePublishedOnes) {
  // J. Max, Quantizing for Minimum Distortion (1960), table I, N = 4, 8, 16: four decimals.
  const std::vector<std::vector<double>> published = {{0.4528, 1.5104},
                                                      {0.2451, 0.7560, 1.3439, 2.1519},
                                                      {0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326}};
  for (const int bits : kBits) {
    const Codebook book = solve_codebook(CodebookKind::kFull, bits, 256);
    std::vector<double> positive;
    for (int i = book.n_level / 2; i < book.n_level; ++i) {
      positive.push_back(16.0 * book.centroids[static_cast<std::size_t>(i)]);
    }
    EXPECT_TRUE(close(positive, published[static_cast<std::size_t>(bits - 2)], 5.1e-5)) << bits << " bits";
  }
}

TEST(Tq4Codebook, DistortionIsThePublishedOneAndEqualsItsIntegral) {
  const double published[] = {0.11748, 0.03455, 0.00950};
  for (const int bits : kBits) {
    for (const CodebookKind kind : {CodebookKind::kFull, CodebookKind::kCutAtThreeSigma}) {
      const Codebook book = solve_codebook(kind, bits, 1);
      double sum = 0.0;
      double lower = -12.0;
      for (int i = 0; i < book.n_level; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const double upper = i + 1 == book.n_level ? 12.0 : book.boundaries[at];
        const double level = book.centroids[at];
        sum += integral(lower, upper, [level](double x) { return (x - level) * (x - level) * density(x); });
        lower = upper;
      }
      EXPECT_TRUE(close(codebook_distortion(book, 1), sum, 1e-9)) << bits << " bits";
    }
    const double full = codebook_distortion(solve_codebook(CodebookKind::kFull, bits, 512), 512);
    EXPECT_TRUE(close(full, published[bits - 2], 5.1e-6)) << bits << " bits";
  }
}

TEST(Tq4Codebook, CuttingTheDensityCostsFivePercentAtFourBits) {
  const auto distortion = [](CodebookKind kind) { return codebook_distortion(solve_codebook(kind, 4, 512), 512); };
  const double ratio = distortion(CodebookKind::kCutAtThreeSigma) / distortion(CodebookKind::kFull);
  EXPECT_TRUE(close(ratio, 1.0512, 1e-4));
}

TEST(Tq4Codebook, CutTableIsThePeersWithinOneMillionth) {
  const JsonValue text = peer_codebooks();
  for (const std::int64_t head_dim : kHeadDims) {
    for (const int bits : kBits) {
      const std::string name = concat("d", head_dim, "_b", bits);
      const auto peer = json_tables(text, name);
      const Codebook cut = solve_codebook(CodebookKind::kCutAtThreeSigma, bits, head_dim);
      EXPECT_TRUE(close(levels(cut), peer[0], 1e-6)) << name;
      EXPECT_TRUE(close(edges(cut), peer[1], 1e-6)) << name;
      const Codebook full = solve_codebook(CodebookKind::kFull, bits, head_dim);
      EXPECT_FALSE(close(levels(full), peer[0], 1e-6)) << "negative control: " << name;
      EXPECT_FALSE(close(edges(full), peer[1], 1e-6)) << "negative control: " << name;
    }
  }
}

TEST(Tq4Codebook, CutTableOfFourBitsNeedsThePeersNumberOfRounds) {
  // Negative control of the rounds: their fixed point is another table.
  const auto peer = json_tables(peer_codebooks(), "d64_b4");
  const auto fixed_point = detail::solve_unit_half(8, 3.0, 100000);
  ASSERT_TRUE(fixed_point.converged);
  std::vector<double> peer_half, ours(fixed_point.level.begin(), fixed_point.level.begin() + 8);
  for (std::size_t i = 8; i < 16; ++i) peer_half.push_back(8.0 * peer[0][i]);
  EXPECT_FALSE(close(ours, peer_half, 1e-5));
  EXPECT_TRUE(close(ours, peer_half, 3e-4));
}

TEST(Tq4Codebook, IsExactlySymmetricAndAscending) {
  for (const CodebookKind kind : {CodebookKind::kFull, CodebookKind::kCutAtThreeSigma}) {
    for (const std::int64_t head_dim : kHeadDims) {
      for (const int bits : kBits) {
        const Codebook book = solve_codebook(kind, bits, head_dim);
        ASSERT_EQ(book.n_level, 1 << bits);
        const auto c = levels(book);
        const auto e = edges(book);
        for (std::size_t i = 0; i < c.size(); ++i) EXPECT_EQ(c[i], -c[c.size() - 1 - i]);
        for (std::size_t i = 0; i < e.size(); ++i) {
          EXPECT_EQ(e[i], -e[e.size() - 1 - i]);
          EXPECT_LT(c[i], e[i]);
          EXPECT_LT(e[i], c[i + 1]);
        }
      }
    }
  }
}

RC_GTEST_PROP(Tq4Codebook, IndexIsTheNearestLevel, ()) {
  const auto kind = *rc::gen::element(CodebookKind::kFull, CodebookKind::kCutAtThreeSigma);
  const std::int64_t head_dim =
      *rc::gen::elementOf(std::vector<std::int64_t>(std::begin(kHeadDims), std::end(kHeadDims)));
  const Codebook book = solve_codebook(kind, *rc::gen::inRange(2, 5), head_dim);
  const double value = *rc::gen::inRange(-400000, 400001) * 1e-5 / std::sqrt(static_cast<double>(head_dim));
  const int index = codebook_index(book, value);
  RC_ASSERT(index >= 0 && index < book.n_level);
  const double found = std::abs(value - book.centroids[static_cast<std::size_t>(index)]);
  for (const float level : levels(book)) {
    RC_ASSERT(found <= std::abs(value - level) + 1e-7);  // a boundary is a rounded midpoint
  }
}

TEST(Tq4Codebook, TieGoesToTheLowerIndexAndNanToZero) {
  const Codebook book = solve_codebook(CodebookKind::kFull, 4, 128);
  for (int i = 0; i + 1 < book.n_level; ++i) {
    const float edge = book.boundaries[static_cast<std::size_t>(i)];
    EXPECT_EQ(codebook_index(book, edge), i);
    EXPECT_EQ(codebook_index(book, std::nextafter(edge, 1.0f)), i + 1) << "negative control";
  }
  EXPECT_EQ(codebook_index(book, std::numeric_limits<float>::quiet_NaN()), 0);
  EXPECT_EQ(codebook_index(book, std::numeric_limits<float>::infinity()), 15);
  EXPECT_EQ(codebook_index(book, -std::numeric_limits<double>::infinity()), 0);
}

TEST(Tq4Codebook, AGivenTableIsTakenOrRefused) {
  const Codebook book = solve_codebook(CodebookKind::kFull, 3, 128);
  EXPECT_EQ(codebook_from(levels(book), edges(book)), book);
  std::vector<float> c(levels(book).begin(), levels(book).end());
  std::vector<float> e(edges(book).begin(), edges(book).end());
  EXPECT_THROW(codebook_from(std::span(c).first(7), e), std::invalid_argument);
  EXPECT_THROW(codebook_from(c, std::span(e).first(6)), std::invalid_argument);
  std::swap(e[2], e[3]);
  EXPECT_THROW(codebook_from(c, e), std::invalid_argument);
  e[2] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_THROW(codebook_from(c, e), std::invalid_argument);
}

TEST(Tq4Codebook, RefusesOtherWidths) {
  for (const int bits : {-1, 0, 1, 5, 8}) {
    EXPECT_THROW(solve_codebook(CodebookKind::kFull, bits, 64), std::invalid_argument);
  }
  EXPECT_THROW(solve_codebook(CodebookKind::kFull, 4, 0), std::invalid_argument);
}

}  // namespace
