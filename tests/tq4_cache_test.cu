// SPDX-License-Identifier: Apache-2.0
#include "cuda/tq4_cache.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "gemma4/tq4_golden.hpp"
#include "reference/tq4_cache.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::CacheSide;
using reference::Matrix;
using reference::Tq4CacheBuffer;

/// Records on the device that begin as the bytes of `host`, and come back as rows.
class DeviceCache {
 public:
  explicit DeviceCache(const Tq4CacheBuffer& host)
      : shape_(host.shape()),
        memory_(tq4_cache_bytes(shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim)),
        k_codes_(copy(host.view().k_codes)),
        v_codes_(copy(host.view().v_codes)),
        k_norm_(copy(host.view().k_norm)),
        v_norm_(copy(host.view().v_norm)) {
    tq4_rows_to_records(rows(), records(), nullptr);
  }
  [[nodiscard]] Tq4Records records() {
    return {memory_.data(), shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim};
  }
  [[nodiscard]] DeviceBuffer<std::byte>& memory() { return memory_; }
  [[nodiscard]] Tq4CacheBuffer to_host() {
    check(cudaDeviceSynchronize(), "wait for the device");
    tq4_records_to_rows(records(), rows(), nullptr);
    Tq4CacheBuffer host(shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim);
    std::ranges::copy(k_codes_.to_host(), host.k_codes().begin());
    std::ranges::copy(v_codes_.to_host(), host.v_codes().begin());
    std::ranges::copy(k_norm_.to_host(), host.k_norm().begin());
    std::ranges::copy(v_norm_.to_host(), host.v_norm().begin());
    return host;
  }

 private:
  template <class T, int kRank>
  [[nodiscard]] static DeviceBuffer<std::remove_const_t<T>> copy(const View<T, kRank>& view) {
    return DeviceBuffer<std::remove_const_t<T>>(std::span<const T>(view.data, static_cast<std::size_t>(view.size())));
  }
  [[nodiscard]] Tq4CacheView rows() {
    return {make_view(k_codes_.data(), shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim / 2),
            make_view(v_codes_.data(), shape_.batch, shape_.n_head_kv, shape_.buffer_len, shape_.head_dim / 2),
            make_view(k_norm_.data(), shape_.batch, shape_.n_head_kv, shape_.buffer_len),
            make_view(v_norm_.data(), shape_.batch, shape_.n_head_kv, shape_.buffer_len)};
  }

  CacheShape shape_;
  DeviceBuffer<std::byte> memory_;
  DeviceBuffer<std::uint8_t> k_codes_, v_codes_;
  DeviceBuffer<Tq4Norm> k_norm_, v_norm_;
};

/// New tokens for a cache that already holds something in every row.
struct Update {
  CacheShape shape;
  std::vector<std::int32_t> positions;
  std::vector<float> k, v;  ///< [batch, n_new, n_head_kv, head_dim], exact in bf16
  Tq4CacheBuffer before;

  Update(const CacheShape& s, std::vector<std::int32_t> where, std::uint64_t seed)
      : shape(s), positions(std::move(where)), before(s.batch, s.n_head_kv, s.buffer_len, s.head_dim) {
    const auto n_new = static_cast<std::int64_t>(positions.size());
    k = draw(seed, s.batch * n_new * s.n_head_kv * s.head_dim, 3.0f);
    v = draw(seed + 1, s.batch * n_new * s.n_head_kv * s.head_dim, 0.3f);
    std::uint32_t state = static_cast<std::uint32_t>(seed) | 1u;
    const auto next = [&] { return (state = state * 1664525u + 1013904223u) >> 16; };
    for (std::uint8_t& byte : before.k_codes()) byte = static_cast<std::uint8_t>(next());
    for (std::uint8_t& byte : before.v_codes()) byte = static_cast<std::uint8_t>(next());
    for (Tq4Norm& norm : before.k_norm()) norm.bits = static_cast<std::uint16_t>(next());
    for (Tq4Norm& norm : before.v_norm()) norm.bits = static_cast<std::uint16_t>(next());
  }
  template <class T>
  [[nodiscard]] View<const T, 4> view(const T* data) const {
    return make_view(data, shape.batch, static_cast<std::int64_t>(positions.size()), shape.n_head_kv, shape.head_dim);
  }

  /// What the reference makes of it.
  [[nodiscard]] Tq4CacheBuffer expected(const reference::Tq4Codec<float>& codec) const {
    Tq4CacheBuffer cache = before.clone();
    reference::tq4_cache_update<float>(codec, view(k.data()), view(v.data()), positions, cache.view());
    return cache;
  }

