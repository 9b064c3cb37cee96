// SPDX-License-Identifier: Apache-2.0
#include "cuda/qkv_prologue.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <ostream>
#include <span>
#include <utility>
#include <vector>

#include "cuda/bf16_cache.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/ring_cache.cuh"
#include "gemma4/config.hpp"
#include "reference/rms_norm.hpp"
#include "reference/rope.hpp"
#include "reference/tq4_cache.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::Matrix;

constexpr float kEpsilon = 1e-6f;

struct Case {
  AttentionConfig attention;
  std::int64_t n_head = 1, n_token = 1, position = 0;
  bool v_is_k = false;
  std::uint64_t seed = 1;

  [[nodiscard]] std::int64_t q_size() const { return n_token * n_head * attention.head_dim; }
  [[nodiscard]] std::int64_t kv_size() const { return n_token * attention.n_head_kv * attention.head_dim; }
};

std::ostream& operator<<(std::ostream& out, const Case& c) {
  return out << c.n_token << " tokens at " << c.position << ", heads " << c.n_head << " and " << c.attention.n_head_kv
             << " of " << c.attention.head_dim << ", " << c.attention.rope_pairs << " pairs"
             << (c.v_is_k ? ", v = k" : "") << ", seed " << c.seed;
}

/// Any shape: n_head_kv times 1 to 3 query heads, none to all pairs turning.
Case some_case(std::int64_t largest_position) {
  Case c;
  c.attention.head_dim = *rc::gen::element<std::int64_t>(64, 128, 256, 512);
  c.attention.n_head_kv = *rc::gen::inRange<std::int64_t>(1, 4);
  c.attention.rope_theta = *rc::gen::element(1e4, 1e6);
  c.attention.rope_pairs = c.attention.head_dim / *rc::gen::element<std::int64_t>(2, 8, 64);
  c.n_head = c.attention.n_head_kv * *rc::gen::inRange<std::int64_t>(1, 4);
  c.n_token = *rc::gen::element<std::int64_t>(1, 1, 2, 7, 33);
  c.position =
      *rc::gen::oneOf(rc::gen::inRange<std::int64_t>(0, largest_position), rc::gen::just(largest_position - 1));
  c.v_is_k = *rc::gen::arbitrary<bool>();
  c.seed = *rc::gen::inRange<std::uint64_t>(1, 1 << 20);
  return c;
}

Case real_case(bool sliding, std::int64_t n_token, std::int64_t position) {
  const ModelConfig model = gemma4_31b();
  return {.attention = sliding ? model.sliding : model.full,
          .n_head = model.n_head,
          .n_token = n_token,
          .position = position,
          .v_is_k = !sliding,
          .seed = 5};
}

/// Projections and weights, exact in bf16, on the host and on the device.
struct Inputs {
  Case c;
  std::vector<float> q, k, v, q_weight, k_weight;
  DeviceBuffer<Bf16> q_device, k_device, v_device;
  DeviceBuffer<float> q_norm, k_norm;
  DeviceBuffer<std::int32_t> position;
  RopeParams rope;

  explicit Inputs(const Case& from)
      : c(from),
        q(draw(c.seed, c.q_size(), 3.0f)),
        k(draw(c.seed + 1, c.kv_size(), 2.0f)),
        v(c.v_is_k ? k : draw(c.seed + 2, c.kv_size(), 0.1f)),
        q_weight(draw(c.seed + 3, c.attention.head_dim, 2.0f)),
        k_weight(draw(c.seed + 4, c.attention.head_dim, 2.0f)),
        q_device(narrow(q)),
        k_device(narrow(k)),
        v_device(narrow(v)),
        q_norm(q_weight),
        k_norm(k_weight),
        position(std::vector<std::int32_t>{static_cast<std::int32_t>(c.position)}),
        rope(rope_params(c.attention)) {}

  [[nodiscard]] static std::vector<Bf16> narrow(const std::vector<float>& values) {
    std::vector<Bf16> result(values.size());
    std::transform(values.begin(), values.end(), result.begin(), to_bf16);
    return result;
  }
  template <class T>
  [[nodiscard]] View<T, 3> heads(T* data, std::int64_t n_head) const {
    return make_view(data, c.n_token, n_head, c.attention.head_dim);
  }
  template <class T>
  [[nodiscard]] View<T, 3> kv(T* data) const {
    return heads(data, c.attention.n_head_kv);
  }
  [[nodiscard]] QkNorms norms() const { return {q_norm.data(), k_norm.data(), kEpsilon}; }
  [[nodiscard]] DeviceCount at() const { return DeviceCount::on_device(position.data()); }

