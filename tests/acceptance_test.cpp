// SPDX-License-Identifier: Apache-2.0
#include "reference/acceptance.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <span>
#include <vector>

#include "gemma4/draft/step.hpp"
#include "tests/support/drafters.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/table_backend.hpp"

/// The rule of acceptance, and whole steps by it over a target whose distribution is known exactly.
namespace {

using namespace gemma4;
using namespace gemma4::draft;
using reference::judge;
using reference::Verdict;
using testkit::TableBackend;
using Ids = std::vector<std::int32_t>;

constexpr float kNever = -std::numeric_limits<float>::infinity();

// ---- the functions

TEST(Acceptance, ATokenStaysAsOftenAsTheTargetAllows) {
  EXPECT_TRUE(accepts(0.5, 0.25, 0.999999)) << "p above q: always";
  EXPECT_TRUE(accepts(0.1, 0.4, 0.2499));
  EXPECT_FALSE(accepts(0.1, 0.4, 0.2501)) << "p / q = 1/4";
  EXPECT_FALSE(accepts(0, 0.4, 1e-300));
  EXPECT_EQ(replacement_score(0.2, 0.2, 0.5), -HUGE_VAL);
  EXPECT_EQ(replacement_score(0.2, 0.3, 0.5), -HUGE_VAL);
  EXPECT_DOUBLE_EQ(replacement_score(0.75, 0.25, 0.5), std::log(0.5) - std::log(std::log(2.0)));
}

TEST(Acceptance, NoiseOfEachPurposeIsItsOwn) {
  for (const std::int64_t position : {std::int64_t{0}, std::int64_t{131071}, std::int64_t{1} << 40}) {
    const double sampler = sampler_uniform(7, position, 3), accept = draft_uniform(7, position, Noise::kAccept, 3),
                 draft = draft_uniform(7, position, Noise::kDraft, 3);
    EXPECT_NE(sampler, accept);
    EXPECT_NE(sampler, draft);
    EXPECT_NE(accept, draft);
    EXPECT_EQ(draft, draft_uniform(7, position, Noise::kDraft, 3));
    EXPECT_NE(draft, draft_uniform(8, position, Noise::kDraft, 3));
    EXPECT_NE(draft, draft_uniform(7, position + 1, Noise::kDraft, 3));
  }
}

TEST(Acceptance, ADistributionIsWhatTheSamplerDrawsFrom) {
  const std::vector<float> logits = {1, 3, kNever, 2, -1};
  const std::vector<double> all = reference::distribution(logits, {.temperature = 2});
  double sum = 0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) / 2);
  for (std::size_t i = 0; i < logits.size(); ++i) {
    EXPECT_NEAR(all[i], std::exp(static_cast<double>(logits[i]) / 2) / sum, 1e-12) << i;
  }
  const std::vector<double> two = reference::distribution(logits, {.temperature = 1, .top_k = 2});
  EXPECT_NEAR(two[1], 1 / (1 + std::exp(-1.0)), 1e-12);
  EXPECT_EQ(two[0] + two[2] + two[4], 0);
  EXPECT_NEAR(two[1] + two[3], 1, 1e-15);
  EXPECT_EQ(reference::distribution(logits, {.temperature = 1, .top_p = 0.1f})[1], 1);
  EXPECT_TRUE(testkit::refuses([&] { (void)reference::distribution(logits, {}); }, {"temperature 0"}));
}

/// Rows of logits, given in order.
auto rows_of(const std::vector<std::vector<float>>& rows) {
  return [&rows](std::int64_t i) { return std::span<const float>(rows.at(static_cast<std::size_t>(i))); };
}

TEST(Acceptance, GreedyKeepsWhatIsTheLargest) {
  const std::vector<std::vector<float>> rows = {{0, 9, 1}, {7, 1, 7}, {0, 1, 2}};  // 1; 0, the lower of equals; 2
  EXPECT_EQ(judge(rows_of(rows), Proposal{}, {}, 5), (Verdict{0, 1}));
  EXPECT_EQ(judge(rows_of(rows), Proposal{{1, 0}, {}}, {}, 5), (Verdict{2, 2}));
  EXPECT_EQ(judge(rows_of(rows), Proposal{{1, 2}, {}}, {}, 5), (Verdict{1, 0}));
  EXPECT_EQ(judge(rows_of(rows), Proposal{{2, 0}, {}}, {}, 5), (Verdict{0, 1}));
  // A drafter that draws is judged alike: nothing is random.
  EXPECT_EQ(judge(rows_of(rows), Proposal{{1, 0}, {0, 1, 0, 1, 0, 0}}, {}, 5), (Verdict{2, 2}));
}

