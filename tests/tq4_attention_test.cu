// SPDX-License-Identifier: Apache-2.0
#include "cuda/tq4_attention.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cuda/device/device_buffer.cuh"
#include "reference/tq4_attention.hpp"
#include "tests/support/attention_promises.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/record_decode_promises.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/tq4_device.cuh"

// What decode of the TQ4 attention promises, over random shapes. Shapes of the model, graphs and golden cases:
// tq4_attention_decode_test.cu.
namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::CacheSide;
using reference::Matrix;
using reference::Tq4CacheBuffer;

struct Fixed {
  Tq4AttentionChoice choice = {};
  std::int64_t smem_limit_bytes = 0;  ///< 0: the device's
  int bits = 4;                       ///< of K and V; 4 takes the kernels with byte levels, fewer the others
};

/// tq4_attention on the device over a cache that the reference compressed.
class DeviceSubject {
 public:
  explicit DeviceSubject(const AttentionCase& c, const Fixed& fixed = {})
      : case_(c),
        fixed_(fixed),
        q_(c.q()),
        cache_(c.shape.batch, c.shape.n_head_kv, c.shape.buffer_len, c.shape.head_dim) {
    const AttentionShape& s = c.shape;
    const std::vector<float> k = c.k(), v = c.v();
    std::vector<std::int32_t> positions(static_cast<std::size_t>(s.buffer_len));
    std::iota(positions.begin(), positions.end(), 0);
    const auto tokens_first = [&](const std::vector<float>& x) {
      View<const float, 4> view = make_view(x.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim);
      std::swap(view.extent[1], view.extent[2]);
      std::swap(view.stride[1], view.stride[2]);
      return view;
    };
    reference::tq4_cache_update<float>(codec_of<reference::Tq4Codec<float>>(s.head_dim, fixed_.bits), tokens_first(k),
                                       tokens_first(v), positions, cache_.view());
  }

  /// Norms a thousand times larger or NaN, and other codes.
  void spoil(std::int64_t first, std::int64_t last, Spoil kind) {
    const Tq4CacheView view = cache_.view();
    for (std::int64_t b = 0; b < case_.shape.batch; ++b) {
      for (std::int64_t h = 0; h < case_.shape.n_head_kv; ++h) {
        for (std::int64_t j = first; j < last; ++j) {
          for (Tq4Norm* norm : {&view.k_norm(b, h, j), &view.v_norm(b, h, j)}) {
            *norm = to_bf16(kind == Spoil::kNaN ? std::numeric_limits<float>::quiet_NaN() : 1000 * to_float(*norm));
          }
          for (std::int64_t i = 0; i < case_.shape.head_dim / 2; ++i) {
            view.k_codes(b, h, j, i) ^= 0x5A;
            view.v_codes(b, h, j, i) ^= 0xF0;
          }
        }
      }
    }
  }

  [[nodiscard]] DeviceSubject sliced(std::int64_t kv_len) const {
    DeviceSubject slice(case_, fixed_, q_, kv_len);
    const ConstTq4CacheView from = cache_.view();
    const Tq4CacheView to = slice.cache_.view();
    for (std::int64_t b = 0; b < case_.shape.batch; ++b) {
      for (std::int64_t h = 0; h < case_.shape.n_head_kv; ++h) {
        std::copy_n(&from.k_codes(b, h, 0, 0), kv_len * case_.shape.head_dim / 2, &to.k_codes(b, h, 0, 0));
        std::copy_n(&from.v_codes(b, h, 0, 0), kv_len * case_.shape.head_dim / 2, &to.v_codes(b, h, 0, 0));
        std::copy_n(&from.k_norm(b, h, 0), kv_len, &to.k_norm(b, h, 0));
        std::copy_n(&from.v_norm(b, h, 0), kv_len, &to.v_norm(b, h, 0));
      }
    }
    return slice;
  }

  [[nodiscard]] std::vector<float> attend(const AttentionOptions& options, std::optional<std::int64_t> kv_len) const {
    return attend(options, kv_len, 0, case_.shape.n_query);
  }