  template <class TTarget>
  void fused(Bf16* q_out, const TTarget& target, cudaStream_t stream = nullptr, bool overlap = false) const {
    const Bf16* const v_in = c.v_is_k ? k_device.data() : v_device.data();
    qkv_prologue<Bf16>(heads(q_device.data(), c.n_head), kv(k_device.data()), kv(v_in), norms(), at(), rope,
                       heads(q_out, c.n_head), target, stream, overlap);
  }
};

/// The same through the components, one launch each, in float.
struct Unfused {
  DeviceBuffer<float> q, k, v;

  explicit Unfused(const Inputs& in) : q(in.c.q_size()), k(in.c.kv_size()), v(in.c.kv_size()) {
    const std::int64_t head_dim = in.c.attention.head_dim;
    const auto norm = [&](const DeviceBuffer<Bf16>& from, const float* weight, DeviceBuffer<float>& to) {
      rms_norm<Bf16, float>(make_view(from.data(), from.size() / head_dim, head_dim), weight, kEpsilon,
                            make_view(to.data(), to.size() / head_dim, head_dim), nullptr);
    };
    norm(in.q_device, in.q_norm.data(), q);
    norm(in.k_device, in.k_norm.data(), k);
    norm(in.v_device, nullptr, v);
    rope<float>(in.heads(q.data(), in.c.n_head), in.at(), in.rope, nullptr);
    rope<float>(in.kv(k.data()), in.at(), in.rope, nullptr);
  }
};

/// Memory that begins as a pattern, with a margin on both sides that nobody may touch.
class Poisoned {
 public:
  static constexpr std::int64_t kMargin = 4096;

  explicit Poisoned(std::int64_t n_byte) : memory_(n_byte + 2 * kMargin) {
    std::vector<std::byte> pattern(static_cast<std::size_t>(memory_.size()));
    std::uint32_t state = 12345;
    for (std::byte& byte : pattern) byte = static_cast<std::byte>((state = state * 1664525u + 1013904223u) >> 24);
    before_ = pattern;
    memory_.from_host(pattern);
    check(cudaDeviceSynchronize(), "wait for the pattern");
  }
  [[nodiscard]] std::byte* bytes() { return memory_.data() + kMargin; }
  [[nodiscard]] Bf16* values() { return reinterpret_cast<Bf16*>(bytes()); }
  [[nodiscard]] const std::vector<std::byte>& before() const { return before_; }
  [[nodiscard]] std::vector<std::byte> now() const {
    check(cudaDeviceSynchronize(), "wait for the device");
    return memory_.to_host();
  }
  [[nodiscard]] bool margins_hold() const {
    const std::vector<std::byte> after = now();
    return std::equal(after.begin(), after.begin() + kMargin, before_.begin()) &&
           std::equal(after.end() - kMargin, after.end(), before_.end() - kMargin);
  }

 private:
  DeviceBuffer<std::byte> memory_;
  std::vector<std::byte> before_;
};

std::vector<Bf16> rounded(const DeviceBuffer<float>& values) {
  return Inputs::narrow(values.to_host());
}

/// Normalised and turned values in double, and how far a float result rounded to bf16 may be from each.
struct Expected {
  std::vector<double> values, bounds;

  Expected(const std::vector<float>& x, const Case& c, std::span<const float> weight, bool turns,
           std::int64_t position) {
    const std::int64_t head_dim = c.attention.head_dim, n_row = static_cast<std::int64_t>(x.size()) / head_dim;
    Matrix<double> heads = Eigen::Map<const Matrix<float>>(x.data(), n_row, head_dim).cast<double>();
    reference::rms_norm<double>(heads, weight, kEpsilon, heads);
    Matrix<double> tokens = Eigen::Map<const Matrix<double>>(heads.data(), c.n_token, heads.size() / c.n_token);
    if (turns) reference::rope<double>(tokens, position, c.attention);
    values.assign(tokens.data(), tokens.data() + tokens.size());
    const double relative = (static_cast<double>(head_dim) / 32 + 20) * 0x1p-24 + (turns ? 0x1p-21 : 0.0);
    for (std::int64_t i = 0; i < heads.size(); ++i) {
      const std::int64_t dim = i % head_dim, pair = (dim + head_dim / 2) % head_dim;
      const double before = (std::abs(heads.data()[i]) + std::abs(heads.data()[i - dim + pair])) * relative;
      bounds.push_back(before + (std::abs(values[static_cast<std::size_t>(i)]) + before) * 0x1p-8 + 1e-38);
    }
  }
};