TEST(Acceptance, WhatCannotHaveBeenDrawnIsRefused) {
  const std::vector<std::vector<float>> rows = {{0, 9, 1}, {7, 1, 7}};
  const SamplerSettings settings{.temperature = 1};
  EXPECT_TRUE(testkit::refuses(
      [&] {
        (void)judge(rows_of(rows), Proposal{{1}, {0, kNever, 0}}, settings, 5);
      },
      {"token 1 at place 0", "was not drawn"}));
  EXPECT_TRUE(testkit::refuses(
      [&] {
        (void)judge(rows_of(rows), Proposal{{5}, {0, 0, 0}}, settings, 5);
      },
      {"token 5"}));
  EXPECT_TRUE(testkit::refuses(
      [&] {
        (void)judge(rows_of(rows), Proposal{{1}, {0, 0}}, settings, 5);
      },
      {"2 logits", "the target 3"}));
}

// ---- whole steps

/// Draws from a table of its own, as far from the target's as it likes; sometimes fewer than asked for.
class TableDrafter {
 public:
  explicit TableDrafter(const TableBackend& own) : own_(own) {}
  template <class TTarget>
  void propose(TTarget& /*target*/, const Request& request, Proposal& proposal) {
    Ids ids(request.tokens.end() - 2, request.tokens.end());
    const auto position = static_cast<std::int64_t>(request.tokens.size()) - 1;
    for (std::int64_t i = 0; i < request.n_draft; ++i) {
      const std::span<const float> logits = own_.logits(ids[ids.size() - 2], ids.back());
      proposal.logits.insert(proposal.logits.end(), logits.begin(), logits.end());
      ids.push_back(reference::draw_draft(logits, request.sampler, position + i));
      proposal.tokens.push_back(ids.back());
    }
  }
  void keep(std::int64_t /*n_token*/) {}

 private:
  const TableBackend& own_;
};

/// The judge of the reference for the table, or a wrong one.
struct TableJudge {
  std::vector<float> logits;
  std::function<Verdict(Verdict, const Proposal&)> spoil = {};

  Verdict operator()(const TableBackend& target, const Proposal& proposal, const SamplerSettings& settings,
                     std::int64_t position) {
    logits.resize(static_cast<std::size_t>(target.config().vocab));
    const auto row = [&](std::int64_t i) {
      target.copy_logits(i, logits);
      return std::span<const float>(logits);
    };
    const Verdict verdict = judge(row, proposal, settings, position);
    return spoil ? spoil(verdict, proposal) : verdict;
  }
};

/// Tokens 2, 3, ... of a text that begins with 0 and 1, by steps of up to `n_draft` drafts.
template <class TDrafter>
Ids written(TableBackend& backend, TDrafter& drafter, std::int64_t n_token, std::int64_t n_draft,
            const SamplerSettings& settings, TableJudge& by, Counts* counts = nullptr) {
  Model<TableBackend> model(backend);
  Ids ids = {0, 1};
  model.forward(std::span(ids).first(1), {});
  while (static_cast<std::int64_t>(ids.size()) < n_token + 2) {
    const std::int64_t n_left = n_token + 2 - static_cast<std::int64_t>(ids.size());
    const Step step = run_step(model, drafter, ids, std::min(n_draft, n_left - 1), settings, 0, by);
    ids.insert(ids.end(), step.tokens.begin(), step.tokens.end());
    if (counts != nullptr) counts->add(step);
  }
  return ids;
}

constexpr std::int64_t kVocab = 5;
constexpr std::size_t kTriples = kVocab * kVocab * kVocab;
constexpr int kTexts = 200000;

/// Probability of each three tokens behind 0, 1.
std::array<double, kTriples> exact(const TableBackend& target, const SamplerSettings& settings) {
  std::array<double, kTriples> p{};
  const auto of = [&](std::int32_t a, std::int32_t b) {
    return reference::distribution(target.logits(a, b), settings);
  };
  for (std::int32_t i = 0; i < kVocab; ++i) {
    for (std::int32_t j = 0; j < kVocab; ++j) {
      for (std::int32_t k = 0; k < kVocab; ++k) {
        p[static_cast<std::size_t>((i * kVocab + j) * kVocab + k)] = of(0, 1)[static_cast<std::size_t>(i)] *
                                                                     of(1, i)[static_cast<std::size_t>(j)] *
                                                                     of(i, j)[static_cast<std::size_t>(k)];
      }
    }
  }
  return p;
}

