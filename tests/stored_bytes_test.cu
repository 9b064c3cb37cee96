// SPDX-License-Identifier: Apache-2.0
#include "cuda/backend/stored_bytes.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"

/// Bytes of caches between device and host: pieces of any length at any place, in the order of a stream that has other
/// work before them.
namespace gemma4::cuda {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::size_t kRoom = std::size_t{3} << 20;  ///< more than there are slots for
constexpr std::size_t kLengths[] = {1, 100, (1 << 18) - 1, 1 << 18, (1 << 18) + 1, 1 << 20, (1 << 20) + 7, kRoom};

Bytes random_bytes(std::size_t count, std::uint32_t seed) {
  std::mt19937 random(seed);
  Bytes bytes(count);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

/// A device whose stream is behind: what is put into it now is done later.
struct Late {
  Late() : memory(static_cast<std::int64_t>(kRoom)), ballast(std::int64_t{64} << 20) {}
  void fall_behind() {
    for (int i = 0; i < 20; ++i) {
      check(cudaMemsetAsync(ballast.data(), i, static_cast<std::size_t>(ballast.bytes()), stream), "fill");
    }
  }
  [[nodiscard]] Bytes held() const { return memory.to_host(stream); }
  Stream stream;
  DeviceBuffer<std::byte> memory, ballast;
  StoredBytes stored;
};

TEST(StoredBytes, WhatIsSetIsThereForWhateverComesLater) {
  Late late;
  Bytes expected(kRoom);
  late.stored.set(late.memory.data(), expected, late.stream);
  std::uint32_t seed = 1;
  for (const std::size_t length : kLengths) {
    const std::size_t at = (kRoom - length) / 2;
    const Bytes from = random_bytes(length, seed++);
    std::ranges::copy(from, expected.begin() + static_cast<std::ptrdiff_t>(at));
    late.fall_behind();
    Bytes lent = from;
    late.stored.set(late.memory.data() + at, lent, late.stream);
    std::ranges::fill(lent, std::byte{0});  // the caller's again
    EXPECT_TRUE(late.held() == expected) << length << " B at " << at;
  }
}

TEST(StoredBytes, WhatIsCopiedIsThereAtOnce) {
  Late late;
  const Bytes whole = random_bytes(kRoom, 9);
  for (const std::size_t length : kLengths) {
    const std::size_t at = (kRoom - length) / 3;
    late.stored.set(late.memory.data(), Bytes(kRoom, std::byte{0x5A}), late.stream);
    late.fall_behind();
    late.stored.set(late.memory.data(), whole, late.stream);
    Bytes found(length + 1, std::byte{0xEE});
    late.stored.copy(late.memory.data() + at, std::span(found).first(length), late.stream);
    EXPECT_EQ(found.back(), std::byte{0xEE}) << "behind " << length << " B";
    found.pop_back();
    EXPECT_TRUE(std::ranges::equal(found, std::span(whole).subspan(at, length))) << length << " B from " << at;
  }
  late.stored.copy(late.memory.data(), {}, late.stream);
}

}  // namespace
}  // namespace gemma4::cuda