/// q, k and v against the formula in double, at any position. Controls: one position later, and v turned like k.
RC_GTEST_PROP(QkvPrologueGpu, AgreesWithTheReferenceInDouble, ()) {
  const Case c = some_case(262143 - 33);
  RC_LOG() << c;
  const Inputs in(c);
  DeviceBuffer<Bf16> q(c.q_size()), k(c.kv_size()), v(c.kv_size());
  for (DeviceBuffer<Bf16>* out : {&q, &k, &v}) out->fill_bytes(0xFF);
  in.fused(q.data(), FreshKv{in.kv(k.data()), in.kv(v.data())});
  const auto agrees = [&](const DeviceBuffer<Bf16>& out, const Expected& expected) {
    return close(out.to_host(), expected.values, expected.bounds);
  };
  rc_require(agrees(q, Expected(in.q, c, in.q_weight, true, c.position)), "q");
  rc_require(agrees(k, Expected(in.k, c, in.k_weight, true, c.position)), "k");
  rc_require(agrees(v, Expected(in.v, c, {}, false, c.position)), "v");
  RC_ASSERT(!agrees(q, Expected(in.q, c, in.q_weight, true, c.position + 1)));
  RC_ASSERT(!agrees(k, Expected(in.k, c, in.k_weight, true, c.position + 1)));
  RC_ASSERT(!agrees(k, Expected(in.k, c, {}, true, c.position)));
  RC_ASSERT(!agrees(v, Expected(in.v, c, {}, true, 1)));
}

/// One target of the prologue and the components that fill the same: run both on equal memory, and twice, and as an
/// overlapping launch. `make(memory)` is the target, `update(memory, unfused)` the components.
template <class TMake, class TUpdate>
testing::AssertionResult same_as_unfused(const Inputs& in, std::int64_t n_byte, const TMake& make,
                                         const TUpdate& update) {
  const Unfused parts(in);
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

testing::AssertionResult same_as_unfused_flat(const Inputs& in, std::int64_t buffer_len) {
  const AttentionConfig& a = in.c.attention;
  const std::int64_t size = a.n_head_kv * buffer_len * a.head_dim;
  const auto cache = [&](Poisoned& memory) {
    return FlatKv{make_view(memory.values(), 1, a.n_head_kv, buffer_len, a.head_dim),
                  make_view(memory.values() + size, 1, a.n_head_kv, buffer_len, a.head_dim)};
  };
  std::vector<std::int32_t> positions(static_cast<std::size_t>(in.c.n_token));
  std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(in.c.position));
  const DeviceBuffer<std::int32_t> where(positions);
  return same_as_unfused(in, 4 * size, cache, [&](Poisoned& memory, const Unfused& parts) {
    bf16_cache_update<float>(with_batch(in.kv(parts.k.data())), with_batch(in.kv(parts.v.data())),
                             {where.data(), in.c.n_token, {}}, cache(memory).k, cache(memory).v, nullptr);
  });
}

testing::AssertionResult same_as_unfused_tq4(const Inputs& in, const Tq4Options& options, std::int64_t buffer_len) {
  const AttentionConfig& a = in.c.attention;
  const Tq4Codec codec(a.head_dim, options);
  const auto cache = [&](Poisoned& memory) {
    return Tq4Kv{codec, {memory.bytes(), 1, a.n_head_kv, buffer_len, a.head_dim}};
  };
  std::vector<std::int32_t> positions(static_cast<std::size_t>(in.c.n_token));
  std::iota(positions.begin(), positions.end(), static_cast<std::int32_t>(in.c.position));
  const DeviceBuffer<std::int32_t> where(positions);
  return same_as_unfused(
      in, tq4_cache_bytes(1, a.n_head_kv, buffer_len, a.head_dim), cache, [&](Poisoned& memory, const Unfused& parts) {
        tq4_cache_update<float>(codec, with_batch(in.kv(parts.k.data())), with_batch(in.kv(parts.v.data())),
                                {where.data(), in.c.n_token, {}}, cache(memory).records, nullptr);
      });
}

