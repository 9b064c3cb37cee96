// SPDX-License-Identifier: Apache-2.0
#include "cuda/kv_cache.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <set>
#include <tuple>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "reference/kv_cache.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/close.hpp"
#include "tests/support/kv_device.cuh"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

// The device layout of one vector for K and V, the levels that decode reads, the update, and K and V rebuilt.
namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::KvCacheBuffer;
using reference::Matrix;

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
  decode_words_kernel<kBits, kWord><<<1, kThreads>>>(n.data(), s.data(), x.data(), table, {}, out.data());
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

KvOptions some_options(std::uint64_t seed) {
  return {.codebook = *rc::gen::element(CodebookKind::kFull, CodebookKind::kCutAtThreeSigma),
          .norm = *rc::gen::element(NormKind::kCorrected, NormKind::kRaw),
          .v_bits = *rc::gen::inRange(3, 7),
          .r_bits = *rc::gen::inRange(3, 7),
          .seed = seed};
}

/// New tokens for a cache that already holds something in every row.
struct Update {
  CacheShape shape;
  KvOptions options;
  std::vector<std::int32_t> positions;
  std::vector<float> k, v, weight;  ///< [batch, n_new, n_head_kv, head_dim], exact in bf16
  KvCacheBuffer before;

  Update(const CacheShape& s, const KvOptions& format, std::vector<std::int32_t> where, std::uint64_t seed)
      : shape(s),
        options(format),
        positions(std::move(where)),
        weight(draw_k_weight(s.head_dim, seed + 5)),
        before(s.batch, s.n_head_kv, s.buffer_len, kv_code_bytes(s.head_dim, format.v_bits),
               kv_code_bytes(kv_rotated_size(s.head_dim), format.r_bits)) {
    const auto n_new = static_cast<std::int64_t>(positions.size());
    k = draw(seed, s.batch * n_new * s.n_head_kv * s.head_dim, 3.0f);
    v = draw(seed + 1, s.batch * n_new * s.n_head_kv * s.head_dim, 0.3f);
    std::uint32_t state = static_cast<std::uint32_t>(seed) | 1u;
    const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
    for (std::uint8_t& byte : before.v_codes()) byte = static_cast<std::uint8_t>(next());
    for (std::uint8_t& byte : before.r_codes()) byte = static_cast<std::uint8_t>(next());
    for (KvNorm& norm : before.v_norm()) norm.bits = static_cast<std::uint16_t>(next());
    for (KvNorm& norm : before.r_norm()) norm.bits = static_cast<std::uint16_t>(next());
  }
  template <class T>
  [[nodiscard]] View<const T, 4> view(const T* data) const {
    return make_view(data, shape.batch, static_cast<std::int64_t>(positions.size()), shape.n_head_kv, shape.head_dim);
  }
  /// What the reference makes of it.
  [[nodiscard]] KvCacheBuffer expected() const {
    KvCacheBuffer cache = before.clone();
    reference::kv_cache_update<float>(kv_codec_of<reference::KvCodec<float>>(shape.head_dim, options), view(k.data()),
                                      view(v.data()), weight, positions, cache.view());
    return cache;
  }
  /// What the device makes of it, from bf16 inputs.
  [[nodiscard]] KvCacheBuffer on_device() const {
    KvDeviceRows cache(before, shape.head_dim, options);
    const DeviceBuffer<Bf16> k_device(narrow(k)), v_device(narrow(v));
    const DeviceBuffer<float> w(weight);
    const DeviceBuffer<std::int32_t> where(positions);
    kv_cache_update<Bf16>(kv_codec_of<KvCodec>(shape.head_dim, options), view(k_device.data()), view(v_device.data()),
                          w.data(), {where.data(), where.size(), {}}, cache.records(), nullptr);
    return cache.to_host();
  }
  /// The rotated unit vector that row `t` of batch b and head h is quantised from, in double.
  [[nodiscard]] Matrix<double> rotated(bool is_v, std::int64_t b, std::int64_t t, std::int64_t h) const {
    const auto n_new = static_cast<std::int64_t>(positions.size());
    const std::int64_t n = is_v ? shape.head_dim : kv_rotated_size(shape.head_dim);
    const float* row = (is_v ? v : k).data() + ((b * n_new + t) * shape.n_head_kv + h) * shape.head_dim;
    Matrix<double> y(1, n);
    for (std::int64_t j = 0; j < n; ++j) {
      y(0, j) =
          is_v ? row[j] : row[kv_rotated_place(shape.head_dim, j)] / kv_rotated_scale(weight.data(), shape.head_dim, j);
    }
    y /= y.norm() == 0.0 ? 1.0 : y.norm();
    const auto& codec = kv_codec_of<reference::KvCodec<double>>(shape.head_dim, options);
    (is_v ? codec.v() : codec.r()).rotation().forward(y);
    return y;
  }
};

