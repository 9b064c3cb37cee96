// SPDX-License-Identifier: Apache-2.0
// Products whose last rows go to the blocks that have done theirs.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/fused_mlp.cuh"
#include "cuda/quantized_linear.cuh"
#include "tests/support/device_weights.cuh"
#include "tests/support/linear_case.hpp"
#include "tests/support/packed_types.hpp"
#include "tests/support/property.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

struct Results {
  std::vector<float> product;
  std::vector<Bf16> gated;
  bool operator==(const Results& other) const {
    return same_bytes(product, other.product) && same_bytes(gated, other.gated);
  }
};

/// Two matrices of one input, and a pair of gate and up.
class Products {
 public:
  Products(TensorType a, TensorType b, std::int64_t rows_a, std::int64_t rows_b, std::int64_t cols,
           std::int64_t n_token, std::uint32_t seed)
      : n_token_(n_token),
        first_(random_weights(a, rows_a, cols, seed)),
        second_(random_weights(b, rows_b, cols, seed + 1)),
        pair_(random_weights(b, rows_a, cols, seed + 2), random_weights(b, rows_a, cols, seed + 3)),
        x_(random_activations(n_token * cols, seed + 4)),
        tickets_(1) {
    tickets_.fill_bytes(0);
  }

  /// Three rounds in one graph, one launch on the heels of another, all with the same tickets.
  Results run(bool dealt, const DeviceInfo& device) {
    const std::array<PackedMatrix, 2> weights{first_.view(), second_.view()};
    const std::int64_t rows_a = weights[0].rows, rows_b = weights[1].rows;
    DeviceBuffer<float> product(n_token_ * (rows_a + rows_b));
    DeviceBuffer<Bf16> gated(n_token_ * rows_a);
    product.fill_bytes(0xFF), gated.fill_bytes(0xFF);
    check(cudaDeviceSynchronize(), "preparation of a run");
    const auto x = make_view(static_cast<const float*>(x_.data()), n_token_, weights[0].cols);
    const std::array<View<float, 2>, 2> outs{make_view(product.data(), n_token_, rows_a),
                                             make_view(product.data() + n_token_ * rows_a, n_token_, rows_b)};
    const LinearOptions options{.tickets = dealt ? tickets_.data() : nullptr};
    const Graph graph = Graph::capture(stream_, [&] {
      for (int round = 0; round < 3; ++round) {
        quantized_linear_decode<float, float>(x, std::span<const PackedMatrix>(weights),
                                              std::span<const View<float, 2>>(outs), device, stream_, options);
        gate_up_decode<float, Bf16>(x, {.joined = pair_.view(), .gate = {}, .up = {}}, {},
                                    make_view(gated.data(), n_token_, rows_a), device, stream_, options);
      }
    });
    graph.launch(stream_);
    graph.launch(stream_);
    return {product.to_host(stream_), gated.to_host(stream_)};
  }

  [[nodiscard]] bool tickets_are_zero() {
    const LinearTickets tickets = tickets_.to_host()[0];
    return tickets.next == 0 && tickets.n_ended == 0;
  }

  /// One product into fresh memory, whose first ticket has been taken by nobody.
  std::vector<float> run_without_first_ticket(const DeviceInfo& device) {
    const LinearTickets spoiled{.next = 1, .n_ended = 0};
    check(cudaMemcpy(tickets_.data(), &spoiled, sizeof(spoiled), cudaMemcpyHostToDevice), "change of a ticket");
    return run_once(device);
  }
  std::vector<float> run_once(const DeviceInfo& device) {
    const PackedMatrix weight = second_.view();
    DeviceBuffer<float> out(n_token_ * weight.rows);
    out.fill_bytes(0xFF);
    check(cudaDeviceSynchronize(), "preparation of a run");
    quantized_linear_decode<float, float>(make_view(static_cast<const float*>(x_.data()), n_token_, weight.cols),
                                          weight, make_view(out.data(), n_token_, weight.rows), device, stream_,
                                          {.tickets = tickets_.data()});
    return out.to_host(stream_);
  }

 private:
  std::int64_t n_token_;
  DeviceWeights first_, second_, pair_;
  DeviceBuffer<float> x_;
  DeviceBuffer<LinearTickets> tickets_;
  gemma4::cuda::Stream stream_;
};

RC_GTEST_PROP(LinearTicketsGpu, DealtRowsHaveTheBitsOfEqualShares, ()) {
  const std::int64_t cols = 256 * *rc::gen::element<std::int64_t>(1, 2, 5, 22);
  const auto rows_a = *rc::gen::inRange<std::int64_t>(1, 500), rows_b = *rc::gen::inRange<std::int64_t>(1, 900);
  const auto n_token = *rc::gen::element<std::int64_t>(1, 1, 1, 2, 5, 8);
  Products products(*rc::gen::elementOf(kPackedTypes), *rc::gen::elementOf(kPackedTypes), rows_a, rows_b, cols, n_token,
                    *rc::gen::arbitrary<std::uint32_t>());
  DeviceInfo device = current_device();
  const Results expected = products.run(false, device);
  RC_ASSERT(products.run(true, device) == expected);
  device.sm_count = *rc::gen::inRange(1, 40);  // so that a block has many stages
  RC_ASSERT(products.run(true, device) == expected);
  device.compute_capability = std::min(device.compute_capability, 80);
  RC_ASSERT(products.run(true, device) == expected);  // without overlap
  RC_ASSERT(products.tickets_are_zero());
}

/// The control: rows of a ticket that nobody gets are missing, once, since every launch leaves zeros.
TEST(LinearTicketsGpu, MissingTicketIsSeenAndGone) {
  Products products(TensorType::kQ4K, TensorType::kQ4K, 8, 2000, 512, 1, 3);
  DeviceInfo device = current_device();
  device.sm_count = 10;
  const std::vector<float> expected = products.run_once(device);
  const std::vector<float> spoiled = products.run_without_first_ticket(device);
  std::int64_t n_different = 0;
  for (std::size_t i = 0; i < expected.size(); ++i) n_different += !(spoiled[i] == expected[i]);
  EXPECT_EQ(n_different, 8) << "the rows of one stage";
  EXPECT_TRUE(products.tickets_are_zero());
  EXPECT_TRUE(same_bytes(products.run_once(device), expected));
}

}  // namespace
}  // namespace gemma4::cuda
