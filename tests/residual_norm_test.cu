// SPDX-License-Identifier: Apache-2.0
#include "cuda/residual_norm.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/device/device_info.cuh"
#include "cuda/device/stream.cuh"
#include "reference/decoder_layer.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using reference::Matrix;
using testkit::close;
using testkit::rc_require;

constexpr float kEpsilon = 1e-6f;

struct Case {
  std::int64_t n_token, width;
  bool is_pending;
  float scale;
  std::vector<float> x, pending, post_norm, norm;

  Case(std::int64_t n, std::int64_t hidden, bool has_pending, float layer_scale, float amplitude, std::uint64_t seed)
      : n_token(n), width(hidden), is_pending(has_pending), scale(layer_scale) {
    x = testkit::draw(seed, n * hidden, 3.0f);
    pending = testkit::draw(seed + 1, n * hidden, amplitude);
    post_norm = testkit::draw(seed + 2, hidden, 2.0f);
    norm = testkit::draw(seed + 3, hidden, 2.0f);
    for (float& value : x) value *= 1.0009765625f;  // more bits than bf16 has
  }
};

Case any_case() {
  return Case(*rc::gen::inRange<std::int64_t>(1, 5),
              *rc::gen::element<std::int64_t>(1, 33, 64, 250, 256, 768, 2048, 2056, 5376, 6144, 6152, 16384),
              *rc::gen::inRange(0, 4) > 0, *rc::gen::element(1.0f, 0.25f, 1.7f), *rc::gen::element(1e-4f, 1.0f, 300.0f),
              *rc::gen::inRange<std::uint64_t>(0, 1000));
}

struct Result {
  std::vector<float> x, h;
};

std::size_t n_different(const std::vector<float>& a, const std::vector<float>& b) {
  std::size_t count = a.size() == b.size() ? 0 : 1;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    count += bit_cast<std::uint32_t>(a[i]) != bit_cast<std::uint32_t>(b[i]);
  return count;
}

/// Rows lie `stride` values apart, the first one `offset` from an aligned address; what is beside them must stay.
template <class TPending, class TOut>
Result on_device(const Case& c, std::int64_t stride, std::int64_t offset = 0, bool overlap = false,
                 bool x_at_rest = false) {
  const std::int64_t n_value = c.n_token * stride + offset;
  const auto spread = [&]<class T>(const std::vector<float>& rows, T fill) {
    std::vector<T> memory(static_cast<std::size_t>(n_value), fill);
    for (std::int64_t i = 0; i < c.n_token * c.width; ++i) {
      memory[static_cast<std::size_t>(offset + i / c.width * stride + i % c.width)] =
          from_float<T>(rows[static_cast<std::size_t>(i)]);
    }
    return memory;
  };
  const auto gathered = [&](const auto& memory) {
    std::vector<float> rows(static_cast<std::size_t>(c.n_token * c.width));
    std::int64_t n_touched = 0;
    for (std::int64_t at = 0; at < n_value; ++at) {
      const std::int64_t row = (at - offset) / stride, column = (at - offset) % stride;
      const float value = to_float(memory[static_cast<std::size_t>(at)]);
      if (at < offset || column >= c.width) {
        n_touched += value != 5.0f;
      } else {
        rows[static_cast<std::size_t>(row * c.width + column)] = value;
      }
    }
    EXPECT_EQ(n_touched, 0);
    return rows;
  };
  DeviceBuffer<float> x(spread(c.x, 5.0f));
  const DeviceBuffer<TPending> pending(spread(c.pending, from_float<TPending>(5.0f)));
  DeviceBuffer<TOut> h(std::vector<TOut>(static_cast<std::size_t>(n_value), from_float<TOut>(5.0f)));
  const DeviceBuffer<float> post_norm(c.post_norm), norm(c.norm);
  const auto rows_of = [&](auto* data) {
    auto view = make_view(data + offset, c.n_token, c.width);
    view.stride[0] = stride;
    return view;
  };
  View<const TPending, 2> pending_view = rows_of(pending.data());
  if (!c.is_pending) pending_view = {};
  residual_norm<TPending, TOut>(rows_of(x.data()), pending_view, c.is_pending ? post_norm.data() : nullptr, c.scale,
                                norm.data(), kEpsilon, rows_of(h.data()), nullptr,
                                {.overlap = overlap, .x_at_rest = x_at_rest});
  return {gathered(x.to_host()), gathered(h.to_host())};
}