/// Into a ring, and the fresh K and V beside it: one memory holds k_new | v_new | ring_k | ring_v.
testing::AssertionResult same_as_unfused_ring(const Inputs& in, std::int64_t ring_len, std::int64_t window) {
  const AttentionConfig& a = in.c.attention;
  const std::int64_t fresh = in.c.kv_size(), size = a.n_head_kv * ring_len * a.head_dim;
  const auto ring = [&](Poisoned& memory) {
    Bf16* const at = memory.values();
    return RingKv{{in.kv(at), in.kv(at + fresh)},
                  make_view(at + 2 * fresh, a.n_head_kv, ring_len, a.head_dim),
                  make_view(at + 2 * fresh + size, a.n_head_kv, ring_len, a.head_dim),
                  window};
  };
  return same_as_unfused(in, 4 * (fresh + size), ring, [&](Poisoned& memory, const Unfused& parts) {
    const DeviceBuffer<Bf16> k(rounded(parts.k)), v(rounded(parts.v));
    const RingKv to = ring(memory);
    for (const auto& [from, into] : {std::pair(&k, to.fresh.k.data), std::pair(&v, to.fresh.v.data)}) {
      check(cudaMemcpy(into, from->data(), static_cast<std::size_t>(from->bytes()), cudaMemcpyDeviceToDevice), "copy");
    }
    ring_cache_commit(to.fresh.k, to.fresh.v, in.at(), to.ring_k, to.ring_v, nullptr);
  });
}

/// Any shape at any position, the last tokens perhaps outside the buffer, where neither path writes.
RC_GTEST_PROP(QkvPrologueGpu, FlatCacheHasTheBitsOfTheComponents, ()) {
  const Case c = some_case(40);
  RC_LOG() << c;
  rc_require(same_as_unfused_flat(Inputs(c), *rc::gen::inRange<std::int64_t>(c.position + 1, c.position + 60)));
}

RC_GTEST_PROP(QkvPrologueGpu, Tq4CacheHasTheBitsOfTheComponents, ()) {
  const Case c = some_case(40);
  RC_LOG() << c;
  const Tq4Options options{.norm = *rc::gen::element(NormKind::kCorrected, NormKind::kRaw),
                           .k_bits = *rc::gen::inRange(2, 5),
                           .v_bits = *rc::gen::inRange(2, 5),
                           .seed = c.seed};
  rc_require(same_as_unfused_tq4(Inputs(c), options, *rc::gen::inRange<std::int64_t>(c.position + 1, c.position + 60)));
}

RC_GTEST_PROP(QkvPrologueGpu, RingHasTheBitsOfTheComponents, ()) {
  const Case c = some_case(262143 - 33);
  RC_LOG() << c;
  const auto window = *rc::gen::inRange<std::int64_t>(1, 30);
  const auto spare = *rc::gen::inRange<std::int64_t>(0, 4);
  rc_require(same_as_unfused_ring(Inputs(c), window + c.n_token - 1 + spare, window));
}

/// The 31B's layers: one token far out, and a chunk; the last token of the longest context.
TEST(QkvPrologueGpu, RealShapesHaveTheBitsOfTheComponents) {
  EXPECT_TRUE(same_as_unfused_tq4(Inputs(real_case(false, 1, 131071)), {}, 131072));
  EXPECT_TRUE(same_as_unfused_tq4(Inputs(real_case(false, 2048, 2048 - 5)), {}, 4096));
  EXPECT_TRUE(same_as_unfused_flat(Inputs(real_case(false, 1, 8191)), 8192));
  EXPECT_TRUE(same_as_unfused_flat(Inputs(real_case(false, 600, 77)), 700));
  EXPECT_TRUE(same_as_unfused_ring(Inputs(real_case(true, 1, 262143)), 1024, 1024));
  EXPECT_TRUE(same_as_unfused_ring(Inputs(real_case(true, 1025, 262143 - 1025)), 2048, 1024));
}

