// SPDX-License-Identifier: Apache-2.0
#include "cuda/linear_prefill.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/device/allocation_count.cuh"
#include "cuda/device/device_arena.cuh"
#include "cuda/device/stream.cuh"
#include "reference/quantized_linear.hpp"
#include "tests/support/close.hpp"
#include "tests/support/device_weights.cuh"
#include "tests/support/linear_case.hpp"
#include "tests/support/packed_types.hpp"
#include "tests/support/property.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

std::vector<Bf16> as_bf16(const std::vector<float>& values) {
  std::vector<Bf16> stored(values.size());
  std::transform(values.begin(), values.end(), stored.begin(), to_bf16);
  return stored;
}

/// Weights rounded to bf16 err by 2^-9 of each product, the float sum by at most (K + 1) 2^-24 of their magnitudes.
/// Small scratch buffers cut the rows into slices; the bits may differ by the algorithm, the bound holds for all.
RC_GTEST_PROP(LinearPrefill, AgreesWithTheReferenceInEveryFormat, ()) {
  const auto type = *rc::gen::elementOf(kWeightTypes);
  const std::int64_t cols = 256 * *rc::gen::element<std::int64_t>(1, 2, 5, 22);
  const auto rows = *rc::gen::inRange<std::int64_t>(1, 600), n_token = *rc::gen::inRange<std::int64_t>(1, 70);
  const OwnedMatrix weight = random_weights(type, rows, cols, *rc::gen::arbitrary<std::uint32_t>());
  const std::vector<float> x = random_activations(n_token * cols, *rc::gen::arbitrary<std::uint32_t>());
  const DeviceWeights packed(weight);
  const DeviceBuffer<Bf16> in(as_bf16(x));
  DeviceBuffer<float> out(n_token * rows);
  out.fill_bytes(0xFF);
  LinearPrefill prefill(*rc::gen::element<std::int64_t>(100, 256, 700) * cols * 2);
  prefill.linear<float>(make_view(in.data(), n_token, cols), packed.view(), make_view(out.data(), n_token, rows),
                        nullptr);
  const reference::Matrix<double> wide =
      Eigen::Map<const reference::Matrix<float>>(x.data(), n_token, cols).cast<double>();
  reference::Matrix<double> expected(n_token, rows);
  reference::quantized_linear<double>(wide, weight.view(), expected);
  const DequantisedWeights dequantised = dequantise_with_parts(weight);
  std::vector<double> bound;
  for (std::int64_t t = 0; t < n_token; ++t) {
    for (std::int64_t n = 0; n < rows; ++n) {
      double magnitude = 0;
      for (std::int64_t k = 0; k < cols; ++k) {
        magnitude += std::abs(wide(t, k)) *
                     std::abs(static_cast<double>(dequantised.value[static_cast<std::size_t>(n * cols + k)]));
      }
      bound.push_back((0x1p-9 + static_cast<double>(cols + 1) * 0x1p-24) * magnitude + 1e-30);
    }
  }
  const std::span values(expected.data(), static_cast<std::size_t>(expected.size()));
  const std::vector<float> once = out.to_host();
  rc_require(close(once, values, bound));
  prefill.linear<float>(make_view(in.data(), n_token, cols), packed.view(), make_view(out.data(), n_token, rows),
                        nullptr);
  const std::vector<float> twice = out.to_host();
  RC_ASSERT(std::memcmp(once.data(), twice.data(), once.size() * sizeof(float)) == 0);
  // Control: the rounding of the weights is seen (plain bf16 rows are exact, packed ones are not).
  if (is_packed_type(type) && rows * n_token > 2000) {
    for (double& b : bound) b /= 4096;
    RC_ASSERT(!close(once, values, bound));
  }
}

TEST(LinearPrefill, FusedGateUpHasTheBitsOfUnfused) {
  for (const TensorType type : kPackedTypes) {
    const OwnedMatrix gate = random_weights(type, 300, 512, 1, 0.1f), up = random_weights(type, 300, 512, 2, 0.1f);
    const DeviceWeights joined(gate, up), gate_alone(gate), up_alone(up);
    const DeviceBuffer<Bf16> in(as_bf16(random_activations(33 * 512, 3)));
    DeviceBuffer<Bf16> fused(33 * 300), unfused(33 * 300), scratch(2 * 33 * 300);
    LinearPrefill prefill(1 << 20);
    const std::span<Bf16> room(scratch.data(), static_cast<std::size_t>(scratch.size()));
    const auto x = make_view(in.data(), 33, 512);
    prefill.gate_up<Bf16>(x, {.joined = joined.view(), .gate = {}, .up = {}}, room, make_view(fused.data(), 33, 300),
                          nullptr);
    prefill.gate_up<Bf16>(x, {.joined = {}, .gate = gate_alone.view(), .up = up_alone.view()}, room,
                          make_view(unfused.data(), 33, 300), nullptr);
    EXPECT_EQ(fused.to_host(), unfused.to_host());
  }
}

