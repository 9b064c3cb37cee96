// SPDX-License-Identifier: Apache-2.0
// Products of few tokens and the norms between them, one launch on the heels of another.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/fused_mlp.cuh"
#include "cuda/quantized_linear.cuh"
#include "cuda/residual_norm.cuh"
#include "tests/support/device_weights.cuh"
#include "tests/support/linear_case.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// Steps of a model as long as a decode step: every product reads what the one before wrote.
class Chain {
 public:
  static constexpr std::int64_t kFfn = 3072, kMostTokens = 8;

  Chain() : device_(current_device()) {
    for (std::uint32_t i = 0; i < kLayers; ++i) {
      // Two kernels in turn: that of the four formats and that of all.
      constexpr std::array kTypes = {TensorType::kQ4K, TensorType::kQ6K, TensorType::kQ4_0, TensorType::kQ2K};
      const TensorType type = kTypes[i % kTypes.size()];
      layers_.push_back({DeviceWeights(random_weights(type, kHidden, kHidden, 10 * i + 1)),
                         DeviceWeights(random_weights(type, kFfn, kHidden, 10 * i + 2),
                                       random_weights(type, kFfn, kHidden, 10 * i + 3)),
                         DeviceWeights(random_weights(type, kHidden, kFfn, 10 * i + 4))});
    }
  }

  /// How a chain runs: the same bits in any case.
  struct Way {
    bool overlap = true, as_graph = true;
    bool dealt = false;           ///< rows by ticket, all products with the same tickets
    std::int64_t codes_from = 0;  ///< values of a product from which its codes are made ahead; 0: never
    bool codes_by_norm = false;   ///< those of the products behind a norm by the norm; all in the same room
    std::int64_t int8_from = kInt8FromTokens;
  };

  /// The residual stream behind `n_layer` layers, of n_token rows.
  std::vector<float> run(std::size_t n_layer, const Way& way, std::int64_t n_token = 1) {
    LinearOptions options{.tickets = way.dealt ? tickets_.data() : nullptr, .int8_from = way.int8_from};
    if (way.codes_from > 0) options.codes = {codes_.data(), codes_.size()}, options.codes_from = way.codes_from;
    n_token_ = n_token, codes_by_norm_ = way.codes_by_norm;
    DeviceInfo device = device_;
    if (!way.overlap) device.compute_capability = std::min(device.compute_capability, 80);
    residual_ = DeviceBuffer<float>(random_activations(n_token * kHidden, 77));
    if (way.as_graph) {
      const Graph graph = Graph::capture(stream_, [&] { enqueue(n_layer, device, options); });
      graph.launch(stream_);
    } else {
      enqueue(n_layer, device, options);
    }
    std::vector<float> pending = pending_.to_host(stream_);
    pending.resize(static_cast<std::size_t>(n_token * kHidden));
    return pending;
  }

 private:
  static constexpr std::int64_t kHidden = 1024;
  static constexpr std::size_t kLayers = 24;
  struct Layer {
    DeviceWeights square, gate_up, down;
  };

  void enqueue(std::size_t n_layer, const DeviceInfo& device, const LinearOptions& options) {
    bool is_pending = false;
    const std::int64_t n = n_token_;
    const LinearCodes room{codes_by_norm_ ? codes_.data() : nullptr, codes_.size()};
    LinearOptions behind_norm = options;
    const auto normalised = [&] {
      const bool made = residual_norm<float, Bf16>(
          make_view(residual_.data(), n, kHidden),
          make_view(is_pending ? static_cast<const float*>(pending_.data()) : nullptr, n, kHidden), norm_.data(), 0.9f,
          norm_.data(), 1e-6f, make_view(normed_.data(), n, kHidden), stream_,
          {.overlap = device.compute_capability >= 90, .x_at_rest = true, .codes = room});
      EXPECT_EQ(made, codes_by_norm_);
      if (made) behind_norm.made = room;
      is_pending = true;
      return make_view(static_cast<const Bf16*>(normed_.data()), n, kHidden);
    };
    for (std::size_t i = 0; i < n_layer; ++i) {
      const Layer& layer = layers_[i % layers_.size()];
      const PackedMatrix square = layer.square.view();
      const View<float, 2> out = make_view(pending_.data(), n, kHidden);
      const View<float, 2> between = make_view(between_.data(), n, kHidden);
      const auto gated = make_view(gated_.data(), n, kFfn);
      const GateUpWeights gate_up{.joined = layer.gate_up.view(), .gate = {}, .up = {}};
      const View<const Bf16, 2> first = normalised();
      quantized_linear_decode<Bf16, float>(first, square, between, device, stream_, behind_norm);
      quantized_linear_decode<float, float>(make_view(static_cast<const float*>(between_.data()), n, kHidden), square,
                                            out, device, stream_, options);
      const View<const Bf16, 2> second = normalised();
      gate_up_decode<Bf16, Bf16>(second, gate_up, {}, gated, device, stream_, behind_norm);
      quantized_linear_decode<Bf16, float>(make_view(static_cast<const Bf16*>(gated_.data()), n, kFfn),
                                           layer.down.view(), out, device, stream_, options);
    }
  }

