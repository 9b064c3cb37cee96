// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "cuda/bf16_cache.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/qkv_prologue.cuh"
#include "cuda/ring_cache.cuh"
#include "cuda/tq4_cache.cuh"
#include "tests/support/property.hpp"
#include "tests/support/qkv_case.cuh"

// Where the prologue stores K and V: the bits that the components leave there, at every position, in a graph too, and
// no other byte.
namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using namespace qkv_test;

/// One target of the prologue and the components that fill the same: run both on equal memory, and twice, and as an
/// overlapping launch. `make(memory)` is the target, `update(memory, unfused)` the components.
template <class TMake, class TUpdate>
testing::AssertionResult same_as_unfused(const QkvInputs& in, std::int64_t n_byte, const TMake& make,
                                         const TUpdate& update) {
  const QkvUnfused parts(in);
  const std::vector<Bf16> q_wanted = rounded(parts.q);
  Poisoned wanted(n_byte);
  update(wanted, parts);
  const std::vector<std::byte> memory_wanted = wanted.now();
  if (!wanted.margins_hold()) return testing::AssertionFailure() << "the components write outside their memory";
  if (memory_wanted == wanted.before()) return testing::AssertionFailure() << "the components write nothing";
  for (const char* const run : {"first call", "second call", "overlapping call"}) {
    Poisoned actual(n_byte);
    DeviceBuffer<Bf16> q(in.c.q_size());
    q.fill_bytes(0xFF);
    in.fused(q.data(), make(actual), nullptr, run[0] == 'o');
    if (q.to_host() != q_wanted) return testing::AssertionFailure() << run << ": q differs";
    const std::vector<std::byte> memory = actual.now();
    const auto [at, other] = std::mismatch(memory.begin(), memory.end(), memory_wanted.begin());
    if (at != memory.end()) {
      return testing::AssertionFailure() << run << ": byte " << at - memory.begin() - Poisoned::kMargin << " is "
                                         << std::to_integer<int>(*at) << ", expected " << std::to_integer<int>(*other);
    }
  }
  return testing::AssertionSuccess();
}

testing::AssertionResult same_as_unfused_flat(const QkvInputs& in, std::int64_t buffer_len) {
  const AttentionConfig& a = in.c.attention;
  const std::int64_t size = a.n_head_kv * buffer_len * a.head_dim;
  const auto cache = [&](Poisoned& memory) {
    return FlatKv{make_view(memory.values(), 1, a.n_head_kv, buffer_len, a.head_dim),
                  make_view(memory.values() + size, 1, a.n_head_kv, buffer_len, a.head_dim)};
  };
  std::vector<std::int32_t> positions(static_cast<std::size_t>(in.c.n_token));
  std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(in.c.position));
  const DeviceBuffer<std::int32_t> where(positions);
  return same_as_unfused(in, 4 * size, cache, [&](Poisoned& memory, const QkvUnfused& parts) {
    bf16_cache_update<float>(with_batch(in.kv(parts.k.data())), with_batch(in.kv(parts.v.data())),
                             {where.data(), in.c.n_token, {}}, cache(memory).k, cache(memory).v, nullptr);
  });
}

testing::AssertionResult same_as_unfused_tq4(const QkvInputs& in, const Tq4Options& options, std::int64_t buffer_len) {
  const AttentionConfig& a = in.c.attention;
  const Tq4Codec codec(a.head_dim, options);
  const auto cache = [&](Poisoned& memory) {
    return Tq4Kv{codec, {memory.bytes(), 1, a.n_head_kv, buffer_len, a.head_dim}};
  };
  std::vector<std::int32_t> positions(static_cast<std::size_t>(in.c.n_token));
  std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(in.c.position));
  const DeviceBuffer<std::int32_t> where(positions);
  return same_as_unfused(in, tq4_cache_bytes(1, a.n_head_kv, buffer_len, a.head_dim), cache,
                         [&](Poisoned& memory, const QkvUnfused& parts) {
                           tq4_cache_update<float>(codec, with_batch(in.kv(parts.k.data())),
                                                   with_batch(in.kv(parts.v.data())), {where.data(), in.c.n_token, {}},
                                                   cache(memory).records, nullptr);
                         });
}