/// Through norm, RoPE and compression, the codes are those of the reference in float. Its roundings differ from ours by
/// eta = (head_dim / 32 + 20) 2^-24 + 2^-21 relative, which carries a code over one of 15 boundaries with a chance of
/// about 24 eta < 1e-4; ten times that passes. Control: one position later the codes of K are others.
TEST(QkvPrologueGpu, Tq4CodesAreThoseOfTheReference) {
  const Case c = real_case(false, 40, 130000 - 3);
  const Inputs in(c);
  const std::int64_t n_head_kv = c.attention.n_head_kv, head_dim = c.attention.head_dim, buffer_len = 130048;
  const Tq4Codec codec(head_dim, {});
  DeviceBuffer<std::byte> memory(tq4_cache_bytes(1, n_head_kv, buffer_len, head_dim));
  memory.fill_bytes(0);
  const Tq4Records records{memory.data(), 1, n_head_kv, buffer_len, head_dim};
  DeviceBuffer<Bf16> q(c.q_size());
  in.fused(q.data(), Tq4Kv{codec, records});
  const std::int64_t n_row = n_head_kv * buffer_len;
  DeviceBuffer<std::uint8_t> k_codes(n_row * head_dim / 2), v_codes(n_row * head_dim / 2);
  DeviceBuffer<Tq4Norm> k_norm(n_row), v_norm(n_row);
  tq4_records_to_rows(
      records,
      {make_view(k_codes.data(), 1, n_head_kv, buffer_len, head_dim / 2),
       make_view(v_codes.data(), 1, n_head_kv, buffer_len, head_dim / 2),
       make_view(k_norm.data(), 1, n_head_kv, buffer_len), make_view(v_norm.data(), 1, n_head_kv, buffer_len)},
      nullptr);
  const std::vector<std::uint8_t> k_actual = k_codes.to_host(), v_actual = v_codes.to_host();
  const std::vector<Tq4Norm> norm_actual = k_norm.to_host();

  const auto expected = [&](const std::vector<float>& x, std::span<const float> weight, bool turns,
                            std::int64_t position) {
    Matrix<float> heads = Eigen::Map<const Matrix<float>>(x.data(), c.n_token * n_head_kv, head_dim);
    reference::rms_norm<float>(heads, weight, kEpsilon, heads);
    Matrix<float> tokens = Eigen::Map<const Matrix<float>>(heads.data(), c.n_token, n_head_kv * head_dim);
    if (turns) reference::rope<float>(tokens, position, c.attention);
    return tokens;
  };
  const reference::Tq4Codec<float> host(head_dim, {});
  const auto differing = [&](std::int64_t position) {
    const Matrix<float> k = expected(in.k, in.k_weight, true, position), v = expected(in.v, {}, false, position);
    reference::Tq4CacheBuffer cache(1, n_head_kv, c.n_token, head_dim);
    std::vector<std::int32_t> rows(static_cast<std::size_t>(c.n_token));
    std::iota(rows.begin(), rows.end(), 0);
    reference::tq4_cache_update<float>(host, make_view(k.data(), 1, c.n_token, n_head_kv, head_dim),
                                       make_view(v.data(), 1, c.n_token, n_head_kv, head_dim), rows, cache.view());
    std::int64_t n_differ = 0;
    const ConstTq4CacheView view = std::as_const(cache).view();
    for (std::int64_t h = 0; h < n_head_kv; ++h) {
      for (std::int64_t t = 0; t < c.n_token; ++t) {
        const auto row = static_cast<std::size_t>(h * buffer_len + c.position + t);
        if (position == c.position) {
          EXPECT_NEAR(to_float(norm_actual[row]) / to_float(view.k_norm(0, h, t)), 1.0, 0x1p-7);
        }
        for (std::int64_t i = 0; i < head_dim / 2; ++i) {
          const std::size_t at = row * static_cast<std::size_t>(head_dim / 2) + static_cast<std::size_t>(i);
          n_differ += k_actual[at] != view.k_codes(0, h, t, i) ? 1 : 0;
          n_differ += v_actual[at] != view.v_codes(0, h, t, i) ? 1 : 0;
        }
      }
    }
    return n_differ;
  };
  const std::int64_t most = c.kv_size() / 1000;
  EXPECT_LE(differing(c.position), most);
  EXPECT_GT(differing(c.position + 1), 10 * most);
}