  DeviceInfo device_;
  DeviceBuffer<LinearTickets> tickets_{std::vector<LinearTickets>(1)};
  DeviceBuffer<std::uint8_t> codes_{linear_codes_bytes(kMostTokens, kFfn)};
  gemma4::cuda::Stream stream_;
  std::vector<Layer> layers_;
  DeviceBuffer<float> residual_{kHidden}, pending_{kMostTokens * kHidden}, between_{kMostTokens * kHidden},
      norm_{std::vector<float>(kHidden, 1.0f)};
  DeviceBuffer<Bf16> gated_{kMostTokens * kFfn}, normed_{kMostTokens * kHidden};
  std::int64_t n_token_ = 1;
  bool codes_by_norm_ = false;
};

/// Kernels that begin before the one in front has ended read nothing too early and write nothing too early: 400
/// launches, each on the result of the one before, have the bits of launches one after another. (The control of the
/// comparison: one layer less is seen.)
TEST(LinearChainGpu, OverlapAndGraphDoNotChangeABit) {
  Chain chain;
  const std::vector<float> expected = chain.run(100, {.overlap = false, .as_graph = false});
  for (int repeat = 0; repeat < 5; ++repeat) {
    EXPECT_TRUE(same_bytes(chain.run(100, {.as_graph = false}), expected));
    EXPECT_TRUE(same_bytes(chain.run(100, {}), expected));
    EXPECT_TRUE(same_bytes(chain.run(100, {.dealt = true}), expected)) << "rows dealt";
    EXPECT_TRUE(same_bytes(chain.run(100, {.dealt = true, .codes_from = 1}), expected)) << "codes made ahead";
    EXPECT_TRUE(same_bytes(chain.run(100, {.dealt = true, .codes_from = Chain::kFfn}), expected))
        << "those of the wide rows alone";
    EXPECT_TRUE(same_bytes(chain.run(100, {.dealt = true, .codes_by_norm = true}), expected)) << "codes by the norms";
  }
  EXPECT_FALSE(same_bytes(chain.run(99, {}), expected));
}

/// The same of several tokens, on either path, with the codes of all products in one room: made by the norms, by
/// launches in front, or both in turn.
TEST(LinearChainGpu, CodesOfSeveralTokensInOneRoomDoNotChangeABit) {
  Chain chain;
  for (const std::int64_t n_token : {2, 4, 8}) {
    const std::vector<float> expected = chain.run(12, {.overlap = false, .as_graph = false}, n_token);
    for (const std::int64_t int8_from : {std::int64_t{1}, kMaxInt8Tokens + 1}) {
      for (const std::int64_t codes_from : {std::int64_t{0}, n_token * Chain::kFfn, std::int64_t{1}}) {
        const auto what = ::testing::Message()
                          << n_token << " tokens, int8 from " << int8_from << ", codes from " << codes_from;
        EXPECT_TRUE(same_bytes(
            chain.run(12, {.dealt = true, .codes_from = codes_from, .int8_from = int8_from}, n_token), expected))
            << what;
        EXPECT_TRUE(same_bytes(
            chain.run(12, {.dealt = true, .codes_from = codes_from, .codes_by_norm = true, .int8_from = int8_from},
                      n_token),
            expected))
            << what << ", by the norms";
      }
    }
    EXPECT_FALSE(same_bytes(chain.run(11, {}, n_token), expected));
  }
}

}  // namespace
}  // namespace gemma4::cuda
