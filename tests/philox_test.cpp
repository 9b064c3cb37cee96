// SPDX-License-Identifier: Apache-2.0
#include "gemma4/philox.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>

#include "tests/support/property.hpp"

namespace {

using namespace gemma4;

bool same(const PhiloxWords& a, const PhiloxWords& b) {
  return a.word[0] == b.word[0] && a.word[1] == b.word[1] && a.word[2] == b.word[2] && a.word[3] == b.word[3];
}

// The known answers that the authors of the generator publish with it (philox4x32, 10 rounds).
TEST(Philox, GivesThePublishedAnswers) {
  constexpr std::uint32_t kOnes = 0xFFFFFFFFu;
  EXPECT_TRUE(same(philox({{0, 0, 0, 0}}, {{0, 0}}), {{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}}));
  EXPECT_TRUE(same(philox({{kOnes, kOnes, kOnes, kOnes}}, {{kOnes, kOnes}}),
                   {{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}}));
  EXPECT_TRUE(same(philox({{0x243f6a88u, 0x85a308d3u, 0x13198a2eu, 0x03707344u}}, {{0xa4093822u, 0x299f31d0u}}),
                   {{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}}));
}

static_assert(philox({{0, 0, 0, 0}}, {{0, 0}}).word[0] == 0x6627e8d5u, "philox is a constant expression");

TEST(Philox, TheSeedFillsBothWordsOfTheKey) {
  EXPECT_EQ(philox_key(0x0123456789abcdefu).word[0], 0x89abcdefu);
  EXPECT_EQ(philox_key(0x0123456789abcdefu).word[1], 0x01234567u);
}

// Flipping one bit of the counter or key flips each output bit with probability 1/2: of 128, Binomial(128, 1/2) flip,
// which leaves [24, 104] with probability below 2 exp(-2 * 40^2 / 128) = 3e-11 (Hoeffding), each time.
RC_GTEST_PROP(Philox, EveryInputBitCounts, ()) {
  const auto any_words = [] {
    return PhiloxWords{{*rc::gen::arbitrary<std::uint32_t>(), *rc::gen::arbitrary<std::uint32_t>(),
                        *rc::gen::arbitrary<std::uint32_t>(), *rc::gen::arbitrary<std::uint32_t>()}};
  };
  PhiloxWords counter = any_words();
  PhiloxKey key{{*rc::gen::arbitrary<std::uint32_t>(), *rc::gen::arbitrary<std::uint32_t>()}};
  const PhiloxWords before = philox(counter, key);
  const int bit = *rc::gen::inRange(0, 192);
  std::uint32_t& word = bit < 128 ? counter.word[bit / 32] : key.word[bit / 32 - 4];
  word ^= 1u << (bit % 32);
  const PhiloxWords after = philox(counter, key);
  int flipped = 0;
  for (int i = 0; i < 4; ++i) flipped += std::popcount(before.word[i] ^ after.word[i]);
  RC_ASSERT(flipped >= 24);
  RC_ASSERT(flipped <= 104);
}

TEST(Philox, UniformsStayInsideTheOpenInterval) {
  const double least = open_uniform({{0, 0, 0, 0}}), most = open_uniform({{~0u, ~0u, 0, 0}});
  EXPECT_EQ(least, std::ldexp(1.0, -53));
  EXPECT_EQ(most, 1.0 - std::ldexp(1.0, -53));
  EXPECT_LT(most, 1.0);
  EXPECT_EQ(open_uniform({{0, 1u << 31, 0, 0}}), 0.5 + std::ldexp(1.0, -53));
}

}  // namespace