  /// What the device makes of it, from bf16 inputs.
  [[nodiscard]] Tq4CacheBuffer on_device(const Tq4Codec& codec) const {
    const auto narrow = [](const std::vector<float>& from) {
      std::vector<Bf16> to(from.size());
      std::transform(from.begin(), from.end(), to.begin(), to_bf16);
      return to;
    };
    DeviceCache cache(before);
    const DeviceBuffer<Bf16> k_device(narrow(k)), v_device(narrow(v));
    const DeviceBuffer<std::int32_t> where(positions);
    tq4_cache_update<Bf16>(codec, view(k_device.data()), view(v_device.data()), {where.data(), where.size(), {}},
                           cache.records(), nullptr);
    return cache.to_host();
  }
};

/// Half the distance between neighbouring bf16 numbers around a finite x.
double half_step_of_bf16(double x) {
  return x == 0.0 ? 0x1p-134 : std::ldexp(0.5, std::max(std::ilogb(x), -126) - 7);
}

/// The caches agree, except for codes of values that lie within rounding of a boundary: such a code may be the
/// neighbour's, and the norm of its row then differs with it. `y` are the rotated unit vectors.
testing::AssertionResult same_but_for_ties(const Tq4CacheBuffer& actual, const Tq4CacheBuffer& expected,
                                           const Update& update, const reference::Tq4Codec<double>& codec) {
  // x / |x| and the butterflies round log2(head_dim) + 2 times, each relative to a partial sum of at most |x| = 1; a
  // dense rotation rounds head_dim products and sums, whose magnitudes add up to at most |row| |x| = 1.
  const std::int64_t head_dim = update.shape.head_dim;
  const auto size = static_cast<double>(head_dim);
  const double slack = ((codec.rotation().kind() == RotationKind::kDenseHaar ? size : std::log2(size)) + 3) * 0x1p-24;
  const ConstTq4CacheView a = actual.view(), e = expected.view();
  std::int64_t n_tie = 0;
  for (const CacheSide side : {CacheSide::kKey, CacheSide::kValue}) {
    const bool is_k = side == CacheSide::kKey;
    const Codebook& book = codec.codebook(side);
    for (std::int64_t b = 0; b < update.shape.batch; ++b) {
      for (std::int64_t h = 0; h < update.shape.n_head_kv; ++h) {
        for (std::int64_t j = 0; j < update.shape.buffer_len; ++j) {
          const auto found = std::find(update.positions.begin(), update.positions.end(), j);
          Matrix<double> y(1, head_dim);
          if (found != update.positions.end()) {
            const auto t = found - update.positions.begin();
            const float* row =
                (is_k ? update.k : update.v).data() +
                ((b * static_cast<std::int64_t>(update.positions.size()) + t) * update.shape.n_head_kv + h) * head_dim;
            for (std::int64_t i = 0; i < head_dim; ++i) y(0, i) = row[i];
            y /= y.norm() == 0.0 ? 1.0 : y.norm();
            codec.rotation().forward(y);
          }
          bool tie = false;
          double squares[2] = {};  // of the levels, actual and expected
          for (std::int64_t i = 0; i < head_dim; ++i) {
            const auto code = [&](const ConstTq4CacheView& view) {
              const std::uint8_t byte = (is_k ? view.k_codes : view.v_codes)(b, h, j, i / 2);
              return i % 2 == 0 ? byte >> 4 : byte & 15;
            };
            const int codes[2] = {code(a), code(e)};
            for (int which = 0; which < 2; ++which) {
              const double level = book.centroids[static_cast<std::size_t>(codes[which])];
              squares[which] += level * level;
            }
            if (code(a) == code(e)) continue;
            const int low = std::min(code(a), code(e));
            const bool near = found != update.positions.end() && std::abs(code(a) - code(e)) == 1 &&
                              std::abs(y(0, i) - book.boundaries[static_cast<std::size_t>(low)]) <= slack;
            if (!near) {
              return testing::AssertionFailure()
                     << (is_k ? "K" : "V") << " code " << i << " of row " << j << ", head " << h << ": " << code(a)
                     << ", expected " << code(e) << ", y " << y(0, i);
            }
            tie = true;
          }
          const Tq4Norm an = (is_k ? a.k_norm : a.v_norm)(b, h, j), en = (is_k ? e.k_norm : e.v_norm)(b, h, j);
          n_tie += tie ? 1 : 0;
          if (an.bits == en.bits) continue;
          // |x|, over the length of the levels where corrected: that is known for both. Each is rounded to bf16 once,
          // behind roundings of a float that are those of y.
          const double ratio = codec.norm_kind() == NormKind::kRaw ? 1.0 : std::sqrt(squares[1] / squares[0]);
          const double norm = to_float(en) * ratio;
          const double bound = half_step_of_bf16(to_float(an)) + half_step_of_bf16(to_float(en)) * ratio + slack * norm;
          if (!(found != update.positions.end() && std::abs(to_float(an) - norm) <= bound)) {
            return testing::AssertionFailure()
                   << "norm of row " << j << ": " << to_float(an) << ", expected " << norm << " within " << bound;
          }
        }
      }
    }
  }
  return testing::AssertionSuccess() << n_tie << " rows with a tie";
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

/// Any shape, any set of positions in any order, every codebook: the device writes what the reference writes, and every
/// other row keeps its bits (the comparison covers all of them). Control: without the update the caches differ.
RC_GTEST_PROP(Tq4CacheGpu, UpdateAgreesWithTheReference, ()) {
  const auto head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512);
  const auto buffer_len = *rc::gen::inRange<std::int64_t>(1, 60);
  const auto count = *rc::gen::inRange<std::int64_t>(1, buffer_len + 1);
  const auto seed = *rc::gen::inRange<std::uint64_t>(1, 1 << 20);
  const Tq4Options options{.codebook = *rc::gen::element(CodebookKind::kFull, CodebookKind::kCutAtThreeSigma),
                           .norm = *rc::gen::element(NormKind::kCorrected, NormKind::kRaw),
                           .k_bits = *rc::gen::inRange(2, 5),
                           .v_bits = *rc::gen::inRange(2, 5),
                           .seed = seed};
  const CacheShape shape{*rc::gen::inRange<std::int64_t>(1, 3), *rc::gen::inRange<std::int64_t>(1, 4), buffer_len,
                         head_dim};
  const Update update(shape, some_positions(buffer_len, count, seed), seed);
  const Tq4CacheBuffer expected = update.expected(reference::Tq4Codec<float>(head_dim, options));
  const Tq4CacheBuffer actual = update.on_device(Tq4Codec(head_dim, options));
  const reference::Tq4Codec<double> wide(head_dim, options);
  rc_require(same_but_for_ties(actual, expected, update, wide));
  RC_ASSERT(!same_but_for_ties(update.before, expected, update, wide));
}