int code_of(const View<const std::uint8_t, 4>& codes, std::int64_t b, std::int64_t h, std::int64_t row, std::int64_t n,
            int bits, std::int64_t i) {
  int code = 0;
  for (int p = 0; p < bits; ++p) code |= ((codes(b, h, row, p * (n / 8) + i / 8) >> (i % 8)) & 1) << p;
  return code;
}

/// A code of a side as a place on the line: magnitudes up from zero, negative ones down.
int on_line(int code, int bits) {
  const int magnitude = code & ((1 << (bits - 1)) - 1);
  return (code >> (bits - 1)) != 0 ? -1 - magnitude : magnitude;
}

/// The caches agree, except for codes of values that lie within rounding of an edge, or of zero: such a code may be the
/// neighbour's, and the norm of its row then differs with it.
testing::AssertionResult same_but_for_ties(const KvCacheBuffer& actual, const KvCacheBuffer& expected,
                                           const Update& update) {
  const CacheShape& shape = update.shape;
  const auto& codec = kv_codec_of<reference::KvCodec<double>>(shape.head_dim, update.options);
  const ConstKvCacheView a = actual.view(), e = expected.view();
  std::int64_t n_tie = 0;
  for (const bool is_v : {true, false}) {
    const std::int64_t n = is_v ? shape.head_dim : kv_rotated_size(shape.head_dim);
    const int bits = is_v ? update.options.v_bits : update.options.r_bits;
    const KvCodebook& book = (is_v ? codec.v() : codec.r()).codebook();
    // x / |x| and the butterflies round log2(n) + 2 times, each relative to a partial sum of at most |x| = 1.
    const double slack = (std::log2(static_cast<double>(n)) + 3) * 0x1p-24;
    for (std::int64_t row = 0; row < shape.batch * shape.n_head_kv * shape.buffer_len; ++row) {
      const std::int64_t j = row % shape.buffer_len, h = row / shape.buffer_len % shape.n_head_kv,
                         b = row / shape.buffer_len / shape.n_head_kv;
      const auto found = std::find(update.positions.begin(), update.positions.end(), j);
      const bool is_new = found != update.positions.end();
      Matrix<double> y(1, n);
      if (is_new) y = update.rotated(is_v, b, found - update.positions.begin(), h);
      for (std::int64_t i = 0; i < n; ++i) {
        const int got = code_of(is_v ? a.v_codes : a.r_codes, b, h, j, n, bits, i);
        const int want = code_of(is_v ? e.v_codes : e.r_codes, b, h, j, n, bits, i);
        if (got == want) continue;
        const int low = std::min(on_line(got, bits), on_line(want, bits));
        const double edge = low >= 0 ? book.edge[low] : low == -1 ? 0.0 : -book.edge[-2 - low];
        const bool near =
            is_new && std::abs(on_line(got, bits) - on_line(want, bits)) == 1 && std::abs(y(0, i) - edge) <= slack;
        if (!near) {
          return testing::AssertionFailure() << (is_v ? "V" : "R") << " code " << i << " of row " << j << " (batch "
                                             << b << ", head " << h << "): " << got << ", expected " << want << ", y "
                                             << y(0, i) << ", edge " << edge << (is_new ? "" : "; the row is not new");
        }
        ++n_tie;
      }
      const KvNorm got = (is_v ? a.v_norm : a.r_norm)(b, h, j), want = (is_v ? e.v_norm : e.r_norm)(b, h, j);
      if (got.bits == want.bits) continue;
      // A tie moves |levels| by less than one step of 2^-10; otherwise the quotients differ in the last bits of a
      // double, and only an f16 tie can show it.
      const double quotient = to_float(got) / to_float(want);
      if (!(is_new && std::abs(quotient - 1.0) <= 0x1p-9)) {
        return testing::AssertionFailure() << (is_v ? "V" : "R") << " norm of row " << j << ": " << to_float(got)
                                           << ", expected " << to_float(want) << (is_new ? "" : "; the row is not new");
      }
    }
  }
  return testing::AssertionSuccess() << n_tie << " ties";
}