/// The reference in double, and a bound for each value.
///
/// In units of u = 2^-24: a sum of squares takes width / 256 + 13 additions and a rounding each, its root, mean and
/// inverse 5 more, so that a norm's scale errs by r = (width / 256 + 20) u / 2 and a normalised value by r + 2 u; x' by
/// that of the normalised pending and 2 u of itself and of the sum before the scale. That error e of x' moves h by
/// e * scale * norm where it is, and by |e| / |x'| (two-norms) of it through the scale.
struct Expected {
  std::vector<double> x, h, x_bound, h_bound;

  Expected(const Case& c, bool pending_is_bf16, double h_unit) {
    constexpr double u = 0x1p-24;
    const double r = (static_cast<double>(c.width) / 256 + 20) * u;
    const auto matrix = [&](const std::vector<float>& values) {
      return Matrix<double>(Eigen::Map<const Matrix<float>>(values.data(), c.n_token, c.width).cast<double>());
    };
    std::vector<float> stored = c.pending;
    if (pending_is_bf16)
      std::transform(stored.begin(), stored.end(), stored.begin(), [](float v) { return to_float(to_bf16(v)); });
    Matrix<double> stream = matrix(c.x);
    const Matrix<double> before = stream;
    reference::Pending<double> pending{.value = {}, .post_norm = c.post_norm, .scale = c.scale};
    if (c.is_pending) pending.value = matrix(stored);
    const Matrix<double> normed = reference::finish_and_normalise<double>(stream, pending, c.norm, kEpsilon);
    for (Eigen::Index row = 0; row < stream.rows(); ++row) {
      double error_squares = 0;
      const std::size_t first = x_bound.size();
      for (Eigen::Index k = 0; k < stream.cols(); ++k) {
        const double sum = stream(row, k) / static_cast<double>(c.scale), added = sum - before(row, k);
        const double bound =
            c.is_pending
                ? static_cast<double>(c.scale) * (std::abs(added) * (r + 2 * u) + std::abs(sum) * 2 * u) + 1e-40
                : 0.0;
        x_bound.push_back(bound);
        error_squares += bound * bound;
      }
      const double rms_error = std::sqrt(error_squares / (stream.row(row).squaredNorm() + 1e-60));
      const double scale =
          1.0 / std::sqrt(stream.row(row).squaredNorm() / static_cast<double>(c.width) + static_cast<double>(kEpsilon));
      for (Eigen::Index k = 0; k < stream.cols(); ++k) {
        const double weight = static_cast<double>(std::abs(c.norm[static_cast<std::size_t>(k)]));
        const double moved = x_bound[first + static_cast<std::size_t>(k)] * scale * weight;
        h_bound.push_back((moved + std::abs(normed(row, k)) * (r + 2 * u + rms_error)) * 1.001 +
                          std::abs(normed(row, k)) * h_unit + 1e-38);
      }
    }
    x.assign(stream.data(), stream.data() + stream.size());
    h.assign(normed.data(), normed.data() + normed.size());
  }
};

RC_GTEST_PROP(ResidualNormGpu, AgreesWithTheReferenceInDouble, ()) {
  const Case c = any_case();
  const Expected fine(c, false, 0), coarse(c, true, 0x1p-8);
  const Result in_float = on_device<float, float>(c, c.width), in_bf16 = on_device<Bf16, Bf16>(c, c.width);
  rc_require(close(in_float.x, fine.x, fine.x_bound), "x");
  rc_require(close(in_float.h, fine.h, fine.h_bound), "h");
  rc_require(close(in_bf16.x, coarse.x, coarse.x_bound), "x");
  rc_require(close(in_bf16.h, coarse.h, coarse.h_bound), "h");
  // Controls: what is pending left out; a scale, an epsilon or a norm that is another.
  if (!c.is_pending) return;
  Case other = c;
  other.is_pending = false;
  RC_ASSERT(!close(in_float.x, Expected(other, false, 0).x, fine.x_bound));
  other = c;
  other.scale *= 1.00001f;
  RC_ASSERT(!close(in_float.x, Expected(other, false, 0).x, fine.x_bound));
  other = c;
  other.norm[0] *= 1.01f;
  RC_ASSERT(!close(in_bf16.h, Expected(other, true, 0).h, coarse.h_bound));
}

