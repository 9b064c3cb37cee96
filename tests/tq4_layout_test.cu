// SPDX-License-Identifier: Apache-2.0
#include "cuda/tq4_cache/layout.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <set>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/launch.cuh"
#include "reference/tq4_cache.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

TEST(Tq4LayoutPlan, EveryCodeHasOnePlaceAndComesBack) {
  for (const int head_dim : {64, 128, 256, 512}) {
    std::set<std::pair<int, int>> k_places, v_places;
    for (int token = 0; token < kTq4RecordTokens; ++token) {
      for (int dim = 0; dim < head_dim; ++dim) {
        const Tq4Place k = tq4_k_place(head_dim, token, dim), v = tq4_v_place(token, dim);
        ASSERT_EQ(tq4_k_source(head_dim, k.word, k.element), (Tq4Source{token, dim}));
        ASSERT_EQ(tq4_v_source(v.word, v.element), (Tq4Source{token, dim}));
        ASSERT_LT(k.word, 2 * head_dim);
        ASSERT_LT(v.word, 2 * head_dim);
        k_places.insert({k.word, k.element});
        v_places.insert({v.word, v.element});
      }
    }
    EXPECT_EQ(k_places.size(), 16u * static_cast<unsigned>(head_dim));
    EXPECT_EQ(v_places.size(), 16u * static_cast<unsigned>(head_dim));
  }
}

TEST(Tq4LayoutPlan, ElementsOfAWordAreDisjointAndHoldEveryIndex) {
  std::uint32_t all = 0;
  for (int element = 0; element < 8; ++element) {
    EXPECT_EQ(all & tq4_element_mask(element), 0u);
    all |= tq4_element_mask(element);
    for (int index = 0; index < 16; ++index) {
      const std::uint32_t bits = tq4_element_bits(element, index);
      EXPECT_EQ(bits & ~tq4_element_mask(element), 0u);
      EXPECT_EQ(tq4_element_index(bits, element), index);
      EXPECT_EQ(tq4_element_index(bits | ~tq4_element_mask(element), element), index) << "the others do not matter";
    }
  }
  EXPECT_EQ(all, 0xFFFFFFFFu);
}

template <class T16>
__global__ void decode_kernel(const std::uint32_t* words, LevelTable table, T16* out) {
  std::uint32_t pairs[4];
  decode_word(words[threadIdx.x], table, pairs);
  for (int p = 0; p < 4; ++p) reinterpret_cast<std::uint32_t*>(out)[threadIdx.x * 4 + p] = pairs[p];
}

/// Every index in every element, for tables of 2, 3 and 4 bits in both types. Control: a flipped bit shows.
template <class T16>
void decode_every_index() {
  for (const int bits : {2, 3, 4}) {
    const Codebook book = solve_codebook(CodebookKind::kFull, bits, 512);
    std::vector<std::uint32_t> words(256);
    for (std::size_t w = 0; w < words.size(); ++w) {
      for (int e = 0; e < 8; ++e)
        words[w] |= tq4_element_bits(e, static_cast<int>(w * 7 + w / 16 + 3u * e) % book.n_level);
    }
    const DeviceBuffer<std::uint32_t> in(words);
    DeviceBuffer<T16> out(8 * 256);
    detail::Launch{.what = "decode_kernel", .block = 256}(decode_kernel<T16>, in.data(), level_table<T16>(book),
                                                          out.data());
    const std::vector<T16> levels = out.to_host();
    for (std::size_t w = 0; w < words.size(); ++w) {
      for (int e = 0; e < 8; ++e) {
        const int index = tq4_element_index(words[w], e);
        const T16 expected = from_float<T16>(book.centroids[static_cast<std::size_t>(index)]);
        ASSERT_EQ(levels[8 * w + static_cast<std::size_t>(e)].bits, expected.bits) << bits << " bits, " << index;
        ASSERT_NE(tq4_element_index(words[w] ^ (1u << (4 * e)), e), index);
      }
    }
  }
}

TEST(Tq4Layout, DecodeWordGivesTheLevelsInFp16) {
  decode_every_index<F16>();
}
TEST(Tq4Layout, DecodeWordGivesTheLevelsInBf16) {
  decode_every_index<Bf16>();
}

