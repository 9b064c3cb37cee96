// SPDX-License-Identifier: Apache-2.0
#include "cuda/tq4_attention.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <numeric>

#include "cuda/device_buffer.cuh"
#include "cuda/stream.cuh"
#include "gemma4/tq4_golden.hpp"
#include "reference/tq4_attention.hpp"
#include "tests/support/attention_promises.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;
using reference::CacheSide;
using reference::Matrix;
using reference::Tq4CacheBuffer;

/// Bits of K and V in the subjects' caches; 4 takes the kernels with byte levels, fewer the others.
int codebook_bits = 4;

/// Codecs are drawn once: solving a codebook costs more than a small attention.
template <class TCodec>
const TCodec& codec_of(std::int64_t head_dim) {
  static std::map<std::pair<std::int64_t, int>, std::unique_ptr<TCodec>> codecs;
  auto& codec = codecs[{head_dim, codebook_bits}];
  if (!codec) {
    codec = std::make_unique<TCodec>(head_dim, Tq4Options{.k_bits = codebook_bits, .v_bits = codebook_bits});
  }
  return *codec;
}

/// The reference with the levels as the device reads them.
const reference::Tq4Codec<double>& codec_with_device_levels(std::int64_t head_dim) {
  static std::map<std::pair<std::int64_t, int>, std::unique_ptr<reference::Tq4Codec<double>>> codecs;
  auto& codec = codecs[{head_dim, codebook_bits}];
  if (!codec) {
    const Tq4Codec& device = codec_of<Tq4Codec>(head_dim);
    const auto read = [](const Codebook& book, const std::optional<ByteLevels>& bytes) {
      return bytes ? rounded_codebook(book, *bytes) : book;
    };
    codec = std::make_unique<reference::Tq4Codec<double>>(
        reference::Rotation<double>::signed_hadamard(head_dim, 0), read(device.k_codebook(), device.k_bytes()),
        read(device.v_codebook(), device.v_bytes()), NormKind::kCorrected);
  }
  return *codec;
}

std::vector<Bf16> narrow(const std::vector<float>& values) {
  std::vector<Bf16> out(values.size());
  std::transform(values.begin(), values.end(), out.begin(), to_bf16);
  return out;
}

std::vector<float> widen(const std::vector<Bf16>& values) {
  std::vector<float> out(values.size());
  std::transform(values.begin(), values.end(), out.begin(), [](Bf16 value) { return to_float(value); });
  return out;
}

double cosine(const std::vector<float>& a, const std::vector<double>& b) {
  double ab = 0, aa = 0, bb = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    ab += a[i] * b[i], aa += static_cast<double>(a[i]) * a[i], bb += b[i] * b[i];
  }
  return ab / std::sqrt(aa * bb);
}

/// Rows of the shared format, in records on the device.
DeviceBuffer<std::byte> records_of(const Tq4CacheBuffer& cache) {
  const CacheShape& s = cache.shape();
  const auto copy = [](const auto& view) {
    using T = std::remove_cvref_t<decltype(*view.data)>;
    return DeviceBuffer<T>(std::span<const T>(view.data, static_cast<std::size_t>(view.size())));
  };
  const ConstTq4CacheView host = cache.view();
  const auto k_codes = copy(host.k_codes), v_codes = copy(host.v_codes);
  const auto k_norm = copy(host.k_norm), v_norm = copy(host.v_norm);
  ConstTq4CacheView device = host;
  device.k_codes.data = k_codes.data(), device.v_codes.data = v_codes.data();
  device.k_norm.data = k_norm.data(), device.v_norm.data = v_norm.data();
  DeviceBuffer<std::byte> memory(tq4_cache_bytes(s.batch, s.n_head_kv, s.buffer_len, s.head_dim));
  memory.fill_bytes(0xFF);
  tq4_rows_to_records(device, {memory.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim}, nullptr);
  check(cudaDeviceSynchronize(), "conversion to records");
  return memory;
}

