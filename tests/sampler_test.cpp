// SPDX-License-Identifier: Apache-2.0
#include "reference/sampler.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "tests/support/property.hpp"

namespace {

using namespace gemma4;
using reference::sample;
using reference::survivors;
using Logits = std::vector<float>;
using Indices = std::vector<std::int32_t>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Quarter steps, so that equal logits occur.
rc::Gen<Logits> any_logits() {
  const auto logit =
      rc::gen::map(rc::gen::inRange(-40, 41), [](int quarters) { return static_cast<float>(quarters) / 4; });
  return rc::gen::nonEmpty(rc::gen::container<Logits>(logit));
}

SamplerSettings any_settings() {
  return {.temperature = static_cast<float>(*rc::gen::inRange(1, 40)) / 10,
          .top_k = *rc::gen::inRange(0, 20),
          .top_p = static_cast<float>(*rc::gen::inRange(1, 21)) / 20,
          .seed = *rc::gen::arbitrary<std::uint64_t>()};
}

// ---- greedy

RC_GTEST_PROP(Sampler, GreedyIsTheFirstOfTheLargest, (std::int64_t position)) {
  const Logits logits = *any_logits();
  std::size_t expected = 0;
  for (std::size_t i = 1; i < logits.size(); ++i) {
    if (logits[i] > logits[expected]) expected = i;
  }
  const SamplerSettings settings{.temperature = 0, .top_k = 3, .top_p = 0.5f, .seed = 9};
  RC_ASSERT(sample(logits, settings, position & INT64_MAX) == static_cast<std::int32_t>(expected));
}

RC_GTEST_PROP(Sampler, TopOneIsGreedyAtAnyTemperature, ()) {
  const Logits logits = *any_logits();
  SamplerSettings settings = any_settings();
  settings.top_k = 1;
  RC_ASSERT(sample(logits, settings, 5) == sample(logits, {}, 5));
}

TEST(Sampler, ScoresThatAreEqualGoToTheLowestToken) {
  // So large that the noise is below their last bit: every score is the same number.
  const Logits logits = {-kInf, 2.0f, 3e38f, 3e38f, 3e38f};
  for (const std::int64_t position : {0, 1, 2, 77, 1000}) {
    for (const SamplerSettings& settings :
         {SamplerSettings{.temperature = 0.5f, .seed = 3}, SamplerSettings{.temperature = 0.5f, .top_k = 3, .seed = 4},
          SamplerSettings{.temperature = 0.5f, .top_p = 0.9f, .seed = 5}}) {
      EXPECT_EQ(sample(logits, settings, position), 2) << position;
    }
  }
}

// ---- which tokens stay

RC_GTEST_PROP(Sampler, TopKKeepsTheLargestInOrder, ()) {
  const Logits logits = *any_logits();
  const auto top_k = *rc::gen::inRange<std::int32_t>(1, 20);
  Indices expected(logits.size());
  for (std::size_t i = 0; i < expected.size(); ++i) expected[i] = static_cast<std::int32_t>(i);
  std::stable_sort(expected.begin(), expected.end(), [&](auto a, auto b) {
    return logits[static_cast<std::size_t>(a)] > logits[static_cast<std::size_t>(b)];
  });
  expected.resize(std::min<std::size_t>(expected.size(), static_cast<std::size_t>(top_k)));
  RC_ASSERT(survivors(logits, {.temperature = 1, .top_k = top_k}) == expected);
}

/// The share of the softmax over all logits that `kept` has.
double share(const Logits& logits, const Indices& kept, double temperature) {
  const double top = *std::max_element(logits.begin(), logits.end());
  double all = 0, part = 0;
  for (const float logit : logits) all += std::exp((logit - top) / temperature);
  for (const std::int32_t i : kept) part += std::exp((logits[static_cast<std::size_t>(i)] - top) / temperature);
  return part / all;
}

// The sums are at most 100 terms of at most 1, in double: 1e-12 is far above their rounding.
RC_GTEST_PROP(Sampler, TopPKeepsTheFewestThatReachIt, ()) {
  const Logits logits = *any_logits();
  SamplerSettings settings = any_settings();
  settings.top_k = 0;
  settings.top_p = std::min(settings.top_p, 0.95f);
  Indices kept = survivors(logits, settings);
  RC_ASSERT(!kept.empty());
  RC_ASSERT(share(logits, kept, settings.temperature) >= settings.top_p - 1e-12);
  Indices in_order = survivors(logits, {.temperature = 1, .top_k = static_cast<std::int32_t>(logits.size())});
  in_order.resize(kept.size());
  RC_ASSERT(kept == in_order);
  kept.pop_back();
  RC_ASSERT(share(logits, kept, settings.temperature) < settings.top_p + 1e-12);
}

TEST(Sampler, TheNucleusIsTakenAfterTemperatureAndTopK) {
  // Shares at temperature 1: 1/2, 1/4, 1/8, 1/8.
  const float step = std::log(2.0f);
  const Logits logits = {0, -step, -2 * step, -2 * step};
  EXPECT_EQ(survivors(logits, {.temperature = 1, .top_p = 0.49f}), (Indices{0}));
  EXPECT_EQ(survivors(logits, {.temperature = 1, .top_p = 0.51f}), (Indices{0, 1}));
  EXPECT_EQ(survivors(logits, {.temperature = 1, .top_p = 0.76f}), (Indices{0, 1, 2}));
  EXPECT_EQ(survivors(logits, {.temperature = 1, .top_p = 0.88f}), (Indices{0, 1, 2, 3}));
  // Of the first two, the first has 2/3.
  EXPECT_EQ(survivors(logits, {.temperature = 1, .top_k = 2, .top_p = 0.66f}), (Indices{0}));
  EXPECT_EQ(survivors(logits, {.temperature = 1, .top_k = 2, .top_p = 0.67f}), (Indices{0, 1}));
  // At temperature 1/2 the shares are 8/11, 2/11, 1/22, 1/22.
  EXPECT_EQ(survivors(logits, {.temperature = 0.5f, .top_p = 0.72f}), (Indices{0}));
  EXPECT_EQ(survivors(logits, {.temperature = 0.5f, .top_p = 0.73f}), (Indices{0, 1}));
  EXPECT_EQ(survivors(logits, {.temperature = 1, .top_p = 1e-30f}), (Indices{0}));
}

TEST(Sampler, AShareThatIsJustReachedIsEnough) {
  EXPECT_EQ(survivors(Logits{0, 0}, {.temperature = 1, .top_p = 0.5f}), (Indices{0}));
  EXPECT_EQ(survivors(Logits{0, 0, 0, 0}, {.temperature = 1, .top_p = 0.75f}), (Indices{0, 1, 2}));
}

/// Shares of 1e-13 count: half of all is then more than the first of two equals has. Control: a tail that has no share.
TEST(Sampler, ATailOfSmallSharesCounts) {
  Logits logits(1002, -30.0f);
  logits[0] = logits[1] = 0;
  EXPECT_EQ(survivors(logits, {.temperature = 1, .top_p = 0.5f}), (Indices{0, 1}));
  std::fill(logits.begin() + 2, logits.end(), -100.0f);
  EXPECT_EQ(survivors(logits, {.temperature = 1, .top_p = 0.5f}), (Indices{0}));
}

TEST(Sampler, MassesOfAnyVocabularyFit) {
  for (const std::int64_t n : {std::int64_t{1}, std::int64_t{2}, std::int64_t{262144}, std::int64_t{INT32_MAX}}) {
    const std::uint64_t first = sampler_mass(3, 3, n);
    EXPECT_LE(first, (std::uint64_t{1} << 62) / static_cast<std::uint64_t>(n)) << n;
    EXPECT_GE(first, std::uint64_t{1} << 31) << n;
  }
  EXPECT_EQ(sampler_mass(-1, 0, 262144), static_cast<std::uint64_t>(std::exp(-1.0) * 0x1p43));
  EXPECT_EQ(sampler_mass(-1e300, 0, 5), 0u);
}

TEST(Sampler, LargeLogitsDoNotOverflowTheNucleus) {
  EXPECT_EQ(survivors(Logits{1000, 1000, -1000}, {.temperature = 0.01f, .top_p = 0.9f}), (Indices{0, 1}));
  EXPECT_EQ(survivors(Logits{-1000, -1000, -3000}, {.temperature = 0.01f, .top_p = 0.9f}), (Indices{0, 1}));
}

TEST(Sampler, AForbiddenTokenNeverStays) {
  const Logits logits = {-kInf, 0, -kInf, 1};
  EXPECT_EQ(survivors(logits, {.temperature = 1}), (Indices{1, 3}));
  EXPECT_EQ(survivors(logits, {.temperature = 1, .top_k = 4}), (Indices{3, 1}));
  for (std::int64_t position = 0; position < 200; ++position) {
    const std::int32_t token = sample(logits, {.temperature = 100}, position);
    EXPECT_TRUE(token == 1 || token == 3);
  }
}

RC_GTEST_PROP(Sampler, TheTokenIsOneThatStayed, (std::int64_t position)) {
  const Logits logits = *any_logits();
  const SamplerSettings settings = any_settings();
  const Indices kept = survivors(logits, settings);
  RC_ASSERT(std::find(kept.begin(), kept.end(), sample(logits, settings, position & INT64_MAX)) != kept.end());
}

// ---- the draw

// The argmax over all is the argmax over any part that holds it: each token has its own noise.
RC_GTEST_PROP(Sampler, ForbiddingAnotherTokenChangesNothing, ()) {
  Logits logits = *any_logits();
  const SamplerSettings settings{.temperature = 1, .seed = *rc::gen::arbitrary<std::uint64_t>()};
  const std::int32_t token = sample(logits, settings, 77);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (static_cast<std::int32_t>(i) != token && *rc::gen::arbitrary<bool>()) logits[i] = -kInf;
  }
  RC_ASSERT(sample(logits, settings, 77) == token);
}