/// The product may take the place of the gate.
TEST(LinearPrefill, GateUpInPlaceHasTheSameBits) {
  for (const std::int64_t width : {304, 299}) {
    const DeviceWeights joined(random_weights(TensorType::kQ4K, width, 512, 1, 0.1f),
                               random_weights(TensorType::kQ4K, width, 512, 2, 0.1f));
    const DeviceBuffer<Bf16> in(as_bf16(random_activations(33 * 512, 3)));
    DeviceBuffer<Bf16> apart(33 * width), scratch(2 * 33 * width);
    LinearPrefill prefill(1 << 20);
    const std::span<Bf16> room(scratch.data(), static_cast<std::size_t>(scratch.size()));
    const GateUpWeights weights{.joined = joined.view(), .gate = {}, .up = {}};
    const auto x = make_view(static_cast<const Bf16*>(in.data()), 33, 512);
    prefill.gate_up<Bf16>(x, weights, room, make_view(apart.data(), 33, width), nullptr);
    prefill.gate_up<Bf16>(x, weights, room, make_view(scratch.data(), 33, width), nullptr);
    std::vector<Bf16> in_place = scratch.to_host();
    in_place.resize(static_cast<std::size_t>(33 * width));
    EXPECT_EQ(in_place, apart.to_host());
  }
}

/// Products one after another, slices of all kinds in a scratch that holds few of them.
class Products {
 public:
  static constexpr std::int64_t kToken = 40, kScratchBytes = 400 * 768 * 2;

  Products() {
    for (std::uint32_t i = 0; i < 12; ++i) {
      const TensorType type = kWeightTypes[i % kWeightTypes.size()];
      const std::int64_t cols = i % 3 == 0 ? 768 : 256, rows = 100 + 131 * (i % 5);
      weights_.emplace_back(random_weights(type, rows, cols, i));
      outs_.emplace_back(kToken * rows);
    }
    in_ = DeviceBuffer<Bf16>(as_bf16(random_activations(kToken * 768, 99)));
  }

  void enqueue(LinearPrefill& prefill, cudaStream_t stream, std::size_t first = 0) {
    for (std::size_t i = first; i < weights_.size(); ++i) {
      const PackedMatrix& weight = weights_[i].view();
      prefill.linear<float>(make_view(static_cast<const Bf16*>(in_.data()), kToken, weight.cols), weight,
                            make_view(outs_[i].data(), kToken, weight.rows), stream);
    }
  }

  [[nodiscard]] std::vector<float> take_results(cudaStream_t stream) {
    std::vector<float> all;
    for (DeviceBuffer<float>& out : outs_) {
      const std::vector<float> one = out.to_host(stream);
      all.insert(all.end(), one.begin(), one.end());
      out.fill_bytes(0xFF, stream);
    }
    check(cudaStreamSynchronize(stream), "clearing of results");
    return all;
  }

