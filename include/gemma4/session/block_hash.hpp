// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

/// A checksum of blocks that are read once, at the speed of memory. It finds accidents; it is no defence against a
/// forger.
namespace gemma4 {

namespace detail {

inline constexpr std::uint64_t kHashOdd = 0x9E3779B97F4A7C15u;  ///< 2^64 over the golden ratio, odd
inline constexpr std::uint64_t kHashMix = 0x6A09E667F3BCC909u;  ///< 2^64 times what sqrt(2) is above 1, odd

/// One to one in `state` for a given word, and in `word` for a given state: xor, a turn, and a product with an odd
/// number.
[[nodiscard]] constexpr std::uint64_t hash_step(std::uint64_t state, std::uint64_t word) {
  return std::rotl(state ^ word, 29) * kHashOdd;
}

/// One to one too; each bit of the result hangs on all of `state`.
[[nodiscard]] constexpr std::uint64_t hash_finish(std::uint64_t state) {
  state = (state ^ state >> 32) * kHashMix;
  state = (state ^ state >> 29) * kHashOdd;
  return state ^ state >> 32;
}

}  // namespace detail

/// 64 bits of `bytes`, of their number, and of `seed`, which tells blocks with the same bytes apart.
///
/// Eight lanes take the eight words of each 64 bytes, little endian, the last words padded with zeros; then the lanes
/// and the length go into one. Every step is one to one in what it takes in, so that a change within one aligned word
/// of 8 bytes, a flipped byte for one, changes the result for certain. Any other change escapes with probability 2^-64,
/// as far as a hash without a proof is random.
[[nodiscard]] inline std::uint64_t block_hash(std::span<const std::byte> bytes, std::uint64_t seed) {
  // Numbers, not names of this scope: nvcc writes the type so wherever it meets an array of eight words again.
  constexpr std::size_t kLanes = 8, kStripe = 64;
  std::array<std::uint64_t, 8> lane{};
  for (std::size_t i = 0; i < kLanes; ++i) lane[i] = detail::hash_finish(seed + i * detail::kHashMix);
  const auto take = [&](const std::byte* from) {
    std::array<std::uint64_t, 8> words;
    std::memcpy(words.data(), from, kStripe);
    for (std::size_t i = 0; i < kLanes; ++i) lane[i] = detail::hash_step(lane[i], words[i]);
  };
  std::size_t done = 0;
  for (; bytes.size() - done >= kStripe; done += kStripe) take(bytes.data() + done);
  if (done < bytes.size()) {
    std::array<std::byte, 64> rest{};
    std::memcpy(rest.data(), bytes.data() + done, bytes.size() - done);
    take(rest.data());
  }
  std::uint64_t state = bytes.size();
  for (const std::uint64_t value : lane) state = detail::hash_step(state, value);
  return detail::hash_finish(state);
}

}  // namespace gemma4