constexpr std::int64_t kDraws = 20000;

/// Pearson's statistic of kDraws draws, at as many positions, against the softmax of `expected` at `temperature`.
double chi_square(const Logits& logits, const SamplerSettings& settings, const Logits& expected, double temperature) {
  std::vector<double> counts(logits.size(), 0.0);
  for (std::int64_t position = 0; position < kDraws; ++position) {
    ++counts[static_cast<std::size_t>(sample(logits, settings, position))];
  }
  double statistic = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double mean = kDraws * share(expected, {static_cast<std::int32_t>(i)}, temperature);
    if (mean == 0) {
      if (counts[i] > 0) return INFINITY;
      continue;
    }
    statistic += (counts[i] - mean) * (counts[i] - mean) / mean;
  }
  return statistic;
}

// With d degrees of freedom P(X >= d + 2 sqrt(d t) + 2 t) <= exp(-t) (Laurent and Massart 2000, lemma 1). At t = 10 a
// right sampler fails for one seed in 22000; the seeds are fixed. All means are above 100, so X is close to chi-square.
double chi_square_bound(double degrees) {
  constexpr double t = 10;
  return degrees + 2 * std::sqrt(degrees * t) + 2 * t;
}

const Logits kLogits = {0.5f, -1.0f, 2.0f, 1.0f, -2.0f, 1.0f};

