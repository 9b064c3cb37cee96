// SPDX-License-Identifier: Apache-2.0
// Products whose last rows go to the blocks that have done theirs, and those whose activations are codes before.
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
#include "tests/support/refuses.hpp"

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

/// How products run: the same bits in any case.
struct How {
  bool dealt = false;
  LinearVariant variant = {};
  bool codes_ahead = false;  ///< activations are made codes by a launch in front, whatever their number
  bool int8 = false;         ///< on tensor cores
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
        tickets_(1),
        codes_(linear_codes_bytes(n_token, cols)) {
    tickets_.fill_bytes(0), codes_.fill_bytes(0xFF);
  }

  /// Three rounds in one graph, one launch on the heels of another, all with the same tickets.
  Results run(const How& how, const DeviceInfo& device) {
    const std::array<PackedMatrix, 2> weights{first_.view(), second_.view()};
    const std::int64_t rows_a = weights[0].rows, rows_b = weights[1].rows;
    DeviceBuffer<float> product(n_token_ * (rows_a + rows_b));
    DeviceBuffer<Bf16> gated(n_token_ * rows_a);
    product.fill_bytes(0xFF), gated.fill_bytes(0xFF);
    check(cudaDeviceSynchronize(), "preparation of a run");
    const auto x = make_view(static_cast<const float*>(x_.data()), n_token_, weights[0].cols);
    const std::array<View<float, 2>, 2> outs{make_view(product.data(), n_token_, rows_a),
                                             make_view(product.data() + n_token_ * rows_a, n_token_, rows_b)};
    LinearOptions options{.tickets = how.dealt ? tickets_.data() : nullptr, .variant = how.variant};
    if (how.codes_ahead) options.codes = {codes_.data(), codes_.size()}, options.codes_from = 0;
    options.int8_from = how.int8 ? 1 : kMaxInt8Tokens + 1;
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
  std::vector<float> run_without_first_ticket(const DeviceInfo& device, LinearVariant variant) {
    const LinearTickets spoiled{.next = 1, .n_ended = 0};
    check(cudaMemcpy(tickets_.data(), &spoiled, sizeof(spoiled), cudaMemcpyHostToDevice), "change of a ticket");
    return run_once(device, variant);
  }
  std::vector<float> run_once(const DeviceInfo& device, LinearVariant variant) {
    const PackedMatrix weight = second_.view();
    DeviceBuffer<float> out(n_token_ * weight.rows);
    out.fill_bytes(0xFF);
    check(cudaDeviceSynchronize(), "preparation of a run");
    quantized_linear_decode<float, float>(make_view(static_cast<const float*>(x_.data()), n_token_, weight.cols),
                                          weight, make_view(out.data(), n_token_, weight.rows), device, stream_,
                                          {.tickets = tickets_.data(), .variant = variant});
    return out.to_host(stream_);
  }

 private:
  std::int64_t n_token_;
  DeviceWeights first_, second_, pair_;
  DeviceBuffer<float> x_;
  DeviceBuffer<LinearTickets> tickets_;
  DeviceBuffer<std::uint8_t> codes_;
  gemma4::cuda::Stream stream_;
};

RC_GTEST_PROP(LinearTicketsGpu, DealtRowsHaveTheBitsOfEqualShares, ()) {
  const std::int64_t cols = 256 * *rc::gen::element<std::int64_t>(1, 2, 5, 22);
  const auto rows_a = *rc::gen::inRange<std::int64_t>(1, 500), rows_b = *rc::gen::inRange<std::int64_t>(1, 900);
  const auto n_token = *rc::gen::element<std::int64_t>(1, 1, 1, 2, 3, 4, 5, 8);
  Products products(*rc::gen::elementOf(kPackedTypes), *rc::gen::elementOf(kPackedTypes), rows_a, rows_b, cols, n_token,
                    *rc::gen::arbitrary<std::uint32_t>());
  DeviceInfo device = current_device();
  const Results expected = products.run({}, device);
  RC_ASSERT(products.run({.dealt = true}, device) == expected);
  const How how{.dealt = *rc::gen::arbitrary<bool>(),
                .variant = LinearVariant::of(*rc::gen::inRange(0, LinearVariant::kMost + 1)),
                .codes_ahead = *rc::gen::arbitrary<bool>(),
                .int8 = *rc::gen::arbitrary<bool>()};
  device.sm_count = *rc::gen::inRange(1, 40);  // so that a block has many stages
  RC_ASSERT(products.run({.dealt = true}, device) == expected);
  RC_ASSERT(products.run(how, device) == expected);
  device.compute_capability = std::min(device.compute_capability, 80);
  RC_ASSERT(products.run(how, device) == expected);  // without overlap
  RC_ASSERT(products.tickets_are_zero());
}

/// The control: rows of a ticket that nobody gets are missing, once, since every launch leaves zeros.
TEST(LinearTicketsGpu, MissingTicketIsSeenAndGone) {
  Products products(TensorType::kQ4K, TensorType::kQ4K, 8, 2000, 512, 1, 3);
  DeviceInfo device = current_device();
  device.sm_count = 10;
  for (const bool half : {false, true}) {
    const LinearVariant variant{.half_tickets = half};
    const std::vector<float> expected = products.run_once(device, variant);
    const std::vector<float> spoiled = products.run_without_first_ticket(device, variant);
    std::int64_t n_different = 0;
    for (std::size_t i = 0; i < expected.size(); ++i) n_different += !(spoiled[i] == expected[i]);
    EXPECT_EQ(n_different, half ? 4 : 8) << "the rows of one ticket";
    EXPECT_TRUE(products.tickets_are_zero());
    EXPECT_TRUE(same_bytes(products.run_once(device, variant), expected));
  }
}

/// The first token's part of results of several.
Results first_token_of(const Results& results, std::int64_t n_token, std::int64_t rows_a, std::int64_t rows_b) {
  Results first{results.product, results.gated};
  first.product.erase(first.product.begin() + n_token * rows_a + rows_b, first.product.end());
  first.product.erase(first.product.begin() + rows_a, first.product.begin() + n_token * rows_a);
  first.gated.resize(static_cast<std::size_t>(rows_a));
  return first;
}

/// Rows of the 31B's widths, where activations are several chunks, and where one token alone has code for the widest
/// chunk, and table codes another product, in every way to run. Five tokens of the widest are two launches.
TEST(LinearTicketsGpu, WideRowsHaveTheBitsOfAnyWay) {
  for (const TensorType type :
       {TensorType::kQ4_0, TensorType::kQ4K, TensorType::kIq4Nl, TensorType::kIq4Xs, TensorType::kQ2K}) {
    for (const std::int64_t cols : {std::int64_t{5376}, std::int64_t{8192}, std::int64_t{21504}}) {
      Products products(type, type, 9, 20, cols, 5, 11), alone(type, type, 9, 20, cols, 1, 11);
      DeviceInfo device = current_device();
      device.sm_count = 1;
      const Results expected = products.run({}, device), of_one = first_token_of(expected, 5, 9, 20);
      for (const bool int8 : {false, true}) {
        for (const LinearVariant variant : {LinearVariant::of(0), LinearVariant::of(LinearVariant::kMost)}) {
          const auto what = ::testing::Message() << type_name(type) << ", " << cols << " columns, "
                                                 << (int8 ? "int8" : "dot") << ", variant " << variant.low_stages;
          EXPECT_TRUE(products.run({true, variant, true, int8}, device) == expected) << what;
          EXPECT_TRUE(alone.run({true, variant, !int8, int8}, device) == of_one) << what << ", one token";
        }
      }
    }
  }
}

TEST(LinearTicketsGpu, TooLittleRoomForCodesIsRefused) {
  EXPECT_EQ(linear_codes_bytes(1, 21504), 26880);
  const DeviceWeights weights(random_weights(TensorType::kQ4_0, 4, 512, 1));
  DeviceBuffer<float> x(2 * 512), out(2 * 4);
  DeviceBuffer<std::uint8_t> codes(1279);
  const Stream stream;
  const auto call = [&](std::int64_t from) {
    quantized_linear_decode<float, float>(make_view(static_cast<const float*>(x.data()), 2, 512), weights.view(),
                                          make_view(out.data(), 2, 4), current_device(), stream,
                                          {.codes = {codes.data(), codes.size()}, .codes_from = from});
  };
  EXPECT_TRUE(refuses([&] { call(1024); }, {"room for codes of 1279 B", "need 1280 B", "2 tokens"}));
  call(1025);  // the control: not that many values, so no codes
  const auto with_made = [&] {
    quantized_linear_decode<float, float>(make_view(static_cast<const float*>(x.data()), 2, 512), weights.view(),
                                          make_view(out.data(), 2, 4), current_device(), stream,
                                          {.made = {codes.data(), codes.size()}});
  };
  EXPECT_TRUE(refuses(with_made, {"codes of 1279 B", "need 1280 B", "2 tokens"}));
  check(cudaStreamSynchronize(stream), "a call");
}

}  // namespace
}  // namespace gemma4::cuda
