// SPDX-License-Identifier: Apache-2.0
#include "cuda/kv_cache/layout.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <set>
#include <tuple>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/kv_cache.cuh"
#include "cuda/kv_cache/levels.cuh"
#include "gemma4/kv_format.hpp"
#include "gemma4/rotation.hpp"

// The device layout of one vector for K and V, and the levels that decode reads.
namespace gemma4::cuda {
namespace {

TEST(KvLayoutPlan, EveryCodeHasOnePlaceAndComesBack) {
  for (const int n : {16, 32, 64, 128, 256, 512}) {
    std::set<std::tuple<int, int, int>> places;
    for (int token = 0; token < kKvRecordTokens; ++token) {
      for (int dim = 0; dim < n; ++dim) {
        const KvPlace at = kv_place(n, token, dim);
        ASSERT_EQ(kv_source(n, at), (KvSource{token, dim})) << n << ": token " << token << ", dim " << dim;
        ASSERT_TRUE(at.group >= 0 && at.group < n / 2 && at.word >= 0 && at.word < 4 && at.element >= 0 &&
                    at.element < 8)
            << n << ": group " << at.group << ", word " << at.word << ", element " << at.element;
        places.insert({at.group, at.word, at.element});
      }
    }
    EXPECT_EQ(places.size(), 16u * static_cast<unsigned>(n)) << n;
  }
}

/// Each bit of a set belongs to one code: flipping it changes that code and no other.
TEST(KvLayoutPlan, EveryBitBelongsToOneCode) {
  for (const int n : {16, 32, 64, 128}) {
    for (const int bits : {3, 4, 5, 6}) {
      const KvSet set{n, bits};
      std::vector<std::uint32_t> words(static_cast<std::size_t>(kv_set_bytes(n, bits) / 4));
      const auto codes = [&] {
        std::vector<int> all;
        for (int token = 0; token < 16; ++token) {
          for (int dim = 0; dim < n; ++dim) all.push_back(set.code(words.data(), kv_place(n, token, dim)));
        }
        return all;
      };
      const std::vector<int> zeros = codes();
      std::multiset<std::size_t> changed;
      for (std::size_t bit = 0; bit < 32 * words.size(); ++bit) {
        words[bit / 32] = 1u << (bit % 32);
        const std::vector<int> now = codes();
        words[bit / 32] = 0;
        std::size_t n_changed = 0;
        for (std::size_t i = 0; i < now.size(); ++i) {
          ASSERT_LT(now[i], 1 << bits);
          if (now[i] == zeros[i]) continue;
          ++n_changed;
          changed.insert(i);
        }
        ASSERT_EQ(n_changed, 1u) << n << " values of " << bits << " bits, bit " << bit;
      }
      for (std::size_t i = 0; i < zeros.size(); ++i) ASSERT_EQ(changed.count(i), static_cast<std::size_t>(bits)) << i;
    }
  }
}

TEST(KvLayoutPlan, BytesAreThoseOfTheFormat) {
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    for (const char* name : {"kv5r4", "kv4r4", "kv6r5", "kv3r3", "kv3r6", "kv16r16"}) {
      const KvFormat format = *KvFormat::parse(name);
      const std::int64_t row = format.allocated_row_bytes(CacheSide::kKey, head_dim) +
                               format.allocated_row_bytes(CacheSide::kValue, head_dim);
      EXPECT_EQ(kv_record_bytes(head_dim, format.options.v_bits, format.options.r_bits), 16 * row) << name;
      EXPECT_EQ(kv_cache_bytes(1, 4, 131072, head_dim, format.options), 4 * 131072 * row) << name;
    }
  }
}

/// A level moves by at most half a step, neighbours that one selector reads lie on one side of 127, and the error of
/// quantising grows by less than the share of a step squared that the format can bear: 12 (step / cell)^2 of it, the
/// narrowest cell of 5 bits being 16 steps and that of 6 bits 4.
TEST(KvLevelsPlan, BytesAreNearTheCodebook) {
  for (const CodebookKind kind : {CodebookKind::kFull, CodebookKind::kCutAtThreeSigma}) {
    for (const int bits : {3, 4, 5, 6}) {
      for (const std::int64_t n : {16, 128, 512}) {
        const KvCodebook book = solve_kv_codebook(kind, bits, n);
        const KvByteLevels bytes = kv_byte_levels(book);
        const KvCodebook read = read_kv_codebook(book, bytes);
        for (int i = 0; i < book.n_half; ++i) {
          EXPECT_LE(std::abs(read.level[i] - book.level[i]), 0.51f * bytes.step) << bits << " bits, level " << i;
          EXPECT_TRUE(bytes.magnitude[i] > 0 && bytes.magnitude[i] < 256) << bytes.magnitude[i];
          if (bits >= 5 && i % 2 == 1) {
            EXPECT_EQ(bytes.magnitude[i] > 127, bytes.magnitude[i - 1] > 127) << i;
          }
        }
        EXPECT_LT(bytes.step * 160.0f, 1.01f * book.level[book.n_half - 1]);
      }
    }
  }
}

template <int kBits, int kWord>
__global__ void decode_words_kernel(const std::uint32_t* nibbles, const std::uint32_t* signs,
                                    const std::uint32_t* extra, KvDecodeTable table, KvShifts shifts,
                                    std::uint16_t* out) {
  std::uint32_t pairs[4];
  decode_kv_word<kBits, kWord>(nibbles[threadIdx.x], signs[threadIdx.x], extra[threadIdx.x], table, shifts, pairs);
  for (int p = 0; p < 4; ++p) reinterpret_cast<std::uint32_t*>(out)[threadIdx.x * 4 + p] = pairs[p];
}

template <int kBits, int kWord>
void expect_words_decode() {
  const KvByteLevels bytes = kv_byte_levels(solve_kv_codebook(CodebookKind::kFull, kBits, 512));
  KvDecodeTable table{};
  for (int x = 0; x < 2; ++x) {
    for (int i = 0; i < 2; ++i) table.even[x][i] = bytes.even[x][i], table.odd[x][i] = bytes.odd[x][i];
  }
  constexpr int kThreads = 256;
  std::vector<std::uint32_t> nibbles, signs, extra;
  std::uint64_t state = 99;
  const auto next = [&] { return static_cast<std::uint32_t>((state = mix_bits(state + 1)) >> 16); };
  for (int i = 0; i < kThreads; ++i) nibbles.push_back(next()), signs.push_back(next()), extra.push_back(next());
  if (kBits == 3) {
    for (std::uint32_t& word : nibbles) word &= 0x33333333u;
  }
  const DeviceBuffer<std::uint32_t> n(nibbles), s(signs), x(extra);
  DeviceBuffer<std::uint16_t> out(8 * kThreads);
  detail::Launch{.what = "decode_words_kernel", .block = kThreads}(decode_words_kernel<kBits, kWord>, n.data(),
                                                                   s.data(), x.data(), table, KvShifts{}, out.data());
  const std::vector<std::uint16_t> got = out.to_host();
  // A set of one group that holds the same bits: the layout's own reading of them.
  for (std::size_t i = 0; i < kThreads; ++i) {
    for (int e = 0; e < 8; ++e) {
      const KvPlace at{0, kWord, e};
      const KvSet set{2, kBits};  // one group: planes follow each other word by word
      std::uint32_t words[6] = {};
      if (kBits == 3) {
        words[kWord >> 1] = nibbles[i] << (2 * (kWord & 1));
        words[2] = signs[i];
      } else {
        words[kWord] = nibbles[i];
        words[4] = signs[i], words[5] = extra[i];
      }
      const int code = set.code(words, at), magnitude = code & ((1 << (kBits - 1)) - 1);
      const unsigned expected =
          static_cast<unsigned>(bytes.magnitude[magnitude]) | (set.is_negative(code) ? 0x8000u : 0u);
      ASSERT_EQ(got[8 * i + static_cast<std::size_t>(e)], expected)
          << kBits << " bits, word " << kWord << ", element " << e << ", code " << code << ", nibbles " << nibbles[i];
    }
  }
}

TEST(KvLevelsGpu, EveryWordDecodesToTheBytesOfItsCodes) {
  expect_words_decode<3, 0>(), expect_words_decode<3, 1>(), expect_words_decode<3, 2>(), expect_words_decode<3, 3>();
  expect_words_decode<4, 0>(), expect_words_decode<4, 3>();
  expect_words_decode<5, 0>(), expect_words_decode<5, 1>(), expect_words_decode<5, 2>(), expect_words_decode<5, 3>();
  expect_words_decode<6, 0>(), expect_words_decode<6, 1>(), expect_words_decode<6, 2>(), expect_words_decode<6, 3>();
}

}  // namespace
}  // namespace gemma4::cuda