std::vector<std::int32_t> some_positions(std::int64_t buffer_len, std::int64_t count, std::uint64_t seed) {
  std::vector<std::int32_t> all(static_cast<std::size_t>(buffer_len));
  std::iota(all.begin(), all.end(), 0);
  for (std::size_t i = all.size(); i > 1; --i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    std::swap(all[i - 1], all[(seed >> 33) % i]);
  }
  all.resize(static_cast<std::size_t>(count));
  return all;
}

CacheShape some_shape() {
  return {*rc::gen::inRange<std::int64_t>(1, 3), *rc::gen::inRange<std::int64_t>(1, 4),
          *rc::gen::inRange<std::int64_t>(1, 60), *rc::gen::element<std::int64_t>(64, 128, 256, 512)};
}

/// Rows to records and back, whatever their bits.
RC_GTEST_PROP(KvCacheGpu, RecordsHoldTheBitsOfTheRows, ()) {
  const auto seed = *rc::gen::inRange<std::uint64_t>(1, 1 << 20);
  const Update update(some_shape(), some_options(seed % 3), {0}, seed);
  KvDeviceRows device(update.before, update.shape.head_dim, update.options);
  RC_ASSERT(device.to_host() == update.before);
  // Control: a bit of the first record's codes.
  std::vector<std::byte> bytes = device.memory().to_host();
  bytes[static_cast<std::size_t>(*rc::gen::inRange(0, 64))] ^= std::byte{16};
  device.memory().from_host(bytes);
  RC_ASSERT(update.shape.buffer_len < 16 || !(device.to_host() == update.before));
}

/// Any shape, any width, any set of positions in any order: the device writes what the reference writes, and every
/// other row keeps its bits (the comparison covers all of them). Control: without the update the caches differ.
RC_GTEST_PROP(KvCacheGpu, UpdateAgreesWithTheReference, ()) {
  const auto seed = *rc::gen::inRange<std::uint64_t>(1, 1 << 20);
  const CacheShape shape = some_shape();
  const auto count = *rc::gen::inRange<std::int64_t>(1, shape.buffer_len + 1);
  const Update update(shape, some_options(seed % 3), some_positions(shape.buffer_len, count, seed), seed);
  RC_LOG() << "kv" << update.options.v_bits << "r" << update.options.r_bits << ", head_dim " << shape.head_dim << ", "
           << count << " of " << shape.buffer_len;
  const KvCacheBuffer expected = update.expected(), actual = update.on_device();
  rc_require(same_but_for_ties(actual, expected, update));
  RC_ASSERT(!same_but_for_ties(update.before, expected, update));
}

/// Every width of each side at every head_dim, tokens that share words written at once.
TEST(KvCacheGpu, EveryWidthAgreesWithTheReference) {
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    for (int v_bits = 3; v_bits <= 6; ++v_bits) {
      for (int r_bits = 3; r_bits <= 6; ++r_bits) {
        const Update update({1, 2, 40, head_dim}, {.v_bits = v_bits, .r_bits = r_bits}, some_positions(40, 27, 8), 5);
        EXPECT_TRUE(same_but_for_ties(update.on_device(), update.expected(), update))
            << "kv" << v_bits << "r" << r_bits << ", head_dim " << head_dim;
      }
    }
  }
}

std::int64_t n_code_differences(const KvCacheBuffer& a, const KvCacheBuffer& b) {
  std::int64_t n = 0;
  for (std::int64_t i = 0; i < a.view().v_codes.size(); ++i) {
    n += a.view().v_codes.data[i] != b.view().v_codes.data[i] ? 1 : 0;
  }
  for (std::int64_t i = 0; i < a.view().r_codes.size(); ++i) {
    n += a.view().r_codes.data[i] != b.view().r_codes.data[i] ? 1 : 0;
  }
  return n;
}

TEST(KvCacheGpu, DenseRotationAgreesWithTheReference) {
  for (const std::int64_t head_dim : {64, 128}) {
    const KvOptions options{.rotation = RotationKind::kDenseHaar, .norm = NormKind::kRaw, .seed = 5};
    const Update update({1, 2, 40, head_dim}, options, some_positions(40, 23, 4), 6);
    const KvCacheBuffer expected = update.expected();
    // Products in another order: more values may lie within rounding of an edge, so count them instead.
    EXPECT_LE(n_code_differences(update.on_device(), expected), 10) << head_dim;
    EXPECT_GT(n_code_differences(update.before, expected), 1000) << head_dim << ": the control";
  }
}

