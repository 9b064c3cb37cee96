// SPDX-License-Identifier: Apache-2.0
#include "cuda/kv_attention.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "cuda/device/device_buffer.cuh"
#include "reference/kv_attention.hpp"
#include "tests/support/attention_promises.hpp"
#include "tests/support/bf16_values.hpp"
#include "tests/support/kv_device.cuh"
#include "tests/support/kv_tiles.cuh"
#include "tests/support/record_decode_promises.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/tq4_device.cuh"

// What decode of attention over one vector for K and V promises, over random shapes and widths. Shapes of the model,
// graphs and prefill: kv_attention_decode_test.cu.
namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::KvCacheBuffer;
using reference::Matrix;

struct Fixed {
  KvAttentionChoice choice = {.path = KvPath::kDecode};
  std::int64_t smem_limit_bytes = 0;  ///< 0: the device's
  KvOptions format = {};
};

/// kv_attention on the device over a cache that the reference compressed, its K and V those of the case: V whole and
/// what turns of K.
class DeviceSubject {
 public:
  explicit DeviceSubject(const AttentionCase& c, const Fixed& fixed = {})
      : case_(c), fixed_(fixed), q_(c.q()), weight_(draw_k_weight(c.shape.head_dim)), cache_(buffer(c.shape)) {
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
    reference::kv_cache_update<float>(kv_codec_of<reference::KvCodec<float>>(s.head_dim, fixed_.format),
                                      tokens_first(k), tokens_first(v), weight_, positions, cache_.view());
  }

  /// Norms a thousand times larger or NaN, and other codes.
  void spoil(std::int64_t first, std::int64_t last, Spoil kind) {
    const KvCacheView view = cache_.view();
    for (std::int64_t b = 0; b < case_.shape.batch; ++b) {
      for (std::int64_t h = 0; h < case_.shape.n_head_kv; ++h) {
        for (std::int64_t j = first; j < last; ++j) {
          for (KvNorm* norm : {&view.v_norm(b, h, j), &view.r_norm(b, h, j)}) {
            *norm = to_f16(kind == Spoil::kNaN ? std::numeric_limits<float>::quiet_NaN() : 1000 * to_float(*norm));
          }
          for (std::int64_t i = 0; i < view.v_codes.extent[3]; ++i) view.v_codes(b, h, j, i) ^= 0x5A;
          for (std::int64_t i = 0; i < view.r_codes.extent[3]; ++i) view.r_codes(b, h, j, i) ^= 0xF0;
        }
      }
    }
  }