  /// Queries [first, first + n_query) only. kv_len goes through device memory; the host is told where there is a mask,
  /// whose extent it then judges.
  [[nodiscard]] std::vector<float> attend(const AttentionOptions& options, std::optional<std::int64_t> kv_len,
                                          std::int64_t first, std::int64_t n_query) const {
    AttentionShape s = case_.shape;
    const DeviceBuffer<Bf16> q(narrow(q_));
    const DeviceBuffer<std::byte> memory = records_of(cache_);
    View<const Bf16, 4> queries = make_view(q.data(), s.batch, s.n_query, s.n_head, s.head_dim);
    queries.data += first * queries.stride[1];
    queries.extent[1] = s.n_query = n_query;
    DeviceBuffer<Bf16> out(s.batch * n_query * s.n_head * s.head_dim);
    out.fill_bytes(0xFF);  // NaN: every element must be written
    DeviceInfo device = current_device();
    if (fixed_.smem_limit_bytes > 0) device.smem_limit_bytes = fixed_.smem_limit_bytes;
    AttentionOptions on_device = options;
    DeviceBuffer<std::uint8_t> mask;
    if (options.mask) {
      const auto* bytes = static_cast<const std::uint8_t*>(options.mask->data);
      mask = DeviceBuffer<std::uint8_t>(std::vector<std::uint8_t>(
          bytes, bytes + options.mask->shape[0] * options.mask->shape[2] * options.mask->shape[3]));
      on_device.mask->data = mask.data();
    }
    const Tq4AttentionPlan plan = plan_tq4_attention(s, on_device, device, fixed_.choice);
    DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
    workspace.fill_bytes(0xFF);
    DeviceBuffer<std::int32_t> length(std::vector<std::int32_t>{static_cast<std::int32_t>(kv_len.value_or(0))});
    DeviceBuffer<unsigned long long> count(std::vector<unsigned long long>{0});
    tq4_attention({queries,
                   {memory.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim},
                   codec_of<Tq4Codec>(s.head_dim, fixed_.bits),
                   on_device,
                   kv_len ? DeviceCount{length.data(), options.mask ? *kv_len : -1} : DeviceCount{},
                   make_view(out.data(), s.batch, n_query, s.n_head, s.head_dim)},
                  plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr, count.data());
    n_record_ = count.to_host()[0];
    return widen(out.to_host());
  }

  /// Records that the last attend() visited, over all blocks.
  [[nodiscard]] unsigned long long n_record() const { return n_record_; }

  [[nodiscard]] NaiveAttention exact(const Sees& sees) const {
    const AttentionShape& s = case_.shape;
    const std::vector<double> k = decoded(CacheSide::kKey), v = decoded(CacheSide::kValue);
    NaiveAttention exact = naive_attention(s, case_.scale, q_, k, v, sees);
    const auto longest = [&](const std::vector<double>& x) {
      const Eigen::Map<const Matrix<double>> rows(x.data(), static_cast<Eigen::Index>(x.size()) / s.head_dim,
                                                  s.head_dim);
      return rows.rowwise().norm().maxCoeff();
    };
    const Eigen::Map<const Matrix<float>> queries(q_.data(), static_cast<Eigen::Index>(q_.size()) / s.head_dim,
                                                  s.head_dim);
    const Eigen::VectorXd lengths = queries.cast<double>().rowwise().norm();
    const double longest_k = longest(k), longest_v = longest(v);
    for (std::size_t i = 0; i < exact.out.size(); ++i) {  // magnitudes as lengths: attention_bound in a rotated space
      exact.score_magnitude[i] = case_.scale * lengths[static_cast<Eigen::Index>(i) / s.head_dim] * longest_k;
      exact.value_magnitude[i] = longest_v;
    }
    return exact;
  }
  [[nodiscard]] std::vector<double> bounds(const NaiveAttention& exact) const {
    const AttentionShape& s = case_.shape;
    std::vector<double> bounds(exact.out.size());
    for (std::size_t i = 0; i < bounds.size(); ++i) {
      const double score = exact.score_magnitude[i];
      bounds[i] = attention_bound(decode_rounding(s.head_dim, s.buffer_len, 300, score), s.head_dim, score,
                                  exact.value_magnitude[i]);
    }
    return bounds;
  }
  /// How results are compared with exact ones, `actual` being those of the first queries.
  [[nodiscard]] testing::AssertionResult compare(std::span<const float> actual, const NaiveAttention& exact) const {
    return vectors_close(actual, exact.out, bounds(exact), case_.shape.head_dim);
  }

 private:
  DeviceSubject(const AttentionCase& c, const Fixed& fixed, const std::vector<float>& q, std::int64_t buffer_len)
      : case_(c), fixed_(fixed), q_(q), cache_(c.shape.batch, c.shape.n_head_kv, buffer_len, c.shape.head_dim) {
    case_.shape.buffer_len = buffer_len;
  }

  /// Every row of one side decoded in double: [batch, n_head_kv, buffer_len, head_dim].
  [[nodiscard]] std::vector<double> decoded(CacheSide side) const {
    const CacheShape& s = cache_.shape();
    const ConstTq4CacheView view = cache_.view();
    const bool is_key = side == CacheSide::kKey;
    Matrix<double> rows(s.batch * s.n_head_kv * s.buffer_len, s.head_dim);
    for (std::int64_t b = 0; b < s.batch; ++b) {
      for (std::int64_t h = 0; h < s.n_head_kv; ++h) {
        const auto [codes, norms] = reference::tq4_rows(is_key ? view.k_codes : view.v_codes,
                                                        is_key ? view.k_norm : view.v_norm, b, h, 0, s.buffer_len);
        codec_with_device_levels(s.head_dim, fixed_.bits)
            .decompress(side, codes, norms, rows.middleRows((b * s.n_head_kv + h) * s.buffer_len, s.buffer_len));
      }
    }
    return {rows.data(), rows.data() + rows.size()};
  }

  AttentionCase case_;
  Fixed fixed_;
  std::vector<float> q_;
  Tq4CacheBuffer cache_;
  mutable unsigned long long n_record_ = 0;
};