/// The real shape: 2048 tokens of 4 heads, beginning in the middle of a record, the last of them at the end.
TEST(KvCacheGpu, RealChunkAgreesWithTheReference) {
  std::vector<std::int32_t> positions(2048);
  std::iota(positions.begin(), positions.end(), 2048 - 5);
  for (const KvOptions& options : {KvOptions{}, KvOptions{.v_bits = 4}}) {
    const Update update({1, 4, 4096, 512}, options, positions, 77);
    // Of 21 million bits of codes; a tie changes few of them.
    EXPECT_LE(n_code_differences(update.on_device(), update.expected()), 16) << options.v_bits;
  }
}

/// Vectors whose length a float square would lose, zeros and non-numbers: only their own row is affected.
TEST(KvCacheGpu, ExtremeVectorsAgreeWithTheReference) {
  std::vector<std::int32_t> positions(8);
  std::iota(positions.begin(), positions.end(), 3);
  Update update({1, 1, 16, 512}, {}, positions, 9);
  const float scale[8] = {1.0f, 0.0f, 1e-30f, 1e30f, 1e-38f, 1e4f, INFINITY, NAN};
  for (std::size_t t = 0; t < 8; ++t) {
    for (std::size_t i = 0; i < 512; ++i) {
      update.k[t * 512 + i] = to_float(to_bf16(update.k[t * 512 + i] * scale[t]));
      update.v[t * 512 + i] = to_float(to_bf16(update.v[t * 512 + i] * scale[t]));
    }
  }
  const KvCacheBuffer expected = update.expected(), actual = update.on_device();
  for (std::size_t row = 0; row < 16; ++row) {
    for (const bool is_v : {true, false}) {
      const KvNorm a = (is_v ? actual.view().v_norm : actual.view().r_norm).data[row],
                   e = (is_v ? expected.view().v_norm : expected.view().r_norm).data[row];
      if (row == 10) {
        EXPECT_TRUE(std::isnan(to_float(a))) << "the row of NaN has norm " << to_float(a);
        continue;
      }
      EXPECT_EQ(a.bits, e.bits) << row << ": " << to_float(a) << " for " << to_float(e);
      if (row == 9) continue;  // an infinity: its codes mean nothing
      const View<const std::uint8_t, 4>&got = is_v ? actual.view().v_codes : actual.view().r_codes,
                                     &want = is_v ? expected.view().v_codes : expected.view().r_codes;
      const auto n = static_cast<std::size_t>(want.extent[3]);
      for (std::size_t i = 0; i < n; ++i) ASSERT_EQ(got.data[row * n + i], want.data[row * n + i]) << row << ", " << i;
    }
  }
}

/// Positions that only the device knows: those outside the buffer touch nothing, not even memory around the cache.
TEST(KvCacheGpu, PositionsOutsideAreNotWritten) {
  const Update update({1, 2, 40, 256}, {}, {3, 7, 12, 39}, 2);
  KvDeviceRows cache(update.before, 256, update.options);
  const std::vector<std::byte> before = cache.memory().to_host();
  const DeviceBuffer<float> k(update.k), v(update.v), w(update.weight);
  const DeviceBuffer<std::int32_t> outside(std::vector<std::int32_t>{-1, 40, 47, 2147483647});
  const KvCodec& codec = kv_codec_of<KvCodec>(256, update.options);
  kv_cache_update<float>(codec, update.view(k.data()), update.view(v.data()), w.data(), {outside.data(), 4, {}},
                         cache.records(), nullptr);
  EXPECT_TRUE(cache.memory().to_host() == before);
  const DeviceBuffer<std::int32_t> inside(update.positions);
  kv_cache_update<float>(codec, update.view(k.data()), update.view(v.data()), w.data(), {inside.data(), 4, {}},
                         cache.records(), nullptr);
  EXPECT_FALSE(cache.memory().to_host() == before);
}

/// One captured launch serves every position.
TEST(KvCacheGpu, GraphReplaysAtNewPositions) {
  const Update update({1, 2, 50, 512}, {}, {0}, 3);
  KvDeviceRows replayed(update.before, 512, {}), eager(update.before, 512, {});
  const DeviceBuffer<float> k(update.k), v(update.v), w(update.weight);
  DeviceBuffer<std::int32_t> position(1);
  const Stream stream;
  const auto call = [&](KvDeviceRows& cache) {
    kv_cache_update<float>(kv_codec_of<KvCodec>(512), update.view(k.data()), update.view(v.data()), w.data(),
                           {position.data(), 1, {}}, cache.records(), stream);
  };
  const Graph graph = Graph::capture(stream, [&] { call(replayed); });
  EXPECT_EQ(graph.n_node(), 1u);
  for (const std::int32_t at : {0, 15, 16, 31, 49}) {
    position.from_host(std::span<const std::int32_t>(&at, 1), stream);
    graph.launch(stream);
    call(eager);
    stream.synchronize();
    ASSERT_TRUE(replayed.to_host() == eager.to_host()) << at;
  }
  EXPECT_FALSE(replayed.to_host() == update.before);
}