/// Against the levels as the device reads them: q in fp16 (and those levels, of fewer than 4 bits, too), which moves a
/// score by at most 2^-10 of |q| |k| = `score`; weights, the result and V levels of fewer than 4 bits in bf16 (2^-8
/// each); float sums. The tensor cores and ex2.approx are allowed two bits more than one rounding an operation.
AttentionRounding decode_rounding(std::int64_t head_dim, std::int64_t kv_len, int n_split, double score) {
  return {.unit = 0x1p-22,
          .weight_unit = 0x1p-8 + 0x1p-10 * score,
          .output_unit = 2 * 0x1p-8,
          .longest_sum = kv_len / 16 + 16 + n_split,
          .n_rescale = kv_len / 16 + n_split + 8,
          .rotation_roundings = std::log2(static_cast<double>(head_dim)) + 2};
}

/// attention_bound in a rotated space bounds the length of the error of a whole head vector: that is compared here, one
/// number a vector, which is far sharper than the same bound on each of its elements.
testing::AssertionResult vectors_close(std::span<const float> actual, std::span<const double> exact,
                                       std::span<const double> bounds, std::int64_t head_dim) {
  std::vector<double> length, bound;
  const auto step = static_cast<std::size_t>(head_dim);
  for (std::size_t first = 0; first < actual.size(); first += step) {
    double squares = 0;
    for (std::size_t i = first; i < first + step; ++i) squares += (actual[i] - exact[i]) * (actual[i] - exact[i]);
    length.push_back(std::sqrt(squares));
    bound.push_back(bounds[first]);
  }
  return close(length, std::vector<double>(length.size()), bound);
}

struct Fixed {
  Tq4AttentionChoice choice = {};
  std::int64_t smem_limit_bytes = 0;  ///< 0: the device's
};

/// tq4_attention on the device over a cache that the reference compressed.
class DeviceSubject {
 public:
  inline static Fixed fixed = {};