 private:
  std::vector<DeviceWeights> weights_;
  std::vector<DeviceBuffer<float>> outs_;
  DeviceBuffer<Bf16> in_;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

__global__ void wait_kernel(long long n_cycle) {
  const long long begin = clock64();
  while (clock64() - begin < n_cycle) {
  }
}

/// Decoding ahead, in borrowed memory and recorded: always the bits of taking turns.
TEST(LinearPrefill, DequantisingAheadKeepsTheBits) {
  Products products;
  const Stream stream;
  LinearPrefill in_turn(Products::kScratchBytes, false);
  products.enqueue(in_turn, stream);
  const std::vector<float> expected = products.take_results(stream);
  DeviceBuffer<std::byte> scratch(Products::kScratchBytes), workspace(LinearPrefill::kBlasBytes);
  const auto span_of = [](DeviceBuffer<std::byte>& b) {
    return std::span(b.data(), static_cast<std::size_t>(b.bytes()));
  };
  LinearPrefill ahead(span_of(scratch), span_of(workspace), true);
  for (int i = 0; i < 3; ++i) {
    products.enqueue(ahead, stream);
    products.enqueue(ahead, stream);
    EXPECT_TRUE(same_bits(products.take_results(stream), expected));
  }
  const Graph graph = Graph::capture(stream, [&] { products.enqueue(ahead, stream); });
  graph.launch(stream);
  EXPECT_TRUE(same_bits(products.take_results(stream), expected));
}

/// Neither we nor cuBLASLt, whose share only the driver's count shows: in pages of 2 MiB, of which it may round to one
/// more. A workspace for each product would be 32 MB.
TEST(LinearPrefill, ProductsTakeNoMemory) {
  Products products;
  const Stream stream;
  LinearPrefill prefill(Products::kScratchBytes, true);
  for (int warm = 0; warm < 2; ++warm) products.enqueue(prefill, stream);  // kernels are loaded
  stream.synchronize();
  const AllocationCount taken = allocation_count();
  const std::int64_t before = device_bytes_in_use();
  for (int repeat = 0; repeat < 10; ++repeat) products.enqueue(prefill, stream);
  EXPECT_EQ(allocation_count(), taken);
  EXPECT_LE(device_bytes_in_use() - before, 2 << 20);
}

/// A scratch that served something else is dequantised into only afterwards, if it was announced. Control: if not, the
/// late work overwrites dequantised weights.
TEST(LinearPrefill, ALentScratchIsWaitedFor) {
  Products products;
  const Stream stream;
  DeviceBuffer<std::byte> scratch(Products::kScratchBytes), workspace(LinearPrefill::kBlasBytes);
  LinearPrefill prefill(std::span(scratch.data(), static_cast<std::size_t>(scratch.bytes())),
                        std::span(workspace.data(), static_cast<std::size_t>(workspace.bytes())), true);
  products.enqueue(prefill, stream);
  const std::vector<float> expected = products.take_results(stream);
  for (const bool announced : {true, false}) {
    wait_kernel<<<1, 1, 0, stream>>>(50'000'000);
    scratch.fill_bytes(0xFF, stream);
    if (announced) prefill.scratch_was_lent(stream);
    products.enqueue(prefill, stream);
    EXPECT_EQ(same_bits(products.take_results(stream), expected), announced);
  }
}

RC_GTEST_PROP(LinearPrefillPlan, SlicesAreWholeRoundsThatFit, ()) {
  const auto count = *rc::gen::inRange<std::int64_t>(1, 50000), cols = *rc::gen::inRange<std::int64_t>(1, 30000);
  const auto n_token = *rc::gen::inRange<std::int64_t>(1, 5000);
  const std::int64_t scratch = cols * *rc::gen::inRange<std::int64_t>(1, 30000);
  const int n_sm = *rc::gen::inRange(1, 200);
  const std::int64_t slice = prefill_slice_rows(count, cols, n_token, scratch, n_sm);
  RC_ASSERT(slice >= 1);
  RC_ASSERT(std::min(slice, count) * cols <= scratch);
  const std::int64_t round = 128 * std::max<std::int64_t>(1, n_sm / ((n_token + 255) / 256));
  if (count <= scratch / 2 / cols) RC_ASSERT(slice == count);
  if (slice < count && slice > round) RC_ASSERT(slice % round == 0);
}

/// The matrices of the 31B on 132 multiprocessors: the figures behind the rule.
TEST(LinearPrefillPlan, SlicesOfThe31B) {
  constexpr std::int64_t kScratch = std::int64_t{21504} * 5376;
  EXPECT_EQ(prefill_slice_rows(8192, 5376, 2048, kScratch, 132), 8192);
  EXPECT_EQ(prefill_slice_rows(21504, 5376, 2048, kScratch, 132), 8192);
  EXPECT_EQ(prefill_slice_rows(5376, 21504, 2048, kScratch, 132), 2048);
  EXPECT_EQ(prefill_slice_rows(5376, 8192, 2048, kScratch, 132), 5376);
  EXPECT_EQ(prefill_slice_rows(5376, 21504, 512, kScratch, 132), 5376) << "less than a round in half of the scratch";
}

}  // namespace
}  // namespace gemma4::cuda
