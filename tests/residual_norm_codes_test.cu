// SPDX-License-Identifier: Apache-2.0
// The 8-bit integers that residual_norm() leaves of its rows for the products behind it.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cuda/device/check.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/device/launch.cuh"
#include "cuda/residual_norm.cuh"
#include "cuda/weights/activation_blocks.cuh"
#include "tests/support/attention_case.hpp"
#include "tests/support/property.hpp"

namespace gemma4::cuda {
namespace {

/// Rows as blocks, by one warp each.
template <class T>
__global__ void quantize_rows_kernel(const T* rows, int width, int n_group, std::uint8_t* codes) {
  std::uint8_t* const to = codes + blockIdx.x * n_group * detail::kActivationBytesPerGroup;
  detail::quantize_row<32, T, 1>(rows + blockIdx.x * width, to, n_group, 0, width / 8, static_cast<int>(threadIdx.x));
}

struct Case {
  std::int64_t n_token, width;
  std::int64_t gap;  ///< between rows of x, in values
  bool is_pending, x_at_rest;
  float amplitude;
  std::uint64_t seed;
};

/// What residual_norm() leaves in room that was filled with 0xFF, and the blocks of the h that it left.
struct Codes {
  bool made;
  std::vector<std::uint8_t> found, of_h;
};

template <class TOut>
Codes codes_of(const Case& c) {
  const std::int64_t stride = c.width + c.gap, n_value = c.n_token * c.width;
  const DeviceBuffer<float> pending(testkit::draw(c.seed + 1, n_value, 3.0f)),
      norm(testkit::draw(c.seed + 2, c.width, c.amplitude));
  DeviceBuffer<float> x(testkit::draw(c.seed, c.n_token * stride, 3.0f));
  DeviceBuffer<TOut> h(n_value);
  DeviceBuffer<std::uint8_t> found(linear_codes_bytes(c.n_token, c.width)), of_h(found.size());
  found.fill_bytes(0xFF), of_h.fill_bytes(0xFF);
  check(cudaDeviceSynchronize(), "preparation of a run");
  auto x_rows = make_view(x.data(), c.n_token, c.width);
  x_rows.stride[0] = stride;
  auto pending_rows = make_view(pending.data(), c.n_token, c.width);
  if (!c.is_pending) pending_rows = {};
  const bool made = residual_norm<float, TOut>(x_rows, pending_rows, norm.data(), 0.9f, norm.data(), 1e-6f,
                                               make_view(h.data(), c.n_token, c.width), nullptr,
                                               {.x_at_rest = c.x_at_rest, .codes = {found.data(), found.size()}});
  if (made) {
    detail::Launch{.what = "quantize_rows_kernel", .grid = static_cast<unsigned>(c.n_token), .block = 32}(
        quantize_rows_kernel<TOut>, static_cast<const TOut*>(h.data()), static_cast<int>(c.width),
        static_cast<int>(detail::activation_groups(c.width)), of_h.data());
  }
  return {made, found.to_host(), of_h.to_host()};
}

/// The codes are those that any product makes of h, of the rounded values, and nothing beside them is touched. Rows
/// that do not lie in whole pieces or blocks have none. Controls: those of another row, and of h before it was rounded.
RC_GTEST_PROP(ResidualNormCodesGpu, AreThoseOfTheRows, ()) {
  const Case c{.n_token = *rc::gen::inRange<std::int64_t>(1, 9),
               .width = *rc::gen::element<std::int64_t>(32, 33, 40, 64, 96, 256, 800, 2048, 2056, 5376, 6144, 6176),
               .gap = *rc::gen::element<std::int64_t>(0, 0, 0, 1, 8),
               .is_pending = *rc::gen::arbitrary<bool>(),
               .x_at_rest = *rc::gen::arbitrary<bool>(),
               .amplitude = *rc::gen::element(1e-30f, 1.0f, 300.0f),
               .seed = *rc::gen::inRange<std::uint64_t>(0, 1000)};
  const Codes of_bf16 = codes_of<Bf16>(c), of_float = codes_of<float>(c);
  for (const Codes& codes : {of_bf16, of_float}) {
    RC_ASSERT(codes.made == (c.width % 32 == 0 && c.gap % 4 == 0));
    RC_ASSERT(codes.found == codes.of_h);
    if (!codes.made || c.n_token == 1) continue;
    const auto row = static_cast<std::ptrdiff_t>(codes.found.size()) / c.n_token;
    RC_ASSERT(!std::equal(codes.found.begin(), codes.found.begin() + row, codes.found.begin() + row));
  }
  if (of_bf16.made && c.width >= 2048) RC_ASSERT(of_bf16.found != of_float.found);
}

}  // namespace
}  // namespace gemma4::cuda