/// Bits do not depend on how the rows lie, on their company, or on the early start.
RC_GTEST_PROP(ResidualNormGpu, PlaceAndCompanyDoNotChangeABit, ()) {
  const Case c = any_case();
  const Result expected = on_device<Bf16, Bf16>(c, c.width);
  for (const std::int64_t offset : {0, 1, 8}) {
    const Result moved = on_device<Bf16, Bf16>(c, c.width + 8, offset, true);
    RC_ASSERT(n_different(moved.x, expected.x) == 0u);
    RC_ASSERT(n_different(moved.h, expected.h) == 0u);
    const Result at_rest = on_device<Bf16, Bf16>(c, c.width + 8, offset, true, true);
    RC_ASSERT(n_different(at_rest.x, expected.x) == 0u);
    RC_ASSERT(n_different(at_rest.h, expected.h) == 0u);
  }
  Case last = c;  // the last row alone
  last.n_token = 1;
  for (std::vector<float>* rows : {&last.x, &last.pending}) rows->erase(rows->begin(), rows->end() - c.width);
  const Result alone = on_device<Bf16, Bf16>(last, c.width);
  RC_ASSERT(n_different(alone.h, std::vector<float>(expected.h.end() - c.width, expected.h.end())) == 0u);
  Case changed = c;
  changed.x[0] += 1.0f;
  RC_ASSERT(n_different(on_device<Bf16, Bf16>(changed, c.width).x, expected.x) > 0u);
}

/// Two streams that read what the other one made, in turn, recorded: 120 steps, of which each reads what the one before
/// wrote.
/// @param x_at_rest  of the first stream: between two of its steps stands one of the second
std::vector<float> run_in_turn(const Case& c, bool overlap, bool x_at_rest) {
  const DeviceBuffer<float> post_norm(c.post_norm), norm(c.norm);
  std::array<DeviceBuffer<float>, 2> x = {DeviceBuffer<float>(c.x), DeviceBuffer<float>(c.pending)},
                                     h = {DeviceBuffer<float>(c.pending), DeviceBuffer<float>(c.x)};
  const Stream stream;
  const auto view = [&](DeviceBuffer<float>& rows) { return make_view(rows.data(), c.n_token, c.width); };
  const Graph graph = Graph::capture(stream, [&] {
    for (std::size_t i = 0; i < 120; ++i) {
      residual_norm<float, float>(view(x[i % 2]), view(h[i % 2]), post_norm.data(), c.scale, norm.data(), kEpsilon,
                                  view(h[1 - i % 2]), stream,
                                  {.overlap = overlap, .x_at_rest = x_at_rest && i % 2 == 0});
    }
  });
  graph.launch(stream);
  stream.synchronize();
  std::vector<float> all;
  for (const auto* rows : {&x[0], &x[1], &h[0], &h[1]}) {
    const std::vector<float> some = rows->to_host();
    all.insert(all.end(), some.begin(), some.end());
  }
  return all;
}

TEST(ResidualNormGpu, AChainWithEarlyStartsHasTheBitsOfOneWithout) {
  for (const std::int64_t n_token : {1, 3}) {
    const Case c(n_token, 5376, true, 0.9f, 1.0f, 4);
    const std::vector<float> plain = run_in_turn(c, false, false);
    for (int repeat = 0; repeat < 3; ++repeat) {
      EXPECT_EQ(n_different(run_in_turn(c, true, false), plain), 0u);
      EXPECT_EQ(n_different(run_in_turn(c, true, true), plain), 0u);
    }
    Case other = c;  // control
    other.pending[0] += 1.0f;
    EXPECT_GT(n_different(run_in_turn(other, true, true), plain), 0u);
  }
}

/// Copies what `from` holds after some 2 ms; the next kernel of the stream may begin at once.
__global__ void write_late_kernel(const float* from, float* to, int count) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
  const long long begin = clock64();
  while (clock64() - begin < 4'000'000) __nanosleep(1000);
  for (int i = static_cast<int>(threadIdx.x); i < count; i += static_cast<int>(blockDim.x)) to[i] = from[i];
}

