// SPDX-License-Identifier: Apache-2.0
#include "cuda/qkv_prologue.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "reference/rms_norm.hpp"
#include "reference/rope.hpp"
#include "reference/tq4_cache.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/qkv_case.cuh"
#include "tests/support/refuses.hpp"

// The prologue against the formula, and what it refuses. Against the components, bit for bit:
// qkv_prologue_cache_test.cu.
namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using namespace qkv_test;
using reference::Matrix;

/// Normalised and turned values in double, and how far a float result rounded to bf16 may be from each.
struct Expected {
  std::vector<double> values, bounds;

  Expected(const std::vector<float>& x, const QkvCase& c, std::span<const float> weight, bool turns,
           std::int64_t position) {
    const std::int64_t head_dim = c.attention.head_dim, n_row = static_cast<std::int64_t>(x.size()) / head_dim;
    Matrix<double> heads = Eigen::Map<const Matrix<float>>(x.data(), n_row, head_dim).cast<double>();
    reference::rms_norm<double>(heads, weight, kQkvEpsilon, heads);
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
  const QkvCase c = some_qkv_case(262143 - 33);
  RC_LOG() << c;
  const QkvInputs in(c);
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

/// Through norm, RoPE and compression, the codes are those of the reference in float. Its roundings differ from ours by
/// eta = (head_dim / 32 + 20) 2^-24 + 2^-21 relative, which carries a code over one of 15 boundaries with a chance of
/// about 24 eta < 1e-4; ten times that passes. Control: one position later the codes of K are others.
TEST(QkvPrologueGpu, Tq4CodesAreThoseOfTheReference) {
  const QkvCase c = real_qkv_case(false, 40, 130000 - 3);
  const QkvInputs in(c);
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
    reference::rms_norm<float>(heads, weight, kQkvEpsilon, heads);
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

/// q, k and v may be overwritten, which the layer does to save memory.
TEST(QkvPrologueGpu, InPlaceGivesTheSameBits) {
  const QkvCase c = real_qkv_case(true, 5, 4000);
  QkvInputs in(c);
  DeviceBuffer<Bf16> q(c.q_size()), k(c.kv_size()), v(c.kv_size());
  in.fused(q.data(), FreshKv{in.kv(k.data()), in.kv(v.data())});
  in.fused(in.q_device.data(), FreshKv{in.kv(in.k_device.data()), in.kv(in.v_device.data())});
  EXPECT_TRUE(in.q_device.to_host() == q.to_host());
  EXPECT_TRUE(in.k_device.to_host() == k.to_host());
  EXPECT_TRUE(in.v_device.to_host() == v.to_host());
}

/// As a drafter asks for them, whose layers have no keys.
TEST(QkvPrologueGpu, QueriesAloneHaveTheBitsThatTheyHaveBesideKeys) {
  for (const bool sliding : {true, false}) {
    const QkvCase c = real_qkv_case(sliding, 2, 4000);
    QkvInputs in(c);
    DeviceBuffer<Bf16> beside(c.q_size()), alone(c.q_size()), k(c.kv_size()), v(c.kv_size());
    in.fused(beside.data(), FreshKv{in.kv(k.data()), in.kv(v.data())});
    const auto none = [&]<class T>(T* data) { return in.heads(data, 0); };
    const QkNorms norms{in.q_norm.data(), in.q_norm.data(), kQkvEpsilon};
    qkv_prologue<Bf16>({in.heads(in.q_device.data(), c.n_head), none(in.k_device.data()), none(in.k_device.data()),
                        norms, in.at(), in.rope, in.heads(alone.data(), c.n_head)},
                       FreshKv{none(k.data()), none(v.data())}, nullptr);
    EXPECT_TRUE(alone.to_host() == beside.to_host());
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
             .norms = {weight, weight, kQkvEpsilon},
             .position = DeviceCount::on_host(5),
             .rope = rope_params(attention),
             .q_out = make_view(values, 3, 4, 128)};
      break_it(c);
      qkv_prologue<Bf16>({c.q, c.k, c.v, c.norms, c.position, c.rope, c.q_out}, target, nullptr);
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