TEST(Sampler, DrawsFollowTheSoftmax) {
  for (const std::uint64_t seed : {0ull, 1ull, 0xFFFFFFFFFFFFFFFFull}) {
    EXPECT_LT(chi_square(kLogits, {.temperature = 1, .seed = seed}, kLogits, 1), chi_square_bound(5)) << seed;
    EXPECT_LT(chi_square(kLogits, {.temperature = 2.5f, .seed = seed}, kLogits, 2.5), chi_square_bound(5)) << seed;
  }
}

TEST(Sampler, DrawsFollowTheSoftmaxOfWhatStayed) {
  Logits kept = kLogits;
  kept[4] = kept[1] = kept[0] = -kInf;
  EXPECT_LT(chi_square(kLogits, {.temperature = 1, .top_k = 3, .seed = 4}, kept, 1), chi_square_bound(2));
  EXPECT_LT(chi_square(kLogits, {.temperature = 1, .top_p = 0.8f, .seed = 5}, kept, 1), chi_square_bound(2));
}

TEST(Sampler, TheStatisticSeesAWrongDistribution) {
  EXPECT_GT(chi_square(kLogits, {.temperature = 1.1f}, kLogits, 1), chi_square_bound(5));
  EXPECT_GT(chi_square(kLogits, {.temperature = 1, .top_k = 5}, kLogits, 1), chi_square_bound(5));
  EXPECT_GT(chi_square(kLogits, {.temperature = 0}, kLogits, 1), chi_square_bound(5));
}