  explicit DeviceSubject(const AttentionCase& c)
      : case_(c), q_(c.q()), cache_(c.shape.batch, c.shape.n_head_kv, c.shape.buffer_len, c.shape.head_dim) {
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
    reference::tq4_cache_update<float>(codec_of<reference::Tq4Codec<float>>(s.head_dim), tokens_first(k),
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
    DeviceSubject slice(case_, q_, kv_len);
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
    if (fixed.smem_limit_bytes > 0) device.smem_limit_bytes = fixed.smem_limit_bytes;
    AttentionOptions on_device = options;
    DeviceBuffer<std::uint8_t> mask;
    if (options.mask) {
      const auto* bytes = static_cast<const std::uint8_t*>(options.mask->data);
      mask = DeviceBuffer<std::uint8_t>(std::vector<std::uint8_t>(
          bytes, bytes + options.mask->shape[0] * options.mask->shape[2] * options.mask->shape[3]));
      on_device.mask->data = mask.data();
    }
    const Tq4AttentionPlan plan = plan_tq4_attention(s, on_device, device, fixed.choice);
    DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
    workspace.fill_bytes(0xFF);
    DeviceBuffer<std::int32_t> length(std::vector<std::int32_t>{static_cast<std::int32_t>(kv_len.value_or(0))});
    DeviceBuffer<unsigned long long> count(std::vector<unsigned long long>{0});
    tq4_attention(queries, {memory.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim},
                  codec_of<Tq4Codec>(s.head_dim), on_device,
                  kv_len ? DeviceCount{length.data(), options.mask ? *kv_len : -1} : DeviceCount{},
                  make_view(out.data(), s.batch, n_query, s.n_head, s.head_dim), plan,
                  {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr, count.data());
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
  DeviceSubject(const AttentionCase& c, const std::vector<float>& q, std::int64_t buffer_len)
      : case_(c), q_(q), cache_(c.shape.batch, c.shape.n_head_kv, buffer_len, c.shape.head_dim) {
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
        codec_with_device_levels(s.head_dim)
            .decompress(side, codes, norms, rows.middleRows((b * s.n_head_kv + h) * s.buffer_len, s.buffer_len));
      }
    }
    return {rows.data(), rows.data() + rows.size()};
  }

  AttentionCase case_;
  std::vector<float> q_;
  Tq4CacheBuffer cache_;
  mutable unsigned long long n_record_ = 0;
};

/// A decode case: few queries, and a random number of splits, tile and memory limit.
AttentionCase decode_case(AttentionCase c) {
  c.shape.n_query = std::clamp<std::int64_t>(c.shape.n_query, 1, 4);
  c.kv_len = std::max(c.kv_len, c.shape.n_query);
  c.shape.buffer_len = std::max(c.shape.buffer_len, c.kv_len + 1);
  DeviceSubject::fixed = {.choice = {.path = Tq4Path::kDecode}};
  if (*rc::gen::arbitrary<bool>()) DeviceSubject::fixed.choice.decode.n_split = *rc::gen::inRange(1, 40);
  DeviceSubject::fixed.smem_limit_bytes = *rc::gen::element<std::int64_t>(0, 99 * 1024);
  return c;
}

/// Few keys of even weights, so that each of them matters far above the bounds.
AttentionCase control_case(AttentionCase c) {
  c = even_case(c);
  c.kv_len = std::min<std::int64_t>(c.kv_len, c.shape.n_query + 7);
  c.shape.buffer_len = c.kv_len + 3;
  return c;
}

/// Control: an oracle whose causal diagonal is one key too short does not agree.
RC_GTEST_PROP(Tq4AttentionGpu, DecodeAgreesWithTheNaiveLoopOnDecodedRows, (const AttentionCase& original)) {
  const AttentionCase c = decode_case(original);
  const DeviceSubject subject(c);
  rc_require(subject.compare(subject.attend(c.options(), c.kv_len), subject.exact(sees_of(c))));
  const AttentionCase few = control_case(c);
  const DeviceSubject control(few);
  const std::vector<float> out = control.attend(few.options(), few.kv_len);
  rc_require(control.compare(out, control.exact(sees_of(few))));
  const Sees one_short = [&few](std::int64_t, std::int64_t t, std::int64_t j) { return j < few.limit(t) - 1; };
  RC_ASSERT(!control.compare(out, control.exact(one_short)));
}
RC_GTEST_PROP(Tq4AttentionGpu, GarbageTailIsNeverRead, (const AttentionCase& c)) {
  garbage_tail_is_never_read<DeviceSubject>(decode_case(c));
}
RC_GTEST_PROP(Tq4AttentionGpu, ClampEqualsSlice, (const AttentionCase& c)) {
  clamp_equals_slice<DeviceSubject>(decode_case(c));
}
RC_GTEST_PROP(Tq4AttentionGpu, CausalSkipChangesNothing, (const AttentionCase& c)) {
  causal_skip_changes_nothing<DeviceSubject>(decode_case(c));
}
/// Queries in pieces, each with the kv_len it then has, are what one call gives. Control: a piece with the kv_len of
/// the whole call is not.
RC_GTEST_PROP(Tq4AttentionGpu, AnyChunkSizeAgrees, (const AttentionCase& original)) {
  AttentionCase c = decode_case(original);
  c.causal = true;
  c.shape.batch = 1;
  c.shape.n_query = *rc::gen::inRange<std::int64_t>(2, 5);
  c = control_case(c);
  const DeviceSubject subject(c);
  const NaiveAttention exact = subject.exact(sees_of(c));
  const auto first = *rc::gen::inRange<std::int64_t>(1, c.shape.n_query);
  const std::int64_t second = c.shape.n_query - first;
  std::vector<float> joined = subject.attend(c.options(), c.kv_len - second, 0, first);
  RC_ASSERT(!subject.compare(subject.attend(c.options(), c.kv_len, 0, first), exact));
  const std::vector<float> tail = subject.attend(c.options(), c.kv_len, first, second);
  joined.insert(joined.end(), tail.begin(), tail.end());
  rc_require(subject.compare(joined, exact));
}
RC_GTEST_PROP(Tq4AttentionGpu, MaskHidesKeys, (const AttentionCase& c)) {
  mask_hides_keys<DeviceSubject>(decode_case(c));
}
RC_GTEST_PROP(Tq4AttentionGpu, MaskedGarbageHasNoInfluence, (const AttentionCase& c)) {
  masked_garbage_has_no_influence<DeviceSubject>(decode_case(c));
}
RC_GTEST_PROP(Tq4AttentionGpu, SameCallGivesSameBits, (const AttentionCase& c)) {
  same_call_gives_same_bits<DeviceSubject>(decode_case(c));
}

RC_GTEST_PROP(Tq4AttentionGpu, AnySplitAgreesWithOne, (const AttentionCase& original)) {
  const AttentionCase c = decode_case(original);
  DeviceSubject::fixed.choice.decode.n_split = 1;
  const DeviceSubject subject(c);
  const std::vector<float> one = subject.attend(c.options(), c.kv_len);
  DeviceSubject::fixed.choice.decode.n_split = *rc::gen::inRange(2, 300);
  const std::vector<float> many = subject.attend(c.options(), c.kv_len);
  std::vector<double> bounds = subject.bounds(subject.exact(sees_of(c)));
  for (double& bound : bounds) bound *= 2;  // each is within one bound of the exact result
  rc_require(vectors_close(many, std::vector<double>(one.begin(), one.end()), bounds, c.shape.head_dim));
}

AttentionCase example(std::int64_t head_dim, std::int64_t group, std::int64_t n_query, std::int64_t kv_len) {
  return {.shape = {.batch = 1,
                    .n_query = n_query,
                    .n_head = 2 * group,
                    .n_head_kv = 2,
                    .head_dim = head_dim,
                    .buffer_len = kv_len + 70},
          .kv_len = kv_len,
          .scale = 1.0f / std::sqrt(static_cast<float>(head_dim)),
          .seed = 11};
}

TEST(Tq4AttentionGpu, EveryTileAgreesWithTheNaiveLoop) {
  const DeviceInfo device = current_device();
  for (const int bits : {4, 3, 2}) {
    codebook_bits = bits;
    for (const Tq4DecodeTile& tile : kTq4DecodeTiles) {
      if (tile.smem_bytes() > device.smem_limit_bytes) continue;
      for (const int n_split : {1, 3}) {
        const AttentionCase c = example(tile.head_dim, 6, 3, 700);
        DeviceSubject::fixed = {.choice = {.path = Tq4Path::kDecode, .decode = {.tile = tile, .n_split = n_split}}};
        const DeviceSubject subject(c);
        const std::vector<float> out = subject.attend(c.options(), c.kv_len);
        EXPECT_TRUE(subject.compare(out, subject.exact(sees_of(c))))
            << "head_dim " << tile.head_dim << ", pairs " << tile.pairs << ", n_stage " << tile.n_stage << ", " << bits
            << " bits";
        EXPECT_FALSE(subject.compare(subject.attend(c.options(), c.kv_len / 8), subject.exact(sees_of(c))));
      }
    }
  }
  codebook_bits = 4;
}

/// The clamp and the skip save work, counted in records, not in time.
TEST(Tq4AttentionGpu, ClampAndSkipVisitFewerRecords) {
  DeviceSubject::fixed = {.choice = {.path = Tq4Path::kDecode}};
  AttentionCase c = example(256, 8, 2, 1025);  // the last record holds one key, which only the last query sees
  c.shape.buffer_len = 4096;
  const DeviceSubject subject(c);
  AttentionOptions without = c.options();
  without.causal_skip = false;
  const auto units = 2u * 2u;  // KV heads and groups of eight rows
  (void)subject.attend(c.options(), c.kv_len);
  EXPECT_EQ(subject.n_record(), units * 65u - 2u);
  (void)subject.attend(without, c.kv_len);
  EXPECT_EQ(subject.n_record(), units * 65u);
  (void)subject.attend(without, std::nullopt);
  EXPECT_EQ(subject.n_record(), units * 256u);
}

TEST(Tq4AttentionGpu, NoKeysGiveZeros) {
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    AttentionCase c = example(head_dim, 4, 4, 100);
    c.causal = false;
    DeviceSubject::fixed = {.choice = {.path = Tq4Path::kDecode}};
    const DeviceSubject subject(c);
    EXPECT_TRUE(same_bits(subject.attend(c.options(), 0), std::vector<float>(static_cast<std::size_t>(c.q_size()))));
    c.causal = true;  // fewer keys than queries: the first queries stand before the first key
    const std::vector<float> out = DeviceSubject(c).attend(c.options(), 3);
    const std::size_t row = static_cast<std::size_t>(c.shape.n_head * head_dim);
    EXPECT_TRUE(same_bits(std::span(out).first(row), std::vector<float>(row)));
    EXPECT_NE(out[row], 0.0f);
  }
}

