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
#include "tests/support/tq4_update.cuh"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::CacheSide;
using reference::Matrix;
using reference::Tq4CacheBuffer;

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
  const Tq4Update update(shape, some_positions(buffer_len, count, seed), seed);
  const Tq4CacheBuffer expected = update.expected(reference::Tq4Codec<float>(head_dim, options));
  const Tq4CacheBuffer actual = update.on_device(Tq4Codec(head_dim, options));
  const reference::Tq4Codec<double> wide(head_dim, options);
  rc_require(same_but_for_ties(actual, expected, update, wide));
  RC_ASSERT(!same_but_for_ties(update.before, expected, update, wide));
}

TEST(Tq4CacheGpu, DenseRotationAgreesWithTheReference) {
  const Tq4Options options{.rotation = RotationKind::kDenseHaar, .norm = NormKind::kRaw, .seed = 5};
  const CacheShape shape{1, 2, 40, 128};
  const Tq4Update update(shape, some_positions(40, 23, 4), 6);
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
  const Tq4Update update(shape, positions, 77);
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
      const Tq4Update update({1, 2, 60, 64}, some_positions(60, 50, 2), 6);
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
  Tq4Update update(shape, positions, 9);
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
  const Tq4Update update(shape, {3, 7, 12, 39}, 2);
  Tq4DeviceRows cache(update.before);
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
  const Tq4Update update(shape, {0}, 3);
  const Tq4Codec codec(512, {});
  Tq4DeviceRows replayed(update.before), eager(update.before);
  const DeviceBuffer<float> k(update.k), v(update.v);
  DeviceBuffer<std::int32_t> position(1);
  const Stream stream;
  const auto call = [&](Tq4DeviceRows& cache) {
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
  Tq4Update update(shape, some_positions(buffer_len, buffer_len, seed), seed);
  const reference::Tq4Codec<float> host_codec(head_dim, options);
  const Tq4CacheBuffer stored = update.expected(host_codec);
  const Tq4Codec codec(head_dim, options);
  Tq4DeviceRows cache(stored);
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