/// The rows of `before`, of which a kernel in front makes those of `after`, late. In one graph, so that the second
/// launch is there long before the first one ends.
Result behind_a_late_writer(const Case& before, const Case& after, bool x_at_rest) {
  DeviceBuffer<float> x(before.x), pending(before.pending), h(before.n_token * before.width);
  const DeviceBuffer<float> late_x(after.x), late_pending(after.pending), post_norm(before.post_norm),
      norm(before.norm);
  const Stream stream;
  const auto rows = [&](auto* data) { return make_view(data, before.n_token, before.width); };
  const auto count = static_cast<int>(before.n_token * before.width);
  const bool is_x = before.x != after.x;
  const Graph graph = Graph::capture(stream, [&] {
    write_late_kernel<<<1, 256, 0, stream>>>(is_x ? late_x.data() : late_pending.data(),
                                             is_x ? x.data() : pending.data(), count);
    check_launch("write_late_kernel");
    residual_norm<float, float>(rows(x.data()), rows(static_cast<const float*>(pending.data())), post_norm.data(),
                                before.scale, norm.data(), kEpsilon, rows(h.data()), stream,
                                {.overlap = current_device().compute_capability >= 90, .x_at_rest = x_at_rest});
  });
  graph.launch(stream);
  return {x.to_host(stream), h.to_host(stream)};
}

/// A kernel in front that writes x late is waited for, unless the caller says that x is at rest: then the result is
/// another, so that the promise is one to keep. What is pending is waited for in any case. (Before sm_90 no kernel
/// begins early, and no promise can be broken.)
TEST(ResidualNormGpu, ALateWriterIsWaitedForUnlessXIsSaidToBeAtRest) {
  const bool begins_early = current_device().compute_capability >= 90;
  for (const std::int64_t width : {2048, 5376}) {
    for (const std::int64_t n_token : {1, 4}) {
      const Case before(n_token, width, true, 0.9f, 1.0f, 4);
      Case after = before;
      after.x = testkit::draw(99, n_token * width, 3.0f);
      const Result right = on_device<float, float>(after, width);
      const Result waited = behind_a_late_writer(before, after, false);
      EXPECT_EQ(n_different(waited.x, right.x), 0u);
      EXPECT_EQ(n_different(waited.h, right.h), 0u);
      const Result broken = behind_a_late_writer(before, after, true);
      EXPECT_EQ(n_different(broken.x, right.x) > 0, begins_early) << "x_at_rest has no effect";
      after = before;
      after.pending = testkit::draw(98, n_token * width, 3.0f);
      const Result finished = on_device<float, float>(after, width);
      for (const bool x_at_rest : {false, true}) {
        const Result result = behind_a_late_writer(before, after, x_at_rest);
        EXPECT_EQ(n_different(result.x, finished.x), 0u) << x_at_rest;
        EXPECT_EQ(n_different(result.h, finished.h), 0u) << x_at_rest;
      }
    }
  }
}

TEST(ResidualNormPlan, Refusals) {
  float a[64] = {}, b[64] = {};
  const auto call = [&](std::int64_t width, std::int64_t h_width, float* h, const float* post_norm) {
    return [=, &a, &b] {
      residual_norm<float, float>(make_view(static_cast<float*>(a), std::int64_t{1}, width),
                                  make_view(static_cast<const float*>(b), std::int64_t{1}, width), post_norm, 1.0f, b,
                                  kEpsilon, make_view(h, std::int64_t{1}, h_width), nullptr);
    };
  };
  using testkit::refuses;
  EXPECT_TRUE(refuses(call(64, 32, b, b), {"residual_norm", "h has extent 32", "need 64"}));
  EXPECT_TRUE(refuses(call(64, 64, a, b), {"h takes the place of x"}));
  EXPECT_TRUE(refuses(call(64, 64, b, nullptr), {"no weights"}));
  EXPECT_TRUE(refuses(call(16392, 16392, b, b), {"width 16392", "16384"}));
  alignas(16) float rows[64] = {}, out[64] = {};
  std::uint8_t codes[80];
  const auto with_codes = [&] {
    residual_norm<float, float>(
        make_view(static_cast<float*>(rows), std::int64_t{1}, std::int64_t{64}), {}, nullptr, 1.0f, rows, kEpsilon,
        make_view(static_cast<float*>(out), std::int64_t{1}, std::int64_t{64}), nullptr, {.codes = {codes, 79}});
  };
  EXPECT_TRUE(refuses(with_codes, {"room for codes of 79 B", "need 80 B", "1 rows of 64 values"}));
}

}  // namespace
}  // namespace gemma4::cuda