template <class T16>
__global__ void decode_bytes_kernel(const std::uint32_t* words, ByteLevels levels, std::uint32_t two_16,
                                    std::uint32_t sixteen, T16* out) {
  std::uint32_t pairs[4];
  decode_word_bytes(words[threadIdx.x], levels.bytes, two_16, sixteen, pairs);
  for (int p = 0; p < 4; ++p) reinterpret_cast<std::uint32_t*>(out)[threadIdx.x * 4 + p] = pairs[p];
}

/// In fp16 a decoded word is the levels times 2^-24, in bf16 times 2^-133, exactly; and the levels are the codebook's
/// within 2^-8. Control: the other unit.
TEST(Tq4Layout, DecodeWordBytesGivesTheRoundedLevels) {
  const Codebook book = solve_codebook(CodebookKind::kFull, 4, 512);
  const std::optional<ByteLevels> levels = byte_levels(book);
  ASSERT_TRUE(levels.has_value());
  const Codebook rounded = rounded_codebook(book, *levels);
  std::vector<std::uint32_t> words(256);
  for (std::size_t w = 0; w < words.size(); ++w) words[w] = static_cast<std::uint32_t>(w) * 2654435761u;
  const DeviceBuffer<std::uint32_t> in(words);
  DeviceBuffer<F16> f16(8 * 256);
  DeviceBuffer<Bf16> bf16(8 * 256);
  const detail::Launch launch{.what = "decode_bytes_kernel", .block = 256};
  launch(decode_bytes_kernel<F16>, in.data(), *levels, 65536, 16, f16.data());
  launch(decode_bytes_kernel<Bf16>, in.data(), *levels, 65536, 16, bf16.data());
  const std::vector<F16> half = f16.to_host();
  const std::vector<Bf16> brain = bf16.to_host();
  for (std::size_t i = 0; i < half.size(); ++i) {
    const auto index = static_cast<std::size_t>(tq4_element_index(words[i / 8], static_cast<int>(i % 8)));
    const double unit_half = std::ldexp(static_cast<double>(to_float(half[i])), 24) * levels->step;
    const double unit_brain = std::ldexp(static_cast<double>(to_float(brain[i])), 133) * levels->step;
    EXPECT_TRUE(close(unit_half, rounded.centroids[index], 1e-7));
    EXPECT_TRUE(close(unit_brain, rounded.centroids[index], 1e-7));
    EXPECT_FALSE(close(2 * unit_brain, rounded.centroids[index], 1e-7));
  }
}

TEST(Tq4LayoutPlan, ByteLevelsAreAsGoodAsBf16OrAbsent) {
  for (const CodebookKind kind : {CodebookKind::kFull, CodebookKind::kCutAtThreeSigma}) {
    for (const std::int64_t head_dim : {64, 128, 256, 512}) {
      const Codebook book = solve_codebook(kind, 4, head_dim);
      const std::optional<ByteLevels> levels = byte_levels(book);
      ASSERT_TRUE(levels.has_value());
      const Codebook rounded = rounded_codebook(book, *levels);
      for (std::size_t i = 0; i < 16; ++i) {
        EXPECT_TRUE(close(rounded.centroids[i] / book.centroids[i], 1.0, 0x1p-8)) << i;
      }
      EXPECT_LE(codebook_distortion(rounded, head_dim), 1.002 * codebook_distortion(book, head_dim));
    }
  }
  EXPECT_FALSE(byte_levels(solve_codebook(CodebookKind::kFull, 3, 512)).has_value());
  Codebook spread = solve_codebook(CodebookKind::kFull, 4, 512);  // a level of 1/600 of the largest is no whole number
  spread.centroids[8] = spread.centroids[15] / 600;
  spread.centroids[7] = -spread.centroids[8];
  EXPECT_FALSE(byte_levels(spread).has_value());
}

/// A cache of random bytes in the shared format, and device copies of it.
struct RandomCache {
  reference::Tq4CacheBuffer host;
  DeviceBuffer<std::uint8_t> k_codes, v_codes;
  DeviceBuffer<Tq4Norm> k_norm, v_norm;