/// tests/support/record_decode_promises.hpp holds it to its list.
struct Tq4Decode {
  using Subject = DeviceSubject;
  using Fixed = cuda::Fixed;
  static constexpr std::int64_t kMostQueries = kTq4DecodeQueries;
  [[nodiscard]] static Fixed draw(const AttentionCase& /*c*/) { return usual(); }
  [[nodiscard]] static Fixed usual() { return {.choice = {.path = Tq4Path::kDecode}}; }
};
INSTANTIATE_TYPED_TEST_SUITE_P(Tq4Gpu, RecordDecode, Tq4Decode);

TEST(Tq4AttentionGpu, EveryTileAgreesWithTheNaiveLoop) {
  const DeviceInfo device = current_device();
  for (const int bits : {4, 3, 2}) {
    for (const Tq4DecodeTile& tile : kTq4DecodeTiles) {
      if (tile.smem_bytes() > device.smem_limit_bytes) continue;
      for (const int n_split : {1, 3}) {
        const AttentionCase c = example_case(tile.head_dim, 6, 3, 700);
        const DeviceSubject subject(
            c, {.choice = {.path = Tq4Path::kDecode, .decode = {.tile = tile, .n_split = n_split}}, .bits = bits});
        const std::vector<float> out = subject.attend(c.options(), c.kv_len);
        EXPECT_TRUE(subject.compare(out, subject.exact(sees_of(c))))
            << "head_dim " << tile.head_dim << ", pairs " << tile.pairs << ", n_stage " << tile.n_stage << ", " << bits
            << " bits";
        EXPECT_FALSE(subject.compare(subject.attend(c.options(), c.kv_len / 8), subject.exact(sees_of(c))));
      }
    }
  }
}

constexpr AttentionShape kGood{.batch = 1, .n_query = 2, .n_head = 8, .n_head_kv = 2, .head_dim = 64, .buffer_len = 20};

TEST(Tq4AttentionPlan, MisuseIsRefusedBeforeAnyLaunch) {
  const DeviceInfo device{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};
  const auto plan = [&](auto break_it, AttentionOptions options = {}) {
    return [=] {
      AttentionShape shape = kGood;
      break_it(shape);
      (void)plan_tq4_attention(shape, options, device);
    };
  };
  const auto none = [](auto&) {};
  EXPECT_NO_THROW(plan(none)());
  EXPECT_TRUE(refuses(plan([](AttentionShape& s) { s.n_head = 7; }), {"n_head 7", "n_head_kv 2"}));
  EXPECT_TRUE(refuses(plan([](AttentionShape& s) { s.head_dim = 96; }), {"head_dim 96"}));
  const char byte = 0;
  const auto masked = [&](ElementType type, std::int64_t heads) {
    return AttentionOptions{.mask = MaskView{.data = &byte, .type = type, .shape = {1, heads, 2, 20}}};
  };
  EXPECT_TRUE(refuses(plan(none, masked(ElementType::kF32, 1)), {"mask"}));
  EXPECT_TRUE(refuses(plan(none, masked(ElementType::kBool, 8)), {"mask has 8 heads"}));

  struct Call {
    View<const Bf16, 4> q;
    View<Bf16, 4> out;
    ConstTq4Records cache;
    AttentionOptions options;
    DeviceCount kv_len;
    std::size_t workspace;
  };
  std::vector<Bf16> memory(2 * 8 * 64 + 8);
  alignas(16) static std::byte cache[1 << 14];
  std::vector<std::byte> workspace(1 << 20);
  const Tq4Codec codec(64, {});
  const Tq4AttentionPlan good = plan_tq4_attention(kGood, {}, device);
  const auto call = [&](auto break_it) {
    return [&, break_it] {
      Call c{.q = make_view(std::as_const(memory).data(), 1, 2, 8, 64),
             .out = make_view(memory.data(), 1, 2, 8, 64),
             .cache = {cache, 1, 2, 20, 64},
             .options = {},
             .kv_len = DeviceCount::on_host(9),
             .workspace = static_cast<std::size_t>(good.workspace_bytes)};
      break_it(c);
      tq4_attention({c.q, c.cache, codec, c.options, c.kv_len, c.out}, good, {workspace.data(), c.workspace}, nullptr);
    };
  };
  EXPECT_TRUE(refuses(call([](Call& c) { c.kv_len = DeviceCount::on_host(21); }), {"kv_len 21", "buffer_len = 20"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.kv_len = DeviceCount::on_host(1); }), {"kv_len 1", "n_query 2"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.q.extent[1] = 1; }), {"out", "need 1"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.cache.buffer_len = 19; }), {"another shape"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.cache.head_dim = 128; }), {"codec of head_dim 64", "128"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.cache.n_head_kv = 3; }), {"n_head 8", "n_head_kv 3"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.workspace -= 1; }), {"workspace", "plan_tq4_attention()"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.q.data += 1; }), {"q is not aligned"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.q.stride[3] = 2; }), {"q has stride 2"}));
}

}  // namespace
}  // namespace gemma4::cuda