  [[nodiscard]] DeviceSubject sliced(std::int64_t kv_len) const {
    DeviceSubject slice(case_, fixed_, q_, weight_, kv_len);
    const ConstKvCacheView from = cache_.view();
    const KvCacheView to = slice.cache_.view();
    for (std::int64_t b = 0; b < case_.shape.batch; ++b) {
      for (std::int64_t h = 0; h < case_.shape.n_head_kv; ++h) {
        std::copy_n(&from.v_codes(b, h, 0, 0), kv_len * from.v_codes.extent[3], &to.v_codes(b, h, 0, 0));
        std::copy_n(&from.r_codes(b, h, 0, 0), kv_len * from.r_codes.extent[3], &to.r_codes(b, h, 0, 0));
        std::copy_n(&from.v_norm(b, h, 0), kv_len, &to.v_norm(b, h, 0));
        std::copy_n(&from.r_norm(b, h, 0), kv_len, &to.r_norm(b, h, 0));
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
    const DeviceBuffer<float> weight(weight_);
    const DeviceBuffer<std::byte> memory = kv_records_of(cache_, s.head_dim, fixed_.format);
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
    const KvAttentionPlan plan = plan_kv_attention(s, fixed_.format, on_device, device, fixed_.choice);
    DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
    workspace.fill_bytes(0xFF);
    DeviceBuffer<std::int32_t> length(std::vector<std::int32_t>{static_cast<std::int32_t>(kv_len.value_or(0))});
    DeviceBuffer<unsigned long long> count(std::vector<unsigned long long>{0});
    kv_attention(
        {queries,
         weight.data(),
         {memory.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim, fixed_.format.v_bits, fixed_.format.r_bits},
         kv_codec_of<KvCodec>(s.head_dim, fixed_.format),
         on_device,
         kv_len ? DeviceCount{length.data(), options.mask ? *kv_len : -1} : DeviceCount{},
         make_view(out.data(), s.batch, n_query, s.n_head, s.head_dim)},
        plan, {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr, count.data());
    n_record_ = count.to_host()[0];
    return widen(out.to_host());
  }

  /// Records that the last attend() visited, over all blocks.
  [[nodiscard]] unsigned long long n_record() const { return n_record_; }

  /// What an oracle must get wrong on purpose.
  enum class Fault { kNone, kWeightNotFolded, kRotatedNotZeroed, kScaleForgotten };

  [[nodiscard]] NaiveAttention exact(const Sees& sees, Fault fault = Fault::kNone) const {
    const AttentionShape& s = case_.shape;
    const KvRebuilt<double> rebuilt(cache_, kv_codec_with_device_levels(s.head_dim, fixed_.format), weight_);
    Matrix<double> k = rebuilt.k;
    for (std::int64_t i = 0; i < s.head_dim; ++i) {
      const double w = weight_[static_cast<std::size_t>(i)];
      if (kv_is_rotated(s.head_dim, i)) {
        if (fault == Fault::kRotatedNotZeroed) k.col(i) += w * rebuilt.v.col(i);
        const std::int64_t half = s.head_dim / 2, pair = i % half;
        if (fault == Fault::kScaleForgotten) {
          k.col(i) /= kv_rotated_scale(weight_.data(), s.head_dim, i < half ? pair : pair + s.head_dim / 8);
        }
      } else if (fault == Fault::kWeightNotFolded) {
        k.col(i) = rebuilt.v.col(i);
      }
    }
    const auto flat = [](const Matrix<double>& m) { return std::vector<double>(m.data(), m.data() + m.size()); };
    NaiveAttention exact = naive_attention(s, case_.scale, q_, flat(k), flat(rebuilt.v), sees);
    const double longest_v = rebuilt.v.rowwise().norm().maxCoeff(), longest_r = rebuilt.r.rowwise().norm().maxCoeff();
    for (std::size_t i = 0; i < exact.out.size(); ++i) {  // magnitudes as lengths: attention_bound in a rotated space
      const float* const q = &q_[i / static_cast<std::size_t>(s.head_dim) * static_cast<std::size_t>(s.head_dim)];
      double of_v = 0, of_r = 0;
      for (std::int64_t d = 0; d < s.head_dim; ++d) {
        const double w = weight_[static_cast<std::size_t>(d)];
        const std::int64_t half = s.head_dim / 2, pair = d % half;
        const double c =
            kv_rotated_scale(weight_[static_cast<std::size_t>(pair)], weight_[static_cast<std::size_t>(pair + half)]);
        const double value = static_cast<double>(q[d]) * (kv_is_rotated(s.head_dim, d) ? c : w);
        (kv_is_rotated(s.head_dim, d) ? of_r : of_v) += value * value;
      }
      exact.score_magnitude[i] = case_.scale * (std::sqrt(of_v) * longest_v + std::sqrt(of_r) * longest_r);
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
  DeviceSubject(const AttentionCase& c, const Fixed& fixed, const std::vector<float>& q,
                const std::vector<float>& weight, std::int64_t buffer_len)
      : case_(c), fixed_(fixed), q_(q), weight_(weight), cache_(buffer(shape_of(c, buffer_len))) {
    case_.shape.buffer_len = buffer_len;
  }
  [[nodiscard]] static AttentionShape shape_of(const AttentionCase& c, std::int64_t buffer_len) {
    AttentionShape shape = c.shape;
    shape.buffer_len = buffer_len;
    return shape;
  }
  [[nodiscard]] KvCacheBuffer buffer(const AttentionShape& s) const {
    return {s.batch, s.n_head_kv, s.buffer_len, kv_code_bytes(s.head_dim, fixed_.format.v_bits),
            kv_code_bytes(kv_rotated_size(s.head_dim), fixed_.format.r_bits)};
  }

  AttentionCase case_;
  Fixed fixed_;
  std::vector<float> q_, weight_;
  KvCacheBuffer cache_;
  mutable unsigned long long n_record_ = 0;
};

/// tests/support/record_decode_promises.hpp holds it to its list.
struct KvDecode {
  using Subject = DeviceSubject;
  using Fixed = cuda::Fixed;
  static constexpr std::int64_t kMostQueries = kKvDecodeQueries;
  /// Every other time a configuration of those that fit, with all the memory that there is.
  [[nodiscard]] static Fixed draw(const AttentionCase& c) {
    Fixed fixed{.format = some_format()};
    if (*rc::gen::arbitrary<bool>()) {
      fixed.choice.decode.tile = *rc::gen::elementOf(tiles_for(c.shape.head_dim, fixed.format));
    }
    RC_LOG() << "kv" << fixed.format.v_bits << "r" << fixed.format.r_bits << '\n';
    return fixed;
  }
  [[nodiscard]] static Fixed usual() { return {}; }
};
INSTANTIATE_TYPED_TEST_SUITE_P(KvGpu, RecordDecode, KvDecode);

std::string name_of(const KvDecodeTile& tile, const KvOptions& format) {
  return concat("tile d", tile.head_dim, " of ", tile.v_bits, "/", tile.r_bits, " bits, warps ", tile.team_warps, " x ",
                tile.teams, ", stages ", tile.n_stage, ", row tiles ", tile.row_tiles, ", ", tile.batch, " at a time",
                tile.by_product ? ", turned by products" : ", turned by movmatrix", "; kv", format.v_bits, "r",
                format.r_bits);
}

/// Few keys of even weights, so that each of them matters far above the bounds.
AttentionCase few_keys(AttentionCase c) {
  c = even_case(c);
  c.kv_len = std::min<std::int64_t>(c.kv_len, c.shape.n_query + 7);
  c.shape.buffer_len = c.kv_len + 3;
  return c;
}

/// However a team divides its records, and however many it takes at a time: what differs is how weights are rounded and
/// the order of sums. Control: one key fewer is seen in each.
RC_GTEST_PROP(KvAttentionGpu, AnyTileAgreesWithTheFirst, (const AttentionCase& original)) {
  AttentionCase c = original;
  c.shape.n_query = std::clamp<std::int64_t>(c.shape.n_query, 1, kKvDecodeQueries);
  c.kv_len = std::max(c.kv_len, c.shape.n_query);
  c.shape.buffer_len = std::max(c.shape.buffer_len, c.kv_len + 1);
  cuda::Fixed fixed;
  c.shape.head_dim = *rc::gen::weightedElement<std::int64_t>({{6, 512}, {1, 256}});
  fixed.format = {.v_bits = *rc::gen::element(4, 5)};
  fixed.smem_limit_bytes = 0;
  std::vector<float> first;
  for (const KvDecodeTile& tile : tiles_for(c.shape.head_dim, fixed.format)) {
    fixed.choice.decode.tile = tile;
    const DeviceSubject subject(c, fixed);
    const std::vector<float> out = subject.attend(c.options(), c.kv_len);
    if (first.empty()) first = out;
    std::vector<double> bounds = subject.bounds(subject.exact(sees_of(c)));
    for (double& bound : bounds) bound *= 2;  // each is within one bound of the exact result
    rc_require(vectors_close(out, std::vector<double>(first.begin(), first.end()), bounds, c.shape.head_dim),
               name_of(tile, fixed.format));
    const AttentionCase few = few_keys(c);
    const DeviceSubject control(few, fixed);
    const Sees one_short = [&few](std::int64_t, std::int64_t t, std::int64_t j) { return j < few.limit(t) - 1; };
    RC_ASSERT(!control.compare(control.attend(few.options(), few.kv_len), control.exact(one_short)));
  }
}

/// Every compiled configuration, and each width of either side in those that take any.
TEST(KvAttentionGpu, EveryTileAgreesWithTheNaiveLoop) {
  const DeviceInfo device = current_device();
  for (const KvDecodeTile& tile : kKvDecodeTiles) {
    if (tile.smem_bytes() > device.smem_limit_bytes) continue;
    for (const KvOptions& format : {KvOptions{}, KvOptions{.v_bits = 4}, KvOptions{.v_bits = 3, .r_bits = 6},
                                    KvOptions{.v_bits = 6, .r_bits = 5}, KvOptions{.v_bits = 5, .r_bits = 3}}) {
      if (!tile.takes(format.v_bits, format.r_bits)) continue;
      for (const int n_split : {1, 3}) {
        const AttentionCase c = example_case(tile.head_dim, 6, 3, 700);
        const DeviceSubject subject(
            c, {.choice = {.path = KvPath::kDecode, .decode = {.tile = tile, .n_split = n_split}}, .format = format});
        const std::vector<float> out = subject.attend(c.options(), c.kv_len);
        EXPECT_TRUE(subject.compare(out, subject.exact(sees_of(c))))
            << name_of(tile, format) << ", n_split " << n_split;
        EXPECT_FALSE(subject.compare(subject.attend(c.options(), c.kv_len / 8), subject.exact(sees_of(c))));
      }
    }
  }
}

/// One key: the result is its V whatever the scores are. If this fails where nothing is summed, the tile of V is turned
/// or merged wrongly; if this holds and more keys fail, it is the scores.
TEST(KvAttentionGpu, OneKeyGivesItsValue) {
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    for (const int v_bits : {3, 4, 5, 6}) {
      AttentionCase c = example_case(head_dim, 8, 1, 1);
      const DeviceSubject subject(c, {.format = {.v_bits = v_bits}});
      EXPECT_TRUE(subject.compare(subject.attend(c.options(), 1), subject.exact(sees_of(c))))
          << head_dim << ", " << v_bits << " bits";
    }
  }
}

/// What reading K from V can get wrong shows: w that is not folded, rotated places that are not zeroed, scales of R
/// that are forgotten.
TEST(KvAttentionGpu, FaultsOfTheQueryShow) {
  using Fault = DeviceSubject::Fault;
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    AttentionCase c = example_case(head_dim, 8, 2, 200);
    c.scale *= 2.0f;
    const DeviceSubject subject(c, {});
    const std::vector<float> out = subject.attend(c.options(), c.kv_len);
    EXPECT_TRUE(subject.compare(out, subject.exact(sees_of(c)))) << head_dim;
    for (const Fault fault : {Fault::kWeightNotFolded, Fault::kRotatedNotZeroed, Fault::kScaleForgotten}) {
      EXPECT_FALSE(subject.compare(out, subject.exact(sees_of(c), fault)))
          << head_dim << ", fault " << static_cast<int>(fault);
    }
  }
}

constexpr AttentionShape kGood{.batch = 1, .n_query = 2, .n_head = 8, .n_head_kv = 2, .head_dim = 64, .buffer_len = 20};

TEST(KvAttentionPlan, MisuseIsRefusedBeforeAnyLaunch) {
  const DeviceInfo device{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};
  const auto plan = [&](auto break_it, AttentionOptions options = {}) {
    return [=] {
      AttentionShape shape = kGood;
      break_it(shape);
      (void)plan_kv_attention(shape, {}, options, device);
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
  EXPECT_TRUE(refuses(
      [&] { (void)plan_kv_attention(kGood, {.v_bits = 16, .r_bits = 16}, {}, device, {.path = KvPath::kDecode}); },
      {"no tile", "16 and 16 bits"}));

  struct Call {
    View<const Bf16, 4> q;
    View<Bf16, 4> out;
    const float* weight;
    ConstKvRecords cache;
    AttentionOptions options;
    DeviceCount kv_len;
    std::size_t workspace;
  };
  std::vector<Bf16> memory(2 * 8 * 64 + 8);
  alignas(16) static std::byte cache[1 << 14];
  alignas(16) static float weight[64];
  std::vector<std::byte> workspace(1 << 20);
  const KvCodec codec(64, {});
  const KvAttentionPlan good = plan_kv_attention(kGood, {}, {}, device);
  const auto call = [&](auto break_it) {
    return [&, break_it] {
      Call c{.q = make_view(std::as_const(memory).data(), 1, 2, 8, 64),
             .out = make_view(memory.data(), 1, 2, 8, 64),
             .weight = weight,
             .cache = {cache, 1, 2, 20, 64, 5, 4},
             .options = {},
             .kv_len = DeviceCount::on_host(9),
             .workspace = static_cast<std::size_t>(good.workspace_bytes)};
      break_it(c);
      kv_attention({c.q, c.weight, c.cache, codec, c.options, c.kv_len, c.out}, good, {workspace.data(), c.workspace},
                   nullptr);
    };
  };
  EXPECT_TRUE(refuses(call([](Call& c) { c.kv_len = DeviceCount::on_host(21); }), {"kv_len 21", "buffer_len = 20"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.kv_len = DeviceCount::on_host(1); }), {"kv_len 1", "n_query 2"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.q.extent[1] = 1; }), {"out", "need 1"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.cache.buffer_len = 19; }), {"another shape"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.cache.head_dim = 128; }), {"codec of head_dim 64", "128"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.cache.v_bits = 4; }), {"codec of 5 and 4 bits", "4 and 4"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.cache.n_head_kv = 3; }), {"n_head 8", "n_head_kv 3"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.workspace -= 1; }), {"workspace", "plan_kv_attention()"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.weight = nullptr; }), {"k_weight"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.q.data += 1; }), {"q is not aligned"}));
  EXPECT_TRUE(refuses(call([](Call& c) { c.q.stride[3] = 2; }), {"q has stride 2"}));
}

}  // namespace
}  // namespace gemma4::cuda