/// What kv_unpack() makes of a cache, [2, n_head_kv * rows, head_dim]: K, then V.
template <class TOut>
std::vector<std::vector<TOut>> unpacked(const KvCodec& codec, const ConstKvRecords& cache, const std::vector<float>& w,
                                        DeviceCount kv_len) {
  const std::int64_t rows = cache.n_record() * kKvRecordTokens, size = cache.n_head_kv * rows * cache.head_dim;
  DeviceBuffer<TOut> k(size), v(size);
  k.fill_bytes(0xFF);
  v.fill_bytes(0xFF);
  const DeviceBuffer<float> weight(w);
  kv_unpack<TOut>(codec, cache, 0, 0, cache.n_head_kv, weight.data(), kv_len, {k.data(), v.data(), rows}, nullptr);
  return {k.to_host(), v.to_host()};
}

/// K and V rebuilt are the reference's, up to the rounding of one product and the rotations; rows of records behind
/// kv_len are not written. Control: K for V.
RC_GTEST_PROP(KvCacheGpu, UnpackAgreesWithTheReference, ()) {
  const auto seed = *rc::gen::inRange<std::uint64_t>(1, 1 << 20);
  CacheShape shape = some_shape();
  shape.batch = 1;
  KvOptions options = some_options(seed % 3);
  options.rotation = *rc::gen::element(RotationKind::kSignedHadamard, RotationKind::kDenseHaar);
  const Update update(shape, options, some_positions(shape.buffer_len, shape.buffer_len, seed), seed);
  const KvCacheBuffer stored = update.expected();
  KvDeviceRows device(stored, shape.head_dim, options);
  const auto kv_len = *rc::gen::inRange<std::int64_t>(0, shape.buffer_len + 1);
  const DeviceBuffer<std::int32_t> length(std::vector<std::int32_t>{static_cast<std::int32_t>(kv_len)});
  const auto both = unpacked<float>(kv_codec_of<KvCodec>(shape.head_dim, options), device.records(), update.weight,
                                    DeviceCount::on_device(length.data()));
  const KvRebuilt<float> expected(stored, kv_codec_of<reference::KvCodec<float>>(shape.head_dim, options),
                                  update.weight);
  const double bound =
      2 * expected.v.cast<double>().rowwise().norm().maxCoeff() * static_cast<double>(shape.head_dim) * 0x1p-24 +
      2 * expected.r.cast<double>().rowwise().norm().maxCoeff() * static_cast<double>(shape.head_dim) * 0x1p-24;
  const std::int64_t rows = device.records().n_record() * kKvRecordTokens;
  for (const bool is_v : {true, false}) {
    const Matrix<float>&want = is_v ? expected.v : expected.k, &other = is_v ? expected.k : expected.v;
    for (std::int64_t h = 0; h < shape.n_head_kv; ++h) {
      for (std::int64_t j = 0; j < rows; ++j) {
        const auto first = static_cast<std::size_t>((h * rows + j) * shape.head_dim);
        const std::span<const float> got =
            std::span(both[is_v ? 1 : 0]).subspan(first, static_cast<std::size_t>(shape.head_dim));
        if (j >= (kv_len + 15) / 16 * 16) {
          RC_ASSERT(std::isnan(got[0]) && std::isnan(got[1]));
        } else if (j < kv_len) {
          const auto row = [&](const Matrix<float>& m) {
            return std::span<const float>(m.row(h * shape.buffer_len + j).data(),
                                          static_cast<std::size_t>(shape.head_dim));
          };
          rc_require(close(got, row(want), bound), is_v ? "V" : "K");
          RC_ASSERT(!close(got, row(other), bound));
        }
      }
    }
  }
}