/// The statistic over cells that are possible, less their number, in standard deviations of it; infinite where
/// something impossible came.
double chi_square_excess(const std::array<std::int64_t, kTriples>& counts, const std::array<double, kTriples>& p) {
  double sum = 0;
  int n_cell = 0;
  for (std::size_t i = 0; i < kTriples; ++i) {
    const double expected = p[i] * kTexts;
    if (p[i] == 0) {
      if (counts[i] > 0) return HUGE_VAL;
      continue;
    }
    EXPECT_GE(expected, 5) << "the statistic wants more in cell " << i;
    const double difference = static_cast<double>(counts[i]) - expected;
    sum += difference * difference / expected;
    ++n_cell;
  }
  const double freedom = n_cell - 1;
  return (sum - freedom) / std::sqrt(2 * freedom);
}

struct SamplingCase {
  const char* name;
  SamplerSettings settings;
};

/// The sampled texts: one of three tokens for each seed, by one to three drafts.
std::array<std::int64_t, kTriples> sampled(TableBackend& target, const TableBackend& drafts, SamplerSettings settings,
                                           TableJudge by, Counts* counts = nullptr) {
  std::array<std::int64_t, kTriples> found{};
  TableDrafter drafter(drafts);
  for (int text = 0; text < kTexts; ++text) {
    settings.seed = static_cast<std::uint64_t>(text);
    const Ids ids = written(target, drafter, 3, 1 + text % 3, settings, by, counts);
    ++found[static_cast<std::size_t>((ids[2] * kVocab + ids[3]) * kVocab + ids[4])];
  }
  return found;
}

class AcceptanceOf : public testing::TestWithParam<SamplingCase> {};

TEST_P(AcceptanceOf, JointCountsOfThreeTokensFollowTheTarget) {
  TableBackend target(kVocab, 16, 0.8, 1);
  const TableBackend drafts(kVocab, 16, 0.8, 2);
  const std::array<double, kTriples> p = exact(target, GetParam().settings);
  constexpr double kLimit = 5;  // standard deviations; of a chi-square with 60 to 124 degrees, beyond 1e-5
  Counts counts;
  EXPECT_LE(chi_square_excess(sampled(target, drafts, GetParam().settings, {}, &counts), p), kLimit);
  EXPECT_GT(counts.accepted[0], 0);
  EXPECT_LT(counts.accepted[0], counts.drafted[0]) << "both branches are seen";
  EXPECT_GT(counts.accepted[1], 0);

  // The first draft of a text stays with probability sum min(p, q), a number of kTexts draws.
  const auto first_p = reference::distribution(target.logits(0, 1), GetParam().settings);
  const auto first_q = reference::distribution(drafts.logits(0, 1), GetParam().settings);
  double stays = 0;
  for (std::size_t i = 0; i < kVocab; ++i) stays += std::min(first_p[i], first_q[i]);
  std::int64_t n_kept = 0;
  TableDrafter drafter(drafts);
  for (int text = 0; text < kTexts / 10; ++text) {
    SamplerSettings settings = GetParam().settings;
    settings.seed = static_cast<std::uint64_t>(text) + 1000000;
    Counts one;
    TableJudge by;
    (void)written(target, drafter, 2, 1, settings, by, &one);
    n_kept += one.accepted[0] > 0 && one.n_step == 1 ? 1 : 0;
  }
  const double n = kTexts / 10;
  EXPECT_NEAR(static_cast<double>(n_kept), n * stays, 5 * std::sqrt(n * stays * (1 - stays)));

  // Controls: whoever accepts always, or replaces by the drafter's second choice, is seen.
  TableJudge always;
  always.spoil = [&](const Verdict& verdict, const Proposal& proposal) {
    return verdict.n_accepted == proposal.size() ? verdict : Verdict{verdict.n_accepted + 1, verdict.next};
  };
  EXPECT_GT(chi_square_excess(sampled(target, drafts, GetParam().settings, always), p), 100 * kLimit);
}

INSTANTIATE_TEST_SUITE_P(Acceptance, AcceptanceOf,
                         testing::Values(SamplingCase{"all", {.temperature = 1}},
                                         SamplingCase{"warm", {.temperature = 1.7f}},
                                         SamplingCase{"top_k_and_p", {.temperature = 0.9f, .top_k = 4, .top_p = 0.9f}}),
                         [](const auto& info) { return info.param.name; });