TEST(Tq4CacheGpu, DenseRotationAgreesWithTheReference) {
  const Tq4Options options{.rotation = RotationKind::kDenseHaar, .norm = NormKind::kRaw, .seed = 5};
  const CacheShape shape{1, 2, 40, 128};
  const Update update(shape, some_positions(40, 23, 4), 6);
  const Tq4CacheBuffer expected = update.expected(reference::Tq4Codec<float>(128, options));
  const reference::Tq4Codec<double> wide(128, options);
  EXPECT_TRUE(same_but_for_ties(update.on_device(Tq4Codec(128, options)), expected, update, wide));
  EXPECT_FALSE(same_but_for_ties(update.before, expected, update, wide)) << "the control";
}

/// The real shape: 2048 tokens of 4 heads, beginning in the middle of a record, the last of them at the end.
TEST(Tq4CacheGpu, RealChunkAgreesWithTheReference) {
  const CacheShape shape{1, 4, 4096, 512};
  std::vector<std::int32_t> positions(2048);
  std::iota(positions.begin(), positions.end(), 2048 - 5);
  const Update update(shape, positions, 77);
  EXPECT_TRUE(same_but_for_ties(update.on_device(Tq4Codec(512, {})),
                                update.expected(reference::Tq4Codec<float>(512, {})), update,
                                reference::Tq4Codec<double>(512, {})));
}