Indices draws(const SamplerSettings& settings, std::int64_t first_position, std::int64_t count) {
  Indices tokens;
  const Logits flat(1000, 0.0f);
  for (std::int64_t i = 0; i < count; ++i) tokens.push_back(sample(flat, settings, first_position + i));
  return tokens;
}

TEST(Sampler, ASeedGivesTheSameTokensAgain) {
  const SamplerSettings settings{.temperature = 1, .seed = 42};
  EXPECT_EQ(draws(settings, 0, 50), draws(settings, 0, 50));
}

// Of 1000 equally likely tokens: two unrelated sequences of 50 agree at more than 5 places with probability below
// C(50, 6) * 1000^-6 = 1.6e-11.
int n_agree(const Indices& a, const Indices& b) {
  int count = 0;
  for (std::size_t i = 0; i < a.size(); ++i) count += a[i] == b[i] ? 1 : 0;
  return count;
}

TEST(Sampler, SeedsAndPositionsDrawOtherTokens) {
  const Indices tokens = draws({.temperature = 1, .seed = 42}, 0, 50);
  EXPECT_GT(std::set<std::int32_t>(tokens.begin(), tokens.end()).size(), 40u);
  for (const std::uint64_t seed : {43ull, 42ull + (1ull << 32), 0ull}) {
    EXPECT_LE(n_agree(tokens, draws({.temperature = 1, .seed = seed}, 0, 50)), 5) << seed;
  }
  for (const std::int64_t position : {std::int64_t{1}, std::int64_t{131072}, std::int64_t{1} << 32}) {
    EXPECT_LE(n_agree(tokens, draws({.temperature = 1, .seed = 42}, position, 50)), 5) << position;
  }
  EXPECT_EQ(n_agree(tokens, tokens), 50);
}

TEST(Sampler, TheNoiseIsPinned) {
  // Philox with seed 0 at position 0, index 0 is the published all-zero answer: its upper 52 bits are m.
  EXPECT_EQ(sampler_uniform(0, 0, 0), (static_cast<double>(0xe169c58d6627eull) + 0.5) * std::ldexp(1.0, -52));
}

// ---- refusals

std::string refusal(const Logits& logits, const SamplerSettings& settings, std::int64_t position = 0) {
  try {
    static_cast<void>(sample(logits, settings, position));
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

TEST(Sampler, BadSettingsAreRefusedByName) {
  const Logits logits = {0, 1};
  for (const float temperature : {-1.0f, kNan, kInf}) {
    EXPECT_TRUE(refusal(logits, {.temperature = temperature}).starts_with("sampler: temperature ")) << temperature;
  }
  EXPECT_EQ(refusal(logits, {.top_k = -1}), "sampler: top_k -1, expected 0 (off) or a positive number");
  for (const float top_p : {0.0f, -0.5f, 1.5f, kNan}) {
    EXPECT_TRUE(refusal(logits, {.top_p = top_p}).starts_with("sampler: top_p ")) << top_p;
  }
  EXPECT_EQ(refusal(logits, {.temperature = 1}, -1), "sampler: position -1, expected at least 0");
  EXPECT_EQ(refusal(logits, {.temperature = 1e-40f, .top_k = 9, .top_p = 1e-40f}), "accepted");
}

TEST(Sampler, BadLogitsAreRefusedByIndex) {
  for (const float temperature : {0.0f, 1.0f}) {
    EXPECT_EQ(refusal({0, kNan}, {.temperature = temperature}),
              "sampler: logit 1 is nan, expected a finite number or -inf");
    EXPECT_EQ(refusal({kInf, 0}, {.temperature = temperature}),
              "sampler: logit 0 is inf, expected a finite number or -inf");
    EXPECT_EQ(refusal({-kInf, -kInf}, {.temperature = temperature}),
              "sampler: all 2 logits are -inf, so no token can be chosen");
    EXPECT_EQ(refusal({}, {.temperature = temperature}), "sampler: 0 logits, expected 1 to 2^31 - 1");
  }
}

}  // namespace