/// Whoever proposes what, as long as it is not drawn: the text of plain decoding with the same seed, token for token.
RC_GTEST_PROP(Acceptance, TextOfADrafterThatDoesNotDrawIsThatOfNone, ()) {
  const auto seed = *rc::gen::inRange<std::uint32_t>(0, 1000);
  const SamplerSettings settings{.temperature = *rc::gen::element(0.0f, 0.7f, 2.0f),
                                 .top_k = *rc::gen::element(0, 3),
                                 .top_p = *rc::gen::element(1.0f, 0.8f),
                                 .seed = seed};
  TableBackend backend(12, 80, 1.5, seed);
  NoDrafter none;
  TableJudge by;
  const Ids plain = written(backend, none, 60, 0, settings, by);
  backend.reset();
  testkit::KnownTextDrafter drafter(plain, 12, *rc::gen::element(0.2, 0.7, 1.0), seed);
  TableJudge checked;  // as many stay as were right
  checked.spoil = [&](const Verdict& verdict, const Proposal& proposal) {
    RC_ASSERT(verdict.n_accepted == (proposal.size() > 0 ? drafter.n_right : 0));
    return verdict;
  };
  const auto n_draft = *rc::gen::inRange<std::int64_t>(1, kMaxDrafts + 1);
  RC_ASSERT(written(backend, drafter, 60, n_draft, settings, checked) == plain);
}

TEST(Acceptance, OneTokenTooManyIsAnotherText) {  // the control of the property above
  TableBackend backend(12, 80, 1.5, 5);
  NoDrafter none;
  TableJudge by, one_more;
  const Ids plain = written(backend, none, 60, 0, {}, by);
  one_more.spoil = [](const Verdict& verdict, const Proposal& proposal) {
    return verdict.n_accepted == proposal.size() ? verdict : Verdict{verdict.n_accepted + 1, verdict.next};
  };
  backend.reset();
  testkit::KnownTextDrafter drafter(plain, 12, 0.7, 5);
  EXPECT_NE(written(backend, drafter, 60, 4, {}, one_more), plain);
}

// ---- what a step takes and leaves

TEST(DraftStep, DraftsFewerWhereTheContextEnds) {
  TableBackend backend(12, 20, 1.5, 5);
  NoDrafter none;
  TableJudge by;
  const Ids plain = written(backend, none, 19, 0, {}, by);  // 21 tokens: the last one is in no cache
  ASSERT_EQ(plain.size(), 21U);
  for (std::uint32_t seed = 0; seed < 20;
       ++seed) {  // so that every number of drafts meets every number of free positions
    backend.reset();
    Model<TableBackend> model(backend);
    testkit::KnownTextDrafter drafter(plain, 12, 1, seed);
    Ids ids = {0, 1};
    model.forward(std::span(ids).first(1), {});
    while (model.position() < backend.context()) {
      const Step step = run_step(model, drafter, ids, kMaxDrafts, {}, 0, by);
      ids.insert(ids.end(), step.tokens.begin(), step.tokens.end());
      ASSERT_EQ(model.position(), static_cast<std::int64_t>(ids.size()) - 1);
    }
    EXPECT_EQ(ids, plain);
    EXPECT_TRUE(testkit::refuses([&] { (void)run_step(model, drafter, ids, 1, {}, 0, by); }, {"context is full"}));
  }
}

TEST(DraftStep, RefusesWhatIsNoSequenceOfTheModel) {
  TableBackend backend(12, 20, 1.5, 5);
  Model<TableBackend> model(backend);
  TableJudge by;
  NoDrafter none;
  const Ids ids = {0, 1};
  EXPECT_TRUE(testkit::refuses([&] { (void)run_step(model, none, ids, 1, {}, 0, by); },
                               {"2 tokens", "caches hold 0", "all but the last"}));
  EXPECT_TRUE(testkit::refuses([&] { (void)run_step(model, none, Ids{}, 1, {}, 0, by); }, {"0 tokens"}));
  const Ids one = {3};
  EXPECT_TRUE(testkit::refuses([&] { (void)run_step(model, none, one, 8, {}, 0, by); }, {"8 drafts", "0 to 7"}));
  struct TooMany : NoDrafter {
    void propose(TableBackend& /*target*/, const Request& request, Proposal& proposal) {
      proposal.tokens.assign(static_cast<std::size_t>(request.n_draft) + 1, 1);
    }
  } too_many;
  EXPECT_TRUE(testkit::refuses([&] { (void)run_step(model, too_many, one, 2, {}, 0, by); },
                               {"proposes 3 tokens", "2 were asked for"}));
  EXPECT_EQ(model.position(), 0) << "before any work";
}

}  // namespace