/// Positions that only the device knows and that lie outside touch no byte of a cache; q is written all the same.
TEST(QkvPrologueGpu, PositionsOutsideAreNotWritten) {
  Case c{.attention = {.head_dim = 128, .n_head_kv = 2, .rope_theta = 1e4, .rope_pairs = 16},
         .n_head = 4,
         .n_token = 3,
         .v_is_k = true,
         .seed = 3};
  const std::int64_t buffer_len = 20, size = 2 * buffer_len * 128;
  const Tq4Codec codec(128, {});
  for (const std::int64_t position : {-3L, 20L, 31L, 2147483640L, 17L}) {
    c.position = position;
    const Inputs in(c);
    Poisoned flat(4 * size), records(tq4_cache_bytes(1, 2, buffer_len, 128));
    DeviceBuffer<Bf16> q(c.q_size());
    q.fill_bytes(0xFF);
    in.fused(q.data(), FlatKv{make_view(flat.values(), 1, 2, buffer_len, 128),
                              make_view(flat.values() + size, 1, 2, buffer_len, 128)});
    in.fused(q.data(), Tq4Kv{codec, {records.bytes(), 1, 2, buffer_len, 128}});
    EXPECT_EQ(flat.now() == flat.before(), position != 17) << position;
    EXPECT_EQ(records.now() == records.before(), position != 17) << position;
    const std::vector<Bf16> written = q.to_host();
    EXPECT_TRUE(std::none_of(written.begin(), written.end(), [](Bf16 value) { return value.bits == 0xFFFF; }));
  }
  c.position = -3;
  c.v_is_k = false;
  const Inputs in(c);
  Poisoned ring(4 * size);
  DeviceBuffer<Bf16> q(c.q_size()), k(c.kv_size()), v(c.kv_size());
  in.fused(q.data(), RingKv{{in.kv(k.data()), in.kv(v.data())},
                            make_view(ring.values(), 2, buffer_len, 128),
                            make_view(ring.values() + size, 2, buffer_len, 128),
                            10});
  EXPECT_TRUE(ring.now() == ring.before());
}

/// q, k and v may be overwritten, which the layer does to save memory.
TEST(QkvPrologueGpu, InPlaceGivesTheSameBits) {
  const Case c = real_case(true, 5, 4000);
  Inputs in(c);
  DeviceBuffer<Bf16> q(c.q_size()), k(c.kv_size()), v(c.kv_size());
  in.fused(q.data(), FreshKv{in.kv(k.data()), in.kv(v.data())});
  in.fused(in.q_device.data(), FreshKv{in.kv(in.k_device.data()), in.kv(in.v_device.data())});
  EXPECT_TRUE(in.q_device.to_host() == q.to_host());
  EXPECT_TRUE(in.k_device.to_host() == k.to_host());
  EXPECT_TRUE(in.v_device.to_host() == v.to_host());
}