testing::AssertionResult same_as_unfused_kv(const QkvInputs& in, const KvOptions& options, std::int64_t buffer_len) {
  const AttentionConfig& a = in.c.attention;
  const KvCodec codec(a.head_dim, options);
  const auto cache = [&](Poisoned& memory) {
    return KvKv{codec, {memory.bytes(), 1, a.n_head_kv, buffer_len, a.head_dim, options.v_bits, options.r_bits}};
  };
  std::vector<std::int32_t> positions(static_cast<std::size_t>(in.c.n_token));
  std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(in.c.position));
  const DeviceBuffer<std::int32_t> where(positions);
  return same_as_unfused(in, kv_cache_bytes(1, a.n_head_kv, buffer_len, a.head_dim, options), cache,
                         [&](Poisoned& memory, const QkvUnfused& parts) {
                           kv_cache_update<float>(codec, with_batch(in.kv(parts.k.data())),
                                                  with_batch(in.kv(parts.v.data())), in.k_norm.data(),
                                                  {where.data(), in.c.n_token, {}}, cache(memory).records, nullptr);
                         });
}

/// Into a ring, and the fresh K and V beside it: one memory holds k_new | v_new | ring_k | ring_v.
testing::AssertionResult same_as_unfused_ring(const QkvInputs& in, std::int64_t ring_len, std::int64_t window) {
  const AttentionConfig& a = in.c.attention;
  const std::int64_t fresh = in.c.kv_size(), size = a.n_head_kv * ring_len * a.head_dim;
  const auto ring = [&](Poisoned& memory) {
    Bf16* const at = memory.values();
    return RingKv{{in.kv(at), in.kv(at + fresh)},
                  make_view(at + 2 * fresh, a.n_head_kv, ring_len, a.head_dim),
                  make_view(at + 2 * fresh + size, a.n_head_kv, ring_len, a.head_dim),
                  window};
  };
  return same_as_unfused(in, 4 * (fresh + size), ring, [&](Poisoned& memory, const QkvUnfused& parts) {
    const DeviceBuffer<Bf16> k(rounded(parts.k)), v(rounded(parts.v));
    const RingKv to = ring(memory);
    for (const auto& [from, into] : {std::pair(&k, to.fresh.k.data), std::pair(&v, to.fresh.v.data)}) {
      check(cudaMemcpy(into, from->data(), static_cast<std::size_t>(from->bytes()), cudaMemcpyDeviceToDevice), "copy");
    }
    ring_cache_commit(to.fresh.k, to.fresh.v, in.at(), to.ring_k, to.ring_v, nullptr);
  });
}

/// Any shape at any position, the last tokens perhaps outside the buffer, where neither path writes.
RC_GTEST_PROP(QkvPrologueCacheGpu, FlatCacheHasTheBitsOfTheComponents, ()) {
  const QkvCase c = some_qkv_case(40);
  RC_LOG() << c;
  rc_require(same_as_unfused_flat(QkvInputs(c), *rc::gen::inRange<std::int64_t>(c.position + 1, c.position + 60)));
}

RC_GTEST_PROP(QkvPrologueCacheGpu, Tq4CacheHasTheBitsOfTheComponents, ()) {
  const QkvCase c = some_qkv_case(40);
  RC_LOG() << c;
  const Tq4Options options{.norm = *rc::gen::element(NormKind::kCorrected, NormKind::kRaw),
                           .k_bits = *rc::gen::inRange(2, 5),
                           .v_bits = *rc::gen::inRange(2, 5),
                           .seed = c.seed};
  rc_require(
      same_as_unfused_tq4(QkvInputs(c), options, *rc::gen::inRange<std::int64_t>(c.position + 1, c.position + 60)));
}

RC_GTEST_PROP(QkvPrologueCacheGpu, OneVectorHasTheBitsOfTheComponents, ()) {
  QkvCase c = some_qkv_case(40);
  c.attention.rope_pairs = std::min(c.attention.rope_pairs, c.attention.head_dim / 8);
  RC_LOG() << c;
  const int plain = *rc::gen::inRange(0, 5);
  KvOptions options{.norm = *rc::gen::element(NormKind::kCorrected, NormKind::kRaw),
                    .v_bits = *rc::gen::inRange(3, 7),
                    .r_bits = *rc::gen::inRange(3, 7),
                    .seed = c.seed};
  if (plain == 0) options.v_bits = options.r_bits = 16;
  RC_LOG() << ", kv" << options.v_bits << "r" << options.r_bits;
  rc_require(
      same_as_unfused_kv(QkvInputs(c), options, *rc::gen::inRange<std::int64_t>(c.position + 1, c.position + 60)));
}

