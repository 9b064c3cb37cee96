// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "gemma4/model/model.hpp"
#include "reference/backend.hpp"
#include "tests/support/model_logits.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/small_model.hpp"

/// Going back on the reference, bit for bit: what was taken back leaves no trace, in whatever format the caches are.
/// And what that stands on: of a short chunk each row has the bits that it would have alone.
namespace {

using namespace gemma4;
using testkit::logits_of;
using testkit::SmallModel;
using Ids = std::vector<std::int32_t>;
using ReferenceModel = Model<reference::Backend<float>>;

/// Windows that go round at once, that do so within a test, and one that hardly does.
const SmallModel& small_of(std::size_t index) {
  static const auto models = [] {
    std::vector<std::unique_ptr<SmallModel>> made;
    for (const std::int64_t window : {1, 7, 40, 100}) {
      ModelConfig config = gemma4_tiny();
      config.context = 4096;
      config.window = window;
      config.vocab = 300;  // rows that do not begin at multiples of 32 bytes
      config.ffn_hidden = 256;
      config.is_sliding = {1, 0};
      made.push_back(std::make_unique<SmallModel>(config, 10));
    }
    return made;
  }();
  return *models[index % models.size()];
}

struct CacheCase {
  std::string cache, ring = "bf16";
};

CacheCase any_cache() {
  return {*rc::gen::element<std::string>("f32", "bf16", "tq4", "tq4-k3v4-raw", "kv5r4", "kv16r16", "sim-int8",
                                         "sim-k3v5-had-sink4"),
          *rc::gen::element<std::string>("bf16", "sim-int8", "sim-k6v6-had")};
}

reference::BackendOptions options_of(const CacheCase& which) {
  return {.cache = parse_cache_spec(which.cache), .context = 400, .max_chunk = 64, .ring = parse_ring_spec(which.ring)};
}

Ids any_ids(std::int64_t n_token) {
  return *rc::gen::container<Ids>(static_cast<std::size_t>(n_token), rc::gen::inRange<std::int32_t>(0, 300));
}

RC_GTEST_PROP(Rewind, RowsOfAShortChunkHaveTheBitsOfEachAlone, ()) {
  const SmallModel& small = small_of(*rc::gen::inRange<std::size_t>(0, 4));
  const CacheCase which = any_cache();
  const Ids ids = any_ids(*rc::gen::inRange<std::int64_t>(2, 40));
  const auto chunks = *rc::gen::nonEmpty(
      rc::gen::container<std::vector<std::int64_t>>(rc::gen::inRange<std::int64_t>(1, kDecodeChunk + 1)));
  reference::Backend<float> alone(small.weights, options_of(which)), together(small.weights, options_of(which));
  RC_ASSERT(logits_of(together, ids, chunks) == logits_of(alone, ids, {1}));
}

/// In short chunks, without logits.
void feed(ReferenceModel& model, std::span<const std::int32_t> ids) {
  for (std::size_t at = 0; at < ids.size(); at += kDecodeChunk) {
    model.forward(ids.subspan(at, std::min<std::size_t>(kDecodeChunk, ids.size() - at)), {});
  }
}

TEST(Rewind, RowsOfALongerChunkAreProductsOfTheirOwnOrder) {  // the control: else the property above would be for free
  const SmallModel& small = small_of(2);
  Ids ids(40);
  std::iota(ids.begin(), ids.end(), 20);
  reference::Backend<float> alone(small.weights, options_of({"bf16"})), together(small.weights, options_of({"bf16"}));
  EXPECT_NE(logits_of(together, ids, {40}), logits_of(alone, ids, {1}));
}

/// A sequence that is read in pieces, some of which are taken back, gives the logits of one that never had them. It
/// begins with a prompt in long chunks, so that the rings go round where the pieces are.
RC_GTEST_PROP(Rewind, WhatIsTakenBackLeavesNoTrace, ()) {
  const SmallModel& small = small_of(*rc::gen::inRange<std::size_t>(0, 4));
  const CacheCase which = any_cache();
  reference::Backend<float> used(small.weights, options_of(which)), fresh(small.weights, options_of(which));
  ReferenceModel model(used), expected(fresh);
  const Ids prompt = any_ids(*rc::gen::inRange<std::int64_t>(1, 200));
  Ids kept;
  for (ReferenceModel* each : {&model, &expected}) each->prefill(prompt, 64, [](std::int64_t) {});
  for (int round = 0; round < 2; ++round) {
    const Ids more = any_ids(*rc::gen::inRange<std::int64_t>(1, 70));
    feed(model, more);
    kept.insert(kept.end(), more.begin(), more.end());
    const std::int64_t limit = std::min(model.max_rewind(), static_cast<std::int64_t>(kept.size()));
    const std::int64_t n_back = *rc::gen::weightedOneOf<std::int64_t>(
        {{3, rc::gen::inRange<std::int64_t>(0, limit + 1)}, {1, rc::gen::just(limit)}});
    model.rewind(n_back);
    kept.resize(kept.size() - static_cast<std::size_t>(n_back));
    RC_ASSERT(model.position() == static_cast<std::int64_t>(prompt.size() + kept.size()));
  }
  if (!kept.empty()) feed(expected, kept);
  const Ids last = any_ids(5);
  RC_ASSERT(logits_of(model, last, {4}) == logits_of(expected, last, {4}));
}

TEST(Rewind, BeyondTheSpareSlotsIsRefused) {
  const SmallModel& small = small_of(1);
  reference::Backend<float> backend(small.weights, options_of({"bf16"}));
  ReferenceModel model(backend);
  const Ids ids(100, 7);
  (void)logits_of(model, ids, {8});
  EXPECT_EQ(model.max_rewind(), kMaxRewind);
  model.rewind(kMaxRewind);
  EXPECT_EQ(model.max_rewind(), 0);
  model.rewind(1);
  EXPECT_TRUE(testkit::refuses([&] { model.decode(7); }, {"position 35", "been at 100", "go back 64"}));
  model.reset();
  model.decode(7);
  EXPECT_EQ(model.max_rewind(), 1) << "no more than there is";
}

TEST(Rewind, ASlotThatWasOverwrittenIsSeen) {  // the control: one token too far, and a key of the window is another
  // A window of 40 in 128 slots: a query sees 39 keys of them.
  constexpr std::int64_t kSpare = 128 - 39;
  static_assert(ring_slots(40) == 128);
  for (const std::int64_t n_back : {kSpare, kSpare + 1}) {
    reference::RingCache<float> ring(1, 128, 4, 127);
    const auto commit = [&](std::int64_t position, float value) {
      const std::vector<float> row(4, value);
      ring.commit(make_view(row.data(), 1, 1, 4), make_view(row.data(), 1, 1, 4), position);
    };
    for (std::int64_t p = 0; p < 200; ++p) commit(p, static_cast<float>(p));
    bool holds_window = true;  // of the query at 200 - n_back, whose own key is fresh
    for (std::int64_t p = 200 - n_back - 39; p < 200 - n_back; ++p) {
      holds_window = holds_window && ring.k()(0, ring_slot(p, 128), 0) == static_cast<float>(p);
    }
    EXPECT_EQ(holds_window, n_back == kSpare) << n_back;
  }
  EXPECT_GE(kSpare, kMaxRewind);
}

TEST(Rewind, AFormatThatKeepsATailCannot) {
  const SmallModel& small = small_of(2);
  for (const char* cache : {"sim-int8-tail16", "sim-kvarn-k4v4"}) {
    reference::Backend<float> backend(small.weights, options_of({cache}));
    ReferenceModel model(backend);
    model.decode(7);
    EXPECT_EQ(model.max_rewind(), 0) << cache;
    EXPECT_TRUE(keeps_a_tail(parse_cache_spec(cache)));
  }
  EXPECT_FALSE(keeps_a_tail(parse_cache_spec("sim-int8-sink4")));
}

}  // namespace
