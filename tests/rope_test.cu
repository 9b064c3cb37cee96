// SPDX-License-Identifier: Apache-2.0
#include "cuda/rope.cuh"

#include <gtest/gtest.h>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "reference/rope.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/close.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using reference::Matrix;
using testkit::close;
using testkit::rc_require;

template <class T>
std::vector<float> on_device(const std::vector<float>& x, std::int64_t n_token, std::int64_t n_head,
                             std::int64_t position, const AttentionConfig& attention) {
  std::vector<T> stored(x.size());
  std::transform(x.begin(), x.end(), stored.begin(), from_float<T>);
  DeviceBuffer<T> values(stored);
  const DeviceBuffer<std::int32_t> at(std::vector<std::int32_t>{static_cast<std::int32_t>(position)});
  rope<T>(make_view(values.data(), n_token, n_head, attention.head_dim), DeviceCount::on_device(at.data()),
          rope_params(attention), nullptr);
  std::vector<float> result;
  for (const T value : values.to_host()) result.push_back(to_float(value));
  return result;
}

std::vector<double> exact(const std::vector<float>& x, std::int64_t n_token, std::int64_t n_head, std::int64_t position,
                          const AttentionConfig& attention) {
  Matrix<double> wide = Eigen::Map<const Matrix<float>>(x.data(), n_token, n_head * attention.head_dim).cast<double>();
  reference::rope<double>(wide, position, attention);
  return {wide.data(), wide.data() + wide.size()};
}

/// Both kinds of layer at any position up to 262143. The bound: sine and cosine to 2^-22, three roundings of 2^-24 and
/// the output's, of two values below 1.7. Control: an angle computed in float is off by up to 0.008 rad, so a position
/// wrong by one in the slowest turning pair that moves 0.01 rad a position must not pass.
RC_GTEST_PROP(RopeGpu, AgreesWithTheReferenceInDouble, ()) {
  const ModelConfig model = gemma4_31b();
  const bool sliding = *rc::gen::arbitrary<bool>();
  const AttentionConfig& attention = sliding ? model.sliding : model.full;
  const auto n_token = *rc::gen::inRange<std::int64_t>(1, 5), n_head = *rc::gen::inRange<std::int64_t>(1, 4);
  const auto position = *rc::gen::oneOf(rc::gen::inRange<std::int64_t>(0, 262140), rc::gen::just<std::int64_t>(262139),
                                        rc::gen::just<std::int64_t>(0));
  const std::vector<float> x =
      testkit::draw(*rc::gen::inRange<std::uint64_t>(0, 1000), n_token * n_head * attention.head_dim);
  const std::vector<double> expected = exact(x, n_token, n_head, position, attention);
  const std::vector<float> out = on_device<float>(x, n_token, n_head, position, attention);
  rc_require(close(out, expected, 3.4 * 0x1p-21));
  rc_require(close(on_device<Bf16>(x, n_token, n_head, position, attention), expected, 3.4 * (0x1p-21 + 0x1p-8)));
  RC_ASSERT(!close(out, exact(x, n_token, n_head, position + 1, attention), 3.4 * 0x1p-21));
  for (std::int64_t row = 0; row < n_token * n_head; ++row) {  // the other coordinates keep their bits
    for (std::int64_t i = attention.rope_pairs; i < attention.head_dim / 2; ++i) {
      const auto at = static_cast<std::size_t>(row * attention.head_dim + i);
      const auto other = at + static_cast<std::size_t>(attention.head_dim / 2);
      RC_ASSERT(out[at] == x[at]);
      RC_ASSERT(out[other] == x[other]);
    }
  }
}

/// One captured launch turns by the position of the moment, which the device holds.
TEST(RopeGpu, GraphReplaysAtGrowingPositions) {
  const AttentionConfig attention = gemma4_31b().full;
  const std::vector<float> x = testkit::draw(8, 2 * 512);
  DeviceBuffer<float> values(x);
  DeviceBuffer<std::int32_t> at(1);
  const Stream stream;
  const RopeParams params = rope_params(attention);
  const Graph graph = Graph::capture(stream, [&] {
    rope<float>(make_view(values.data(), 1, 2, 512), DeviceCount::on_device(at.data()), params, stream);
  });
  for (const std::int32_t position : {0, 1, 2, 1023, 131071, 262143}) {
    values.from_host(x, stream);
    at.from_host(std::span<const std::int32_t>(&position, 1), stream);
    graph.launch(stream);
    EXPECT_TRUE(testkit::same_bits(values.to_host(stream), on_device<float>(x, 1, 2, position, attention))) << position;
    EXPECT_TRUE(close(values.to_host(stream), exact(x, 1, 2, position, attention), 3.4 * 0x1p-21)) << position;
  }
}

TEST(RopePlan, MisuseIsRefusedBeforeAnyLaunch) {
  const AttentionConfig attention = gemma4_31b().full;
  std::vector<float> memory(2048);
  const auto call = [&](std::int64_t head_dim, DeviceCount position) {
    return [&, head_dim, position] {
      rope<float>(make_view(memory.data(), 2, 2, head_dim), position, rope_params(attention), nullptr);
    };
  };
  EXPECT_TRUE(testkit::refuses(call(256, DeviceCount::on_host(0)), {"head_dim 256", "512"}));
  EXPECT_TRUE(testkit::refuses(call(512, {}), {"position"}));
  AttentionConfig wide = attention;
  wide.rope_pairs = 257;
  EXPECT_TRUE(testkit::refuses([&] { (void)rope_params(wide); }, {"rope_pairs 257", "256"}));
}

}  // namespace
}  // namespace gemma4::cuda
