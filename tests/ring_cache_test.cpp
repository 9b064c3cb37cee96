// SPDX-License-Identifier: Apache-2.0
#include "reference/ring_cache.hpp"

#include <gtest/gtest.h>

#include "tests/support/attention_case.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::reference {
namespace {

using testkit::refuses;

/// What the token at a position holds: no two of a test are alike.
float k_value(std::int64_t position, std::int64_t head, std::int64_t i) {
  return static_cast<float>(1 + position * 1000 + head * 100 + i);
}

struct Chunk {
  std::vector<float> k, v;
  View<const float, 3> k_view, v_view;

  Chunk(std::int64_t position, std::int64_t n_new, std::int64_t n_head_kv, std::int64_t head_dim) {
    for (std::int64_t t = 0; t < n_new; ++t) {
      for (std::int64_t h = 0; h < n_head_kv; ++h) {
        for (std::int64_t i = 0; i < head_dim; ++i) {
          k.push_back(k_value(position + t, h, i));
          v.push_back(-k_value(position + t, h, i));
        }
      }
    }
    k_view = make_view(k.data(), n_new, n_head_kv, head_dim);
    v_view = make_view(v.data(), n_new, n_head_kv, head_dim);
  }
};

RC_GTEST_PROP(RingCache, HoldsTheLastTokensAfterAnyChunks, ()) {
  const auto n_head_kv = *rc::gen::inRange<std::int64_t>(1, 4);
  const auto ring_len = *rc::gen::inRange<std::int64_t>(1, 20);
  const std::int64_t head_dim = 4;
  RingCache<float> ring(n_head_kv, ring_len, head_dim);
  const auto chunks = *rc::gen::container<std::vector<std::int64_t>>(rc::gen::inRange<std::int64_t>(0, 50));
  std::int64_t end = 0;
  for (const std::int64_t n_new : chunks) {
    const Chunk chunk(end, n_new, n_head_kv, head_dim);
    ring.commit(chunk.k_view, chunk.v_view, end);
    end += n_new;
    RC_ASSERT(ring.end() == end);
    for (std::int64_t slot = 0; slot < ring_len; ++slot) {
      // The newest position of this slot, if there is one.
      const std::int64_t age = (end - 1 - slot) % ring_len;
      const std::int64_t position = end - 1 - age;
      for (std::int64_t h = 0; h < n_head_kv; ++h) {
        for (std::int64_t i = 0; i < head_dim; ++i) {
          const float expected = slot < end ? k_value(position, h, i) : 0.0f;
          RC_ASSERT(ring.k()(h, slot, i) == expected);
          RC_ASSERT(ring.v()(h, slot, i) == -expected);
        }
      }
    }
  }
}

TEST(RingCache, SlotsWrapAtTheRingLength) {
  EXPECT_EQ(ring_slot(0, 5), 0);
  EXPECT_EQ(ring_slot(4, 5), 4);
  EXPECT_EQ(ring_slot(5, 5), 0);
  EXPECT_EQ(ring_slot(262143, 1024), 1023);
}

TEST(RingCache, ResetStartsANewSequence) {
  RingCache<float> ring(1, 3, 4);
  const Chunk chunk(0, 2, 1, 4);
  ring.commit(chunk.k_view, chunk.v_view, 0);
  ring.reset();
  EXPECT_NO_THROW(ring.commit(chunk.k_view, chunk.v_view, 0));
  EXPECT_EQ(ring.end(), 2);
}

/// A sequence that goes back writes its slots anew; the others hold what was there, up to the spare ones.
TEST(RingCache, GoesBackByItsSpareSlots) {
  RingCache<float> ring(1, 8, 4, 3);
  const auto commit = [&](std::int64_t position, std::int64_t n_new) {
    const Chunk chunk(position, n_new, 1, 4);
    ring.commit(chunk.k_view, chunk.v_view, position);
  };
  commit(0, 20);
  commit(18, 1);
  EXPECT_EQ(ring.end(), 19);
  EXPECT_TRUE(refuses([&] { commit(16, 1); }, {"position 16", "ends at 19", "been at 20", "go back 3"}));
  EXPECT_TRUE(refuses([&] { commit(20, 1); }, {"position 20", "ends at 19"}));
  commit(17, 2);
  for (std::int64_t position = 12; position < 20; ++position) {  // all of the last 8 are there
    EXPECT_EQ(ring.k()(0, ring_slot(position, 8), 1), k_value(position, 0, 1)) << position;
  }
  ring.reset();
  EXPECT_NO_THROW(commit(0, 1));
  EXPECT_TRUE(refuses([] { RingCache<float>(1, 3, 4, 3); }, {"n_spare 3", "ring_len - 1 = 2"}));
}

TEST(RingCache, RefusesMisuseAndKeepsItsContent) {
  RingCache<float> ring(2, 3, 4);
  const Chunk first(0, 3, 2, 4), other_heads(3, 2, 1, 4), other_dim(3, 2, 2, 8), good(3, 2, 2, 4), longer(3, 3, 2, 4);
  ring.commit(first.k_view, first.v_view, 0);
  EXPECT_TRUE(refuses([&] { ring.commit(good.k_view, good.v_view, 4); }, {"position 4", "ends at 3", "reset()"}));
  EXPECT_TRUE(refuses([&] { ring.commit(good.k_view, good.v_view, 0); }, {"position 0", "ends at 3"}));
  EXPECT_TRUE(refuses([&] { ring.commit(other_heads.k_view, good.v_view, 3); }, {"k_new", "1", "need 2"}));
  EXPECT_TRUE(refuses([&] { ring.commit(good.k_view, other_dim.v_view, 3); }, {"v_new", "8", "need 4"}));
  EXPECT_TRUE(refuses([&] { ring.commit(good.k_view, longer.v_view, 3); }, {"v_new", "3", "need 2"}));
  EXPECT_EQ(ring.end(), 3);
  for (std::int64_t slot = 0; slot < 3; ++slot) EXPECT_EQ(ring.k()(1, slot, 2), k_value(slot, 1, 2));
  EXPECT_TRUE(refuses([] { RingCache<float>(0, 3, 4); }, {"n_head_kv 0"}));
  EXPECT_TRUE(refuses([] { RingCache<float>(1, 0, 4); }, {"ring_len 0"}));
  EXPECT_TRUE(refuses([] { RingCache<float>(1, 3, 0); }, {"head_dim 0"}));
}

}  // namespace
}  // namespace gemma4::reference