/// bf16 records: V and the rotated quarter of K over its scales, rounded, and K and V rebuilt from them to the bit.
TEST(KvCacheGpu, PlainRecordsHoldBf16) {
  const KvOptions plain{.v_bits = 16, .r_bits = 16};
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    const Update update({1, 2, 40, head_dim}, {}, some_positions(40, 40, 4), 6);
    const KvCodec codec(head_dim, plain);
    DeviceBuffer<std::byte> memory(kv_cache_bytes(1, 2, 40, head_dim, plain));
    memory.fill_bytes(0xFF);
    const KvRecords cache{memory.data(), 1, 2, 40, head_dim, 16, 16};
    const DeviceBuffer<float> k(update.k), v(update.v), w(update.weight);
    const DeviceBuffer<std::int32_t> where(update.positions);
    kv_cache_update<float>(codec, update.view(k.data()), update.view(v.data()), w.data(), {where.data(), 40, {}}, cache,
                           nullptr);
    const auto both = unpacked<Bf16>(codec, cache, update.weight, DeviceCount::on_host(40));
    reference::KvPlainBuffer<Bf16> expected(1, 2, 40, head_dim);
    reference::kv_cache_update<float, Bf16>(update.view(update.k.data()), update.view(update.v.data()), update.weight,
                                            update.positions, expected.view());
    const auto view = std::as_const(expected).view();
    for (std::int64_t h = 0; h < 2; ++h) {
      for (std::int64_t j = 0; j < 40; ++j) {
        for (std::int64_t i = 0; i < head_dim; ++i) {
          const auto at = static_cast<std::size_t>((h * 48 + j) * head_dim + i);
          ASSERT_EQ(both[1][at].bits, view.v(0, h, j, i).bits) << head_dim << ", V, row " << j << ", dim " << i;
          const float w_i = update.weight[static_cast<std::size_t>(i)];
          float k_i = w_i * to_float(view.v(0, h, j, i));
          if (kv_is_rotated(head_dim, i)) {
            const std::int64_t r = i < head_dim / 8 ? i : i - head_dim / 2 + head_dim / 8;
            k_i = to_float(view.r(0, h, j, r)) * kv_rotated_scale(update.weight.data(), head_dim, r);
          }
          ASSERT_EQ(both[0][at].bits, to_bf16(k_i).bits) << head_dim << ", K, row " << j << ", dim " << i;
        }
      }
    }
  }
}

TEST(KvCachePlan, RefusesMisuse) {
  std::vector<std::byte> memory(1 << 18);
  std::vector<float> x(3 * 2 * 64);
  std::vector<std::int32_t> where{0, 5, 19};
  const KvCodec codec(64, {});
  struct Call {
    KvRecords cache;
    View<const float, 4> k, v;
    const float* weight;
    DevicePositions positions;
  };
  const auto call = [&](auto break_it) {
    return [&, break_it] {
      Call c{.cache = {memory.data(), 1, 2, 20, 64, 5, 4},
             .k = make_view(std::as_const(x).data(), 1, 3, 2, 64),
             .v = make_view(std::as_const(x).data(), 1, 3, 2, 64),
             .weight = x.data(),
             .positions = {where.data(), 3, where}};
      break_it(c);
      kv_cache_update<float>(codec, c.k, c.v, c.weight, c.positions, c.cache, nullptr);
    };
  };
  std::vector<std::int32_t> twice{4, 5, 4}, outside{0, 20, 1}, fewer{0, 1};
  EXPECT_TRUE(refuses(call([&](Call& c) { c.positions.host = twice; }), {"positions[0]", "positions[2]", "both 4"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.positions.host = outside; }), {"positions[1] is 20", "20"}));
  EXPECT_TRUE(
      refuses(call([&](Call& c) { c.positions.host = fewer; }), {"2 positions on the host", "3 on the device"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.positions.device = nullptr; }), {"positions are null"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.weight = nullptr; }), {"k_weight is null"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.k.extent[1] = 2; }), {"k has extent 2", "need 3"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.v.extent[2] = 1; }), {"v has extent 1", "need 2"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.cache.head_dim = 128; }), {"codec of head_dim 64", "128"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.cache.v_bits = 4; }), {"codec of 5 and 4 bits", "4 and 4"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.cache.r_bits = 7; }), {"R of 7", "3 to 6"}));
  EXPECT_TRUE(refuses([] { KvCodec(96, {}); }, {"head_dim 96"}));
  EXPECT_TRUE(refuses([] { KvCodec(64, {.v_bits = 2}); }, {"bits 2", "3 to 6"}));
  EXPECT_TRUE(refuses([] { KvCodec(64, {.v_bits = 16, .r_bits = 4}); }, {"16 both"}));
}

}  // namespace
}  // namespace gemma4::cuda