/// One call over random records, with everything that it needs; q and cache are drawn on the host once.
struct BigCall {
  AttentionShape shape;
  AttentionOptions options;
  Tq4CacheBuffer rows;
  std::vector<float> q;
  DeviceBuffer<std::byte> memory;
  DeviceBuffer<Bf16> q_device, out;
  DeviceBuffer<std::int32_t> length{1};
  Tq4AttentionPlan plan;
  DeviceBuffer<std::byte> workspace;

  explicit BigCall(const AttentionShape& s)
      : shape(s),
        options{.scale = 1.0f},
        rows(s.batch, s.n_head_kv, s.buffer_len, s.head_dim),
        q(draw(3, s.batch * s.n_query * s.n_head * s.head_dim)),
        q_device(narrow(q)),
        out(q_device.size()),
        plan(plan_tq4_attention(s, options, current_device())),
        workspace(plan.workspace_bytes) {
    std::uint64_t state = 12345;
    const auto next = [&] { return (state = state * 6364136223846793005u + 1442695040888963407u) >> 40; };
    for (std::uint8_t& byte : rows.k_codes()) byte = static_cast<std::uint8_t>(next());
    for (std::uint8_t& byte : rows.v_codes()) byte = static_cast<std::uint8_t>(next());
    for (Tq4Norm& norm : rows.k_norm()) norm = to_bf16(0.1f + static_cast<float>(next() & 1023) * 1e-4f);
    for (Tq4Norm& norm : rows.v_norm()) norm = to_bf16(20.0f + static_cast<float>(next() & 1023) * 1e-3f);
    memory = records_of(rows);
  }
  void enqueue(DeviceCount kv_len, cudaStream_t stream) {
    const AttentionShape& s = shape;
    tq4_attention(make_view(std::as_const(q_device).data(), s.batch, s.n_query, s.n_head, s.head_dim),
                  {memory.data(), s.batch, s.n_head_kv, s.buffer_len, s.head_dim}, codec_of<Tq4Codec>(s.head_dim),
                  options, kv_len, make_view(out.data(), s.batch, s.n_query, s.n_head, s.head_dim), plan,
                  {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, stream);
  }
  [[nodiscard]] std::vector<float> run(std::int64_t kv_len) {
    const auto value = static_cast<std::int32_t>(kv_len);
    length.from_host(std::span<const std::int32_t>(&value, 1));
    out.fill_bytes(0xFF);
    enqueue(DeviceCount::on_device(length.data()), nullptr);
    return widen(out.to_host());
  }
};

/// The shapes of the model and of a smaller sibling, against the reference in double on the same packed rows. Random
/// codes do not have unit length, so the bound takes the largest level instead.
TEST(Tq4AttentionGpu, RealShapesAgreeWithTheReference) {
  struct Real {
    std::int64_t n_head, n_head_kv, head_dim, n_query, buffer_len;
    std::vector<std::int64_t> kv_len;
  };
  for (const Real& r : {Real{32, 4, 512, 1, 131072, {1, 17, 512, 8191, 32768, 131071, 131072}},
                        Real{32, 4, 512, 4, 131072, {70001}}, Real{16, 2, 256, 1, 131072, {1000, 131072}}}) {
    BigCall call({.batch = 1,
                  .n_query = r.n_query,
                  .n_head = r.n_head,
                  .n_head_kv = r.n_head_kv,
                  .head_dim = r.head_dim,
                  .buffer_len = r.buffer_len});
    const std::vector<double> q(call.q.begin(), call.q.end());
    const auto expect = [&](const reference::Tq4Codec<double>& codec, std::int64_t kv_len) {
      std::vector<double> out(q.size());
      reference::tq4_attention<double>(make_view(q.data(), 1, r.n_query, r.n_head, r.head_dim), call.rows.view(), codec,
                                       call.options, kv_len, make_view(out.data(), 1, r.n_query, r.n_head, r.head_dim));
      return out;
    };
    const auto& codec = codec_of<reference::Tq4Codec<double>>(r.head_dim);
    const double level = codec.k_codebook().centroids[15] * std::sqrt(static_cast<double>(r.head_dim));
    const double score = 1.7 * std::sqrt(static_cast<double>(r.head_dim)) * 0.21 * level, value = 21.1 * level;
    for (const std::int64_t kv_len : r.kv_len) {
      const std::vector<double> expected = expect(codec, kv_len);
      const std::vector<float> out = call.run(kv_len);
      const AttentionRounding rounding = decode_rounding(r.head_dim, kv_len, call.plan.decode.n_split, score);
      EXPECT_TRUE(vectors_close(out, expect(codec_with_device_levels(r.head_dim), kv_len),
                                std::vector<double>(out.size(), attention_bound(rounding, r.head_dim, score, value)),
                                r.head_dim))
          << kv_len;
      EXPECT_GE(cosine(out, expected), 0.9999) << r.head_dim << ", " << kv_len;
      EXPECT_TRUE(same_bits(call.run(kv_len), out)) << "twice, " << kv_len;
      if (kv_len > 16) {
        EXPECT_LT(cosine(call.run(kv_len - kv_len / 8 - 1), expected), 0.9999);  // fewer keys show
      }
    }
  }
}

/// One graph serves every kv_len from 1 past every split boundary, and every replay gives the bits of an eager call.
TEST(Tq4AttentionGpu, GraphReplaysWhileTheCacheGrows) {
  BigCall call({.batch = 1, .n_query = 1, .n_head = 32, .n_head_kv = 4, .head_dim = 512, .buffer_len = 8192});
  const Stream stream;
  const Graph graph = Graph::capture(stream, [&] { call.enqueue(DeviceCount::on_device(call.length.data()), stream); });
  EXPECT_EQ(graph.n_node(), 2u);
  std::vector<float> before;
  for (std::int32_t kv_len = 1; kv_len <= 8192; kv_len += kv_len < 40 ? 1 : 16 * 17 + 1) {
    call.length.from_host(std::span<const std::int32_t>(&kv_len, 1), stream);
    graph.launch(stream);
    const std::vector<float> replayed = widen(call.out.to_host(stream));
    call.enqueue(DeviceCount::on_host(kv_len), stream);
    ASSERT_TRUE(same_bits(replayed, widen(call.out.to_host(stream)))) << kv_len;
    ASSERT_FALSE(same_bits(replayed, before)) << kv_len;
    before = replayed;
  }
}

/// The golden cases of another implementation, whose norms are float32 and ours bf16: our result is that of the
/// reference on the same packed rows, within the bound, for every case that decode or prefill takes.
class Tq4AttentionGolden : public testing::TestWithParam<const char*> {};

TEST_P(Tq4AttentionGolden, AgreesWithTheReferenceOnTheSameRows) {
  const Tq4Golden golden = read_tq4_golden(std::string(GEMMA4_TEST_DATA) + "/tq4/" + GetParam() + ".gguf");
  const AttentionShape& s = golden.shape;
  const Eigen::Map<const Matrix<float>> matrix(golden.rotation.data(), s.head_dim, s.head_dim);
  const reference::Tq4Codec<double> codec(reference::Rotation<double>::dense(matrix.cast<double>()), golden.codebook,
                                          golden.codebook, NormKind::kRaw);
  const Tq4Codec device_codec(Rotation::dense(s.head_dim, golden.rotation), golden.codebook, golden.codebook,
                              NormKind::kRaw);
  Tq4CacheBuffer rows(1, s.n_head_kv, s.buffer_len, s.head_dim);
  std::copy(golden.k_codes.begin(), golden.k_codes.end(), rows.k_codes().begin());
  std::copy(golden.v_codes.begin(), golden.v_codes.end(), rows.v_codes().begin());
  std::transform(golden.k_norm.begin(), golden.k_norm.end(), rows.k_norm().begin(), to_bf16);
  std::transform(golden.v_norm.begin(), golden.v_norm.end(), rows.v_norm().begin(), to_bf16);
  const std::vector<Bf16> q16 = narrow(golden.q);
  const std::vector<float> q_float = widen(q16);
  const std::vector<double> q(q_float.begin(), q_float.end());
  std::vector<double> expected(q.size());
  reference::tq4_attention<double>(make_view(q.data(), 1, s.n_query, s.n_head, s.head_dim), rows.view(), codec,
                                   golden.options(), golden.kv_len,
                                   make_view(expected.data(), 1, s.n_query, s.n_head, s.head_dim));
  const DeviceBuffer<std::byte> memory = records_of(rows);
  const DeviceBuffer<Bf16> q_device(q16);
  DeviceBuffer<Bf16> out(q_device.size());
  out.fill_bytes(0xFF);
  const Tq4AttentionPlan plan = plan_tq4_attention(s, golden.options(), current_device(), {.path = Tq4Path::kDecode});
  DeviceBuffer<std::byte> workspace(plan.workspace_bytes);
  tq4_attention(make_view(q_device.data(), 1, s.n_query, s.n_head, s.head_dim),
                {memory.data(), 1, s.n_head_kv, s.buffer_len, s.head_dim}, device_codec, golden.options(),
                DeviceCount::on_host(golden.kv_len), make_view(out.data(), 1, s.n_query, s.n_head, s.head_dim), plan,
                {workspace.data(), static_cast<std::size_t>(workspace.bytes())}, nullptr);
  const std::vector<float> actual = widen(out.to_host());
  EXPECT_GE(cosine(actual, expected), 0.9999);
  EXPECT_GE(cosine(actual, {golden.out_tq4.begin(), golden.out_tq4.end()}), 0.9998);
  EXPECT_LT(cosine(actual, {golden.out_exact.begin(), golden.out_exact.end()}), 0.9998);  // compression is seen
}

INSTANTIATE_TEST_SUITE_P(Cases, Tq4AttentionGolden,
                         testing::Values("tq4-d64-h4x2-q1-kv40of64", "tq4-d128-h6x1-q7-kv33of48",
                                         "tq4-d256-h16x2-q1-kv96of128", "tq4-d512-h8x1-q5-kv72of96",
                                         "tq4-d512-h32x4-q1-kv100of128"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

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
      tq4_attention(c.q, c.cache, codec, c.options, c.kv_len, c.out, good, {workspace.data(), c.workspace}, nullptr);
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

TEST(Tq4AttentionPlan, EveryShapeFitsASmallCardAndNoDecodePlanDependsOnTheBuffer) {
  const DeviceInfo small{.sm_count = 20, .compute_capability = 86, .smem_limit_bytes = 99 * 1024};
  const DeviceInfo large{.sm_count = 132, .compute_capability = 90, .smem_limit_bytes = 232448};
  for (const std::int64_t head_dim : {64, 128, 256, 512}) {
    for (const std::int64_t n_query : {1, 4}) {
      AttentionShape shape{
          .n_query = n_query, .n_head = 32, .n_head_kv = 4, .head_dim = head_dim, .buffer_len = 131072};
      const Tq4AttentionPlan fits = plan_tq4_attention(shape, {}, small);
      EXPECT_EQ(fits.path, Tq4Path::kDecode);
      EXPECT_LE(fits.decode.smem_bytes, small.smem_limit_bytes);
      EXPECT_FALSE(fits.decode.programmatic);
      const Tq4AttentionPlan plan = plan_tq4_attention(shape, {}, large);
      shape.buffer_len = 4096;
      const Tq4AttentionPlan shorter = plan_tq4_attention(shape, {}, large);
      EXPECT_EQ(shorter.decode.n_split, plan.decode.n_split);
      EXPECT_EQ(shorter.workspace_bytes, plan.workspace_bytes);
    }
  }
  EXPECT_EQ(plan_tq4_attention({.n_head = 32, .n_head_kv = 4, .head_dim = 512, .buffer_len = 131072}, {}, large)
                .decode.n_split,
            33);
  // Control: less than any tile needs is refused, not truncated.
  const DeviceInfo tiny{.smem_limit_bytes = 16 * 1024};
  EXPECT_TRUE(refuses([&] { (void)plan_tq4_attention({.head_dim = 512, .buffer_len = 9}, {}, tiny); }, {"16384 B"}));
}

}  // namespace
}  // namespace gemma4::cuda