RC_GTEST_PROP(QkvPrologueCacheGpu, RingHasTheBitsOfTheComponents, ()) {
  const QkvCase c = some_qkv_case(262143 - 33);
  RC_LOG() << c;
  const auto window = *rc::gen::inRange<std::int64_t>(1, 30);
  const auto spare = *rc::gen::inRange<std::int64_t>(0, 4);
  rc_require(same_as_unfused_ring(QkvInputs(c), window + c.n_token - 1 + spare, window));
}

/// The 31B's layers, and full ones of the 12B, whose one head of keys serves sixteen of queries: one token far out, and
/// a chunk; the last token of the longest context.
TEST(QkvPrologueCacheGpu, RealShapesHaveTheBitsOfTheComponents) {
  EXPECT_TRUE(same_as_unfused_tq4(QkvInputs(real_qkv_case(false, 1, 131071)), {}, 131072));
  EXPECT_TRUE(same_as_unfused_tq4(QkvInputs(real_qkv_case(false, 2048, 2048 - 5)), {}, 4096));
  EXPECT_TRUE(same_as_unfused_kv(QkvInputs(real_qkv_case(false, 1, 131071)), {}, 131072));
  EXPECT_TRUE(same_as_unfused_kv(QkvInputs(real_qkv_case(false, 2048, 2048 - 5)), {.v_bits = 4}, 4096));
  EXPECT_TRUE(same_as_unfused_flat(QkvInputs(real_qkv_case(false, 1, 8191)), 8192));
  EXPECT_TRUE(same_as_unfused_flat(QkvInputs(real_qkv_case(false, 600, 77)), 700));
  EXPECT_TRUE(same_as_unfused_tq4(QkvInputs(real_qkv_case(false, 1, 131071, gemma4_12b())), {}, 131072));
  EXPECT_TRUE(same_as_unfused_tq4(QkvInputs(real_qkv_case(false, 600, 77, gemma4_12b())), {}, 700));
  EXPECT_TRUE(same_as_unfused_flat(QkvInputs(real_qkv_case(false, 9, 8000, gemma4_12b())), 8192));
  EXPECT_TRUE(same_as_unfused_ring(QkvInputs(real_qkv_case(true, 1, 262143)), 1024, 1024));
  EXPECT_TRUE(same_as_unfused_ring(QkvInputs(real_qkv_case(true, 1025, 262143 - 1025)), 2048, 1024));
}

/// Positions that only the device knows and that lie outside touch no byte of a cache; q is written all the same.
TEST(QkvPrologueCacheGpu, PositionsOutsideAreNotWritten) {
  QkvCase c{.attention = {.head_dim = 128, .n_head_kv = 2, .rope_theta = 1e4, .rope_pairs = 16},
            .n_head = 4,
            .n_token = 3,
            .v_is_k = true,
            .seed = 3};
  const std::int64_t buffer_len = 20, size = 2 * buffer_len * 128;
  const Tq4Codec codec(128, {});
  const KvCodec kv_codec(128, {});
  for (const std::int64_t position : {-3L, 20L, 31L, 2147483640L, 17L}) {
    c.position = position;
    const QkvInputs in(c);
    Poisoned flat(4 * size), records(tq4_cache_bytes(1, 2, buffer_len, 128));
    DeviceBuffer<Bf16> q(c.q_size());
    q.fill_bytes(0xFF);
    in.fused(q.data(), FlatKv{make_view(flat.values(), 1, 2, buffer_len, 128),
                              make_view(flat.values() + size, 1, 2, buffer_len, 128)});
    in.fused(q.data(), Tq4Kv{codec, {records.bytes(), 1, 2, buffer_len, 128}});
    Poisoned one_vector(kv_cache_bytes(1, 2, buffer_len, 128, {}));
    in.fused(q.data(), KvKv{kv_codec, {one_vector.bytes(), 1, 2, buffer_len, 128, 5, 4}});
    EXPECT_EQ(one_vector.now() == one_vector.before(), position != 17) << position;
    EXPECT_EQ(flat.now() == flat.before(), position != 17) << position;
    EXPECT_EQ(records.now() == records.before(), position != 17) << position;
    const std::vector<Bf16> written = q.to_host();
    EXPECT_TRUE(std::none_of(written.begin(), written.end(), [](Bf16 value) { return value.bits == 0xFFFF; }));
  }
  c.position = -3;
  c.v_is_k = false;
  const QkvInputs in(c);
  Poisoned ring(4 * size);
  DeviceBuffer<Bf16> q(c.q_size()), k(c.kv_size()), v(c.kv_size());
  in.fused(q.data(), RingKv{{in.kv(k.data()), in.kv(v.data())},
                            make_view(ring.values(), 2, buffer_len, 128),
                            make_view(ring.values() + size, 2, buffer_len, 128),
                            10});
  EXPECT_TRUE(ring.now() == ring.before());
}