/// The comparison itself: what other roundings make of the same tokens passes; a norm two steps off, a code whose value
/// is no tie, and a row that should have stayed do not.
TEST(Tq4CachePlan, TiesAreToldFromFaults) {
  for (const RotationKind rotation : {RotationKind::kSignedHadamard, RotationKind::kDenseHaar}) {
    for (const NormKind norm : {NormKind::kCorrected, NormKind::kRaw}) {
      const Tq4Options options{.rotation = rotation, .norm = norm};
      const Update update({1, 2, 60, 64}, some_positions(60, 50, 2), 6);
      const reference::Tq4Codec<double> wide(64, options);
      const Tq4CacheBuffer expected = update.expected(reference::Tq4Codec<float>(64, options));
      Tq4CacheBuffer other = update.before.clone();
      const std::vector<double> k(update.k.begin(), update.k.end()), v(update.v.begin(), update.v.end());
      reference::tq4_cache_update<double>(wide, update.view(k.data()), update.view(v.data()), update.positions,
                                          other.view());
      EXPECT_TRUE(same_but_for_ties(other, expected, update, wide));
      const std::int64_t row = update.positions[3];
      std::int64_t old = 0;
      while (std::find(update.positions.begin(), update.positions.end(), old) != update.positions.end()) ++old;
      const auto faulty = [&](auto plant) {
        Tq4CacheBuffer cache = expected.clone();
        plant(cache.view());
        return same_but_for_ties(cache, expected, update, wide);
      };
      EXPECT_FALSE(faulty([&](const Tq4CacheView& view) { view.k_norm(0, 1, row).bits += 2; }));
      EXPECT_FALSE(faulty([&](const Tq4CacheView& view) { view.v_norm(0, 0, row).bits -= 2; }));
      EXPECT_FALSE(faulty([&](const Tq4CacheView& view) { view.v_codes(0, 1, row, 0) ^= 1; }));
      EXPECT_FALSE(faulty([&](const Tq4CacheView& view) { view.k_codes(0, 0, old, 1) ^= 4; }));
      EXPECT_FALSE(faulty([&](const Tq4CacheView& view) { view.v_norm(0, 0, old).bits ^= 1; }));
    }
  }
}

/// Vectors whose length a float square would lose, zeros and non-numbers: only their own row is affected.
TEST(Tq4CacheGpu, ExtremeVectorsAgreeWithTheReference) {
  const CacheShape shape{1, 1, 16, 512};
  std::vector<std::int32_t> positions(8);
  std::iota(positions.begin(), positions.end(), 3);
  Update update(shape, positions, 9);
  const float scale[8] = {1.0f, 0.0f, 1e-30f, 1e30f, 1e-38f, 1e37f, INFINITY, NAN};
  for (std::size_t t = 0; t < 8; ++t) {
    for (std::size_t i = 0; i < 512; ++i) {
      update.k[t * 512 + i] = to_float(to_bf16(update.k[t * 512 + i] * scale[t]));
      update.v[t * 512 + i] = to_float(to_bf16(update.v[t * 512 + i] * scale[t]));
    }
  }
  const Tq4CacheBuffer expected = update.expected(reference::Tq4Codec<float>(512, {}));
  const Tq4CacheBuffer actual = update.on_device(Tq4Codec(512, {}));
  for (std::size_t row = 0; row < 16; ++row) {
    const Tq4Norm a = actual.view().k_norm.data[row], e = expected.view().k_norm.data[row];
    if (row == 10) {
      EXPECT_TRUE(std::isnan(to_float(a)));
      continue;
    }
    EXPECT_EQ(a.bits, e.bits) << row;
    if (row == 9) continue;  // an infinity: its codes mean nothing
    for (std::size_t i = 0; i < 256; ++i) {
      ASSERT_EQ(actual.view().k_codes.data[row * 256 + i], expected.view().k_codes.data[row * 256 + i]) << row;
    }
  }
}

/// Positions that only the device knows: those outside the buffer touch nothing, not even memory around the cache.
TEST(Tq4CacheGpu, PositionsOutsideAreNotWritten) {
  const CacheShape shape{1, 2, 40, 256};
  const Update update(shape, {3, 7, 12, 39}, 2);
  DeviceCache cache(update.before);
  const std::vector<std::byte> before = cache.memory().to_host();
  const DeviceBuffer<float> k(update.k), v(update.v);
  const DeviceBuffer<std::int32_t> outside(std::vector<std::int32_t>{-1, 40, 47, 2147483647});
  const Tq4Codec codec(256, {});
  tq4_cache_update<float>(codec, update.view(k.data()), update.view(v.data()), {outside.data(), 4, {}}, cache.records(),
                          nullptr);
  EXPECT_TRUE(cache.memory().to_host() == before);
  const DeviceBuffer<std::int32_t> inside(update.positions);
  tq4_cache_update<float>(codec, update.view(k.data()), update.view(v.data()), {inside.data(), 4, {}}, cache.records(),
                          nullptr);
  EXPECT_FALSE(cache.memory().to_host() == before);
}