  RandomCache(std::int64_t batch, std::int64_t n_head_kv, std::int64_t buffer_len, std::int64_t head_dim,
              std::uint32_t seed)
      : host(batch, n_head_kv, buffer_len, head_dim) {
    std::uint32_t state = seed * 2654435761u + 1;
    const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
    for (std::uint8_t& byte : host.k_codes()) byte = static_cast<std::uint8_t>(next());
    for (std::uint8_t& byte : host.v_codes()) byte = static_cast<std::uint8_t>(next());
    for (Tq4Norm& norm : host.k_norm()) norm.bits = static_cast<std::uint16_t>(next());
    for (Tq4Norm& norm : host.v_norm()) norm.bits = static_cast<std::uint16_t>(next());
    k_codes = DeviceBuffer<std::uint8_t>(std::span<const std::uint8_t>(host.k_codes()));
    v_codes = DeviceBuffer<std::uint8_t>(std::span<const std::uint8_t>(host.v_codes()));
    k_norm = DeviceBuffer<Tq4Norm>(std::span<const Tq4Norm>(host.k_norm()));
    v_norm = DeviceBuffer<Tq4Norm>(std::span<const Tq4Norm>(host.v_norm()));
  }
  [[nodiscard]] Tq4CacheView view() {
    const CacheShape& s = host.shape();
    return {make_view(k_codes.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim / 2),
            make_view(v_codes.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim / 2),
            make_view(k_norm.data(), s.batch, s.n_head_kv, s.buffer_len),
            make_view(v_norm.data(), s.batch, s.n_head_kv, s.buffer_len)};
  }
  void take_from_device() {
    std::ranges::copy(k_codes.to_host(), host.k_codes().begin());
    std::ranges::copy(v_codes.to_host(), host.v_codes().begin());
    std::ranges::copy(k_norm.to_host(), host.k_norm().begin());
    std::ranges::copy(v_norm.to_host(), host.v_norm().begin());
  }
};

/// Any bytes, also those that no compressor writes, survive the way into records and back. Control: other bytes differ.
RC_GTEST_PROP(Tq4Layout, RecordsLoseNothing, ()) {
  const auto head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512);
  const auto batch = *rc::gen::inRange<std::int64_t>(1, 3), n_head_kv = *rc::gen::inRange<std::int64_t>(1, 4);
  const auto buffer_len = *rc::gen::inRange<std::int64_t>(1, 70);
  const auto seed = *rc::gen::inRange<std::uint32_t>(0, 1 << 20);
  RandomCache from(batch, n_head_kv, buffer_len, head_dim, seed), to(batch, n_head_kv, buffer_len, head_dim, seed + 1);
  DeviceBuffer<std::byte> memory(tq4_cache_bytes(batch, n_head_kv, buffer_len, head_dim));
  memory.fill_bytes(0xFF);
  const Tq4Records records{memory.data(), batch, n_head_kv, buffer_len, head_dim};
  RC_ASSERT(records.bytes() == memory.bytes());
  RC_ASSERT(!(from.host == to.host));
  tq4_rows_to_records(from.view(), records, nullptr);
  tq4_records_to_rows(records, to.view(), nullptr);
  to.take_from_device();
  RC_ASSERT(from.host == to.host);
}

TEST(Tq4LayoutPlan, RefusesWhatDoesNotFit) {
  std::vector<std::byte> memory(1 << 16);
  reference::Tq4CacheBuffer rows(1, 2, 20, 64);
  Tq4Records good{memory.data(), 1, 2, 20, 64};
  const auto call = [&](auto break_it) {
    return [&, break_it] {
      Tq4Records records = good;
      break_it(records);
      tq4_rows_to_records(rows.view(), records, nullptr);
    };
  };
  EXPECT_TRUE(refuses(call([](Tq4Records& r) { r.data = nullptr; }), {"no memory"}));
  EXPECT_TRUE(refuses(call([](Tq4Records& r) { r.data += 8; }), {"modulo 16"}));
  EXPECT_TRUE(refuses(call([](Tq4Records& r) { r.head_dim = 96; }), {"head_dim 96"}));
  EXPECT_TRUE(refuses(call([](Tq4Records& r) { r.buffer_len = 0; }), {"at least 1"}));
  EXPECT_TRUE(refuses(call([](Tq4Records& r) { r.buffer_len = 21; }), {"k_codes", "20", "21"}));
  Codebook skewed = solve_codebook(CodebookKind::kFull, 4, 64);
  skewed.centroids[3] *= 1.01f;
  EXPECT_TRUE(refuses([&] { (void)level_table<Bf16>(skewed); }, {"symmetric"}));
}

}  // namespace
}  // namespace gemma4::cuda