/// One captured launch serves every position, through records and around a ring, and reads new vectors too.
TEST(QkvPrologueGpu, GraphReplaysAtGrowingPositions) {
  const std::int64_t ring_len = 8, buffer_len = 40;
  Inputs full({.attention = {.head_dim = 512, .n_head_kv = 2, .rope_theta = 1e6, .rope_pairs = 64},
               .n_head = 8,
               .v_is_k = true,
               .seed = 4});
  Inputs sliding(
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
    const std::vector<Bf16> k = Inputs::narrow(draw(static_cast<std::uint64_t>(at), full.c.kv_size()));
    for (Inputs* in : {&full, &sliding}) in->position.from_host(std::span<const std::int32_t>(&at, 1), stream);
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

TEST(QkvProloguePlan, MisuseIsRefusedBeforeAnyLaunch) {
  alignas(16) static std::uint16_t memory[1 << 16];
  alignas(16) static float weight[512];
  auto* const values = reinterpret_cast<Bf16*>(memory);
  const AttentionConfig attention{.head_dim = 128, .n_head_kv = 2, .rope_theta = 1e4, .rope_pairs = 16};
  struct Call {
    View<const Bf16, 3> q, k, v;
    QkNorms norms;
    DeviceCount position;
    RopeParams rope;
    View<Bf16, 3> q_out;
  };
  const auto call = [&](const auto& target, auto break_it) {
    return [&, target, break_it] {
      Call c{.q = make_view<const Bf16>(values, 3, 4, 128),
             .k = make_view<const Bf16>(values, 3, 2, 128),
             .v = make_view<const Bf16>(values, 3, 2, 128),
             .norms = {weight, weight, kEpsilon},
             .position = DeviceCount::on_host(5),
             .rope = rope_params(attention),
             .q_out = make_view(values, 3, 4, 128)};
      break_it(c);
      qkv_prologue<Bf16>(c.q, c.k, c.v, c.norms, c.position, c.rope, c.q_out, target, nullptr);
    };
  };
  const auto nothing = [](Call&) {};
  const FlatKv flat{make_view(values, 1, 2, 8, 128), make_view(values, 1, 2, 8, 128)};
  EXPECT_TRUE(refuses(call(flat, [](Call& c) { c.k.extent[0] = 2; }), {"k has extent 2", "need 3"}));
  EXPECT_TRUE(refuses(call(flat, [](Call& c) { c.v.extent[1] = 1; }), {"v has extent 1", "need 2"}));
  EXPECT_TRUE(refuses(call(flat, [](Call& c) { c.q_out.extent[1] = 3; }), {"q_out has extent 3", "need 4"}));
  EXPECT_TRUE(refuses(call(flat, [](Call& c) { c.rope.head_dim = 256; }), {"head_dim 128", "256"}));
  EXPECT_TRUE(refuses(call(flat, [](Call& c) { c.norms.k = nullptr; }), {"no weights"}));
  EXPECT_TRUE(refuses(call(flat, [](Call& c) { c.norms.q += 1; }), {"q's norm", "16 bytes"}));
  EXPECT_TRUE(refuses(call(flat, [](Call& c) { c.q.data += 1; }), {"rows of q", "16 bytes"}));
  EXPECT_TRUE(refuses(call(flat, [](Call& c) { c.position = {}; }), {"position"}));
  EXPECT_TRUE(refuses(call(flat, [](Call& c) { c.position.host = 6; }), {"positions 6 to 8", "the buffer has 8"}));
  EXPECT_TRUE(refuses(call(FlatKv{flat.k, make_view(values, 1, 2, 9, 128)}, nothing), {"v_cache", "9", "need 8"}));
  EXPECT_TRUE(refuses(call(FlatKv{make_view(values, 2, 2, 8, 128), flat.v}, nothing), {"k_cache", "2", "need 1"}));

  alignas(16) static std::uint16_t other[3 * 2 * 128];
  const FreshKv fresh{make_view(values, 3, 2, 128), make_view(reinterpret_cast<Bf16*>(other), 3, 2, 128)};
  EXPECT_TRUE(refuses(call(fresh, nothing), {"k_new", "place"}));
  const auto two_inputs = [&](Call& c) { c.v.data = reinterpret_cast<Bf16*>(other); };
  const auto ring = [&](std::int64_t ring_len, std::int64_t window) {
    return RingKv{fresh, make_view(values, 2, ring_len, 128), make_view(values, 2, ring_len, 128), window};
  };
  EXPECT_TRUE(refuses(call(ring(8, 7), two_inputs), {"3 tokens", "ring of 8", "window of 7", "ring_cache_commit"}));
  EXPECT_TRUE(refuses(call(ring(8, 0), two_inputs), {"window 0"}));

  const Tq4Codec codec(128, {}), wide(256, {});
  auto* const bytes = reinterpret_cast<std::byte*>(memory);
  EXPECT_TRUE(refuses(call(Tq4Kv{codec, {bytes, 1, 3, 8, 128}}, nothing), {"n_head_kv 3", "need 1, 2, 128"}));
  EXPECT_TRUE(refuses(call(Tq4Kv{wide, {bytes, 1, 2, 8, 128}}, nothing), {"codec of head_dim 256", "128"}));
  EXPECT_TRUE(refuses(call(Tq4Kv{codec, {bytes, 1, 2, 7, 128}}, nothing), {"positions 5 to 7", "the buffer has 7"}));
}

}  // namespace
}  // namespace gemma4::cuda