/// One captured launch serves every position.
TEST(Tq4CacheGpu, GraphReplaysAtNewPositions) {
  const CacheShape shape{1, 2, 50, 512};
  const Update update(shape, {0}, 3);
  const Tq4Codec codec(512, {});
  DeviceCache replayed(update.before), eager(update.before);
  const DeviceBuffer<float> k(update.k), v(update.v);
  DeviceBuffer<std::int32_t> position(1);
  const Stream stream;
  const auto call = [&](DeviceCache& cache) {
    tq4_cache_update<float>(codec, update.view(k.data()), update.view(v.data()), {position.data(), 1, {}},
                            cache.records(), stream);
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

/// Decompressed rows are those of the reference, up to the rounding of one product and the rotation.
RC_GTEST_PROP(Tq4CacheGpu, DecompressAgreesWithTheReference, ()) {
  const auto head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512);
  const auto buffer_len = *rc::gen::inRange<std::int64_t>(1, 40);
  const auto seed = *rc::gen::inRange<std::uint64_t>(1, 1 << 20);
  const Tq4Options options{.rotation = *rc::gen::element(RotationKind::kSignedHadamard, RotationKind::kDenseHaar),
                           .seed = seed % 4};
  const CacheShape shape{1, 2, buffer_len, head_dim};
  Update update(shape, some_positions(buffer_len, buffer_len, seed), seed);
  const reference::Tq4Codec<float> host_codec(head_dim, options);
  const Tq4CacheBuffer stored = update.expected(host_codec);
  const Tq4Codec codec(head_dim, options);
  DeviceCache cache(stored);
  DeviceBuffer<float> k(shape.n_head_kv * buffer_len * head_dim), v(k.size());
  k.fill_bytes(0xFF);
  v.fill_bytes(0xFF);
  tq4_decompress<float>(codec, cache.records(), make_view(k.data(), 1, 2, buffer_len, head_dim),
                        make_view(v.data(), 1, 2, buffer_len, head_dim), nullptr);
  const std::vector<float> k_host = k.to_host(), v_host = v.to_host();
  Matrix<float> expected(2 * buffer_len, head_dim);
  for (const CacheSide side : {CacheSide::kKey, CacheSide::kValue}) {
    const bool is_k = side == CacheSide::kKey;
    const ConstTq4CacheView view = stored.view();
    for (std::int64_t h = 0; h < 2; ++h) {
      const auto [codes, norms] = reference::tq4_rows(is_k ? view.k_codes : view.v_codes,
                                                      is_k ? view.k_norm : view.v_norm, 0, h, 0, buffer_len);
      host_codec.decompress(side, codes, norms, expected.middleRows(h * buffer_len, buffer_len));
    }
    const double longest = expected.cast<double>().rowwise().norm().maxCoeff();
    const std::span<const float> flat(expected.data(), static_cast<std::size_t>(expected.size()));
    rc_require(close(is_k ? k_host : v_host, flat, longest * head_dim * 0x1p-24));
    RC_ASSERT(!close(is_k ? v_host : k_host, flat, longest * head_dim * 0x1p-24));
  }
}

TEST(Tq4CachePlan, RefusesMisuse) {
  std::vector<std::byte> memory(1 << 18);
  std::vector<float> x(3 * 2 * 64);
  std::vector<std::int32_t> where{0, 5, 19};
  const Tq4Codec codec(64, {});
  struct Call {
    Tq4Records cache;
    View<const float, 4> k, v;
    DevicePositions positions;
  };
  const auto call = [&](auto break_it) {
    return [&, break_it] {
      Call c{.cache = {memory.data(), 1, 2, 20, 64},
             .k = make_view(std::as_const(x).data(), 1, 3, 2, 64),
             .v = make_view(std::as_const(x).data(), 1, 3, 2, 64),
             .positions = {where.data(), 3, where}};
      break_it(c);
      tq4_cache_update<float>(codec, c.k, c.v, c.positions, c.cache, nullptr);
    };
  };
  std::vector<std::int32_t> twice{4, 5, 4}, outside{0, 20, 1}, negative{0, -1, 1}, fewer{0, 1};
  EXPECT_TRUE(refuses(call([&](Call& c) { c.positions.host = twice; }), {"positions[0]", "positions[2]", "both 4"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.positions.host = outside; }), {"positions[1] is 20", "20"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.positions.host = negative; }), {"positions[1] is -1"}));
  EXPECT_TRUE(
      refuses(call([&](Call& c) { c.positions.host = fewer; }), {"2 positions on the host", "3 on the device"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.positions.device = nullptr; }), {"positions are null"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.k.extent[1] = 2; }), {"k has extent 2", "need 3"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.v.extent[2] = 1; }), {"v has extent 1", "need 2"}));
  EXPECT_TRUE(refuses(call([&](Call& c) { c.cache.head_dim = 128; }), {"codec of head_dim 64", "128"}));
}

}  // namespace
}  // namespace gemma4::cuda
