// SPDX-License-Identifier: Apache-2.0
#include "cuda/kv_cache.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "reference/kv_cache.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/kv_device.cuh"
#include "tests/support/kv_update.cuh"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

// The update of one vector for K and V on the device, and K and V rebuilt. Its layout: kv_cache_layout_test.cu.
namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::KvCacheBuffer;
using reference::Matrix;

/// Rows to records and back, whatever their bits.
RC_GTEST_PROP(KvCacheGpu, RecordsHoldTheBitsOfTheRows, ()) {
  const auto seed = *rc::gen::inRange<std::uint64_t>(1, 1 << 20);
  const KvUpdate update(some_cache_shape(), some_kv_options(seed % 3), {0}, seed);
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
  const CacheShape shape = some_cache_shape();
  const auto count = *rc::gen::inRange<std::int64_t>(1, shape.buffer_len + 1);
  const KvUpdate update(shape, some_kv_options(seed % 3), some_positions(shape.buffer_len, count, seed), seed);
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
        const KvUpdate update({1, 2, 40, head_dim}, {.v_bits = v_bits, .r_bits = r_bits}, some_positions(40, 27, 8), 5);
        EXPECT_TRUE(same_but_for_ties(update.on_device(), update.expected(), update))
            << "kv" << v_bits << "r" << r_bits << ", head_dim " << head_dim;
      }
    }
  }
}

TEST(KvCacheGpu, DenseRotationAgreesWithTheReference) {
  for (const std::int64_t head_dim : {64, 128}) {
    const KvOptions options{.rotation = RotationKind::kDenseHaar, .norm = NormKind::kRaw, .seed = 5};
    const KvUpdate update({1, 2, 40, head_dim}, options, some_positions(40, 23, 4), 6);
    const KvCacheBuffer expected = update.expected();
    EXPECT_TRUE(same_but_for_ties(update.on_device(), expected, update)) << head_dim;
    EXPECT_FALSE(same_but_for_ties(update.before, expected, update)) << head_dim << ": the control";
  }
}

/// The real shape: 2048 tokens of 4 heads, beginning in the middle of a record, the last of them at the end.
TEST(KvCacheGpu, RealChunkAgreesWithTheReference) {
  std::vector<std::int32_t> positions(2048);
  std::iota(positions.begin(), positions.end(), 2048 - 5);
  for (const KvOptions& options : {KvOptions{}, KvOptions{.v_bits = 4}}) {
    const KvUpdate update({1, 4, 4096, 512}, options, positions, 77);
    EXPECT_TRUE(same_but_for_ties(update.on_device(), update.expected(), update)) << options.v_bits;
  }
}

/// Vectors whose length a float square would lose, zeros and non-numbers: only their own row is affected.
TEST(KvCacheGpu, ExtremeVectorsAgreeWithTheReference) {
  std::vector<std::int32_t> positions(8);
  std::iota(positions.begin(), positions.end(), 3);
  KvUpdate update({1, 1, 16, 512}, {}, positions, 9);
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
  const KvUpdate update({1, 2, 40, 256}, {}, {3, 7, 12, 39}, 2);
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
  const KvUpdate update({1, 2, 50, 512}, {}, {0}, 3);
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
  CacheShape shape = some_cache_shape();
  shape.batch = 1;
  KvOptions options = some_kv_options(seed % 3);
  options.rotation = *rc::gen::element(RotationKind::kSignedHadamard, RotationKind::kDenseHaar);
  const KvUpdate update(shape, options, some_positions(shape.buffer_len, shape.buffer_len, seed), seed);
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
    const KvUpdate update({1, 2, 40, head_dim}, {}, some_positions(40, 40, 4), 6);
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

/// The comparison itself: what other roundings make of the same tokens passes; a norm two steps off, a code whose value
/// is no tie, and a row that should have stayed do not.
TEST(KvCachePlan, TiesAreToldFromFaults) {
  for (const std::int64_t head_dim : {64, 512}) {
    for (const NormKind norm : {NormKind::kCorrected, NormKind::kRaw}) {
      for (const RotationKind rotation : {RotationKind::kSignedHadamard, RotationKind::kDenseHaar}) {
        const KvOptions options{.rotation = rotation, .norm = norm, .v_bits = 6, .r_bits = 3};
        if (rotation == RotationKind::kDenseHaar && head_dim > 64) continue;  // slow, and no other rule
        const KvUpdate update({1, 2, 60, head_dim}, options, some_positions(60, 50, 2), 6);
        const KvCacheBuffer expected = update.expected();
        KvCacheBuffer other = update.before.clone();
        const std::vector<double> k(update.k.begin(), update.k.end()), v(update.v.begin(), update.v.end());
        reference::kv_cache_update<double>(kv_codec_of<reference::KvCodec<double>>(head_dim, options),
                                           update.view(k.data()), update.view(v.data()), update.weight,
                                           update.positions, other.view());
        EXPECT_TRUE(same_but_for_ties(other, expected, update)) << head_dim;
        const std::int64_t row = update.positions[3];
        const auto faulty = [&](auto plant) {
          KvCacheBuffer cache = expected.clone();
          plant(cache.view());
          return same_but_for_ties(cache, expected, update);
        };
        EXPECT_FALSE(faulty([&](const KvCacheView& view) { view.r_norm(0, 1, row).bits += 2; }));
        EXPECT_FALSE(faulty([&](const KvCacheView& view) { view.v_norm(0, 0, row).bits -= 2; }));
        EXPECT_FALSE(faulty([&](const KvCacheView& view) { view.v_codes(0, 1, row, 0) ^= 1; }));
        std::int64_t old = 0;
        while (std::find(update.positions.begin(), update.positions.end(), old) != update.positions.end()) ++old;
        EXPECT_FALSE(faulty([&](const KvCacheView& view) { view.r_codes(0, 0, old, 1) ^= 4; }));
        EXPECT_FALSE(faulty([&](const KvCacheView& view) { view.v_norm(0, 0, old).bits ^= 1; }));
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