/// One captured launch serves every position, through records and around a ring, and reads new vectors too.
TEST(QkvPrologueCacheGpu, GraphReplaysAtGrowingPositions) {
  const std::int64_t ring_len = 8, buffer_len = 40;
  QkvInputs full({.attention = {.head_dim = 512, .n_head_kv = 2, .rope_theta = 1e6, .rope_pairs = 64},
                  .n_head = 8,
                  .v_is_k = true,
                  .seed = 4});
  QkvInputs sliding(
      {.attention = {.head_dim = 256, .n_head_kv = 2, .rope_theta = 1e4, .rope_pairs = 128}, .n_head = 4, .seed = 4});
  const Tq4Codec codec(512, {});
  const std::int64_t flat_size = 2 * buffer_len * 512, ring_size = 2 * ring_len * 256, fresh = sliding.c.kv_size();
  struct Memory {
    Poisoned tq4, flat, ring, q;
  };
  const auto make = [&] {
    return Memory{Poisoned(tq4_cache_bytes(1, 2, buffer_len, 512)), Poisoned(4 * flat_size),
                  Poisoned(4 * (ring_size + fresh)), Poisoned(2 * (2 * full.c.q_size() + sliding.c.q_size()))};
  };
  Memory replayed = make(), eager = make();
  const Stream stream;
  const auto step = [&](Memory& to) {
    Bf16* const q = to.q.values();
    full.fused(q, Tq4Kv{codec, {to.tq4.bytes(), 1, 2, buffer_len, 512}}, stream);
    full.fused(q + full.c.q_size(),
               FlatKv{make_view(to.flat.values(), 1, 2, buffer_len, 512),
                      make_view(to.flat.values() + flat_size, 1, 2, buffer_len, 512)},
               stream, true);
    Bf16* const ring = to.ring.values();
    sliding.fused(q + 2 * full.c.q_size(),
                  RingKv{{sliding.kv(ring), sliding.kv(ring + fresh)},
                         make_view(ring + 2 * fresh, 2, ring_len, 256),
                         make_view(ring + 2 * fresh + ring_size, 2, ring_len, 256),
                         ring_len},
                  stream, true);
  };
  const Graph graph = Graph::capture(stream, [&] { step(replayed); });
  EXPECT_EQ(graph.n_node(), 3u);
  EXPECT_TRUE(replayed.tq4.now() == replayed.tq4.before());
  std::vector<std::byte> last;
  for (std::int32_t at = 0; at < buffer_len; ++at) {
    const std::vector<Bf16> k = QkvInputs::narrow(draw(static_cast<std::uint64_t>(at), full.c.kv_size()));
    for (QkvInputs* in : {&full, &sliding}) in->position.from_host(std::span<const std::int32_t>(&at, 1), stream);
    full.k_device.from_host(k, stream);
    graph.launch(stream);
    step(eager);
    stream.synchronize();
    ASSERT_TRUE(replayed.tq4.now() == eager.tq4.now()) << at;
    ASSERT_TRUE(replayed.flat.now() == eager.flat.now()) << at;
    ASSERT_TRUE(replayed.ring.now() == eager.ring.now()) << at;
    ASSERT_TRUE(replayed.q.now() == eager.q.now()) << at;
    ASSERT_TRUE(replayed.tq4.now() != last) << at;  // it writes at the new position
    last = replayed.tq4.now();
  }
  for (const Poisoned* memory : {&replayed.tq4, &replayed.flat, &replayed.ring, &replayed.q}) {
    EXPECT_TRUE(memory->margins_hold());
  }
}

}  // namespace
}  // namespace gemma4::cuda
