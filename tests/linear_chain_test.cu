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
  static constexpr std::int64_t kFfn = 3072;

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

  /// The residual stream behind `n_layer` layers.
  /// @param dealt       rows by ticket, all products with the same tickets
  /// @param codes_from  values of a product from which its codes are made ahead, all in the same room; 0: never
  std::vector<float> run(std::size_t n_layer, bool overlap, bool as_graph, bool dealt = false,
                         std::int64_t codes_from = 0) {
    LinearOptions options{.tickets = dealt ? tickets_.data() : nullptr};
    if (codes_from > 0) options.codes = {codes_.data(), codes_.size()}, options.codes_from = codes_from;
    DeviceInfo device = device_;
    if (!overlap) device.compute_capability = std::min(device.compute_capability, 80);
    residual_ = DeviceBuffer<float>(random_activations(kHidden, 77));
    if (as_graph) {
      const Graph graph = Graph::capture(stream_, [&] { enqueue(n_layer, device, options); });
      graph.launch(stream_);
    } else {
      enqueue(n_layer, device, options);
    }
    return pending_.to_host(stream_);
  }

 private:
  static constexpr std::int64_t kHidden = 1024;
  static constexpr std::size_t kLayers = 24;
  struct Layer {
    DeviceWeights square, gate_up, down;
  };

  void enqueue(std::size_t n_layer, const DeviceInfo& device, const LinearOptions& options) {
    bool is_pending = false;
    const auto normalised = [&] {
      residual_norm<float, Bf16>(
          make_view(residual_.data(), 1, kHidden),
          make_view(is_pending ? static_cast<const float*>(pending_.data()) : nullptr, 1, kHidden), norm_.data(), 0.9f,
          norm_.data(), 1e-6f, make_view(normed_.data(), 1, kHidden), stream_, device.compute_capability >= 90, true);
      is_pending = true;
      return make_view(static_cast<const Bf16*>(normed_.data()), 1, kHidden);
    };
    for (std::size_t i = 0; i < n_layer; ++i) {
      const Layer& layer = layers_[i % layers_.size()];
      const PackedMatrix square = layer.square.view();
      const View<float, 2> out = make_view(pending_.data(), 1, kHidden);
      const View<float, 2> between = make_view(between_.data(), 1, kHidden);
      const auto gated = make_view(gated_.data(), 1, kFfn);
      const GateUpWeights gate_up{.joined = layer.gate_up.view(), .gate = {}, .up = {}};
      quantized_linear_decode<Bf16, float>(normalised(), square, between, device, stream_, options);
      quantized_linear_decode<float, float>(make_view(static_cast<const float*>(between_.data()), 1, kHidden), square,
                                            out, device, stream_, options);
      gate_up_decode<Bf16, Bf16>(normalised(), gate_up, {}, gated, device, stream_, options);
      quantized_linear_decode<Bf16, float>(make_view(static_cast<const Bf16*>(gated_.data()), 1, kFfn),
                                           layer.down.view(), out, device, stream_, options);
    }
  }

  DeviceInfo device_;
  DeviceBuffer<LinearTickets> tickets_{std::vector<LinearTickets>(1)};
  DeviceBuffer<std::uint8_t> codes_{linear_codes_bytes(1, kFfn)};
  gemma4::cuda::Stream stream_;
  std::vector<Layer> layers_;
  DeviceBuffer<float> residual_{kHidden}, pending_{kHidden}, between_{kHidden},
      norm_{std::vector<float>(kHidden, 1.0f)};
  DeviceBuffer<Bf16> gated_{kFfn}, normed_{kHidden};
};

/// Kernels that begin before the one in front has ended read nothing too early and write nothing too early: 400
/// launches, each on the result of the one before, have the bits of launches one after another. (The control of the
/// comparison: one layer less is seen.)
TEST(LinearChainGpu, OverlapAndGraphDoNotChangeABit) {
  Chain chain;
  const std::vector<float> expected = chain.run(100, false, false);
  for (int repeat = 0; repeat < 5; ++repeat) {
    EXPECT_TRUE(same_bytes(chain.run(100, true, false), expected));
    EXPECT_TRUE(same_bytes(chain.run(100, true, true), expected));
    EXPECT_TRUE(same_bytes(chain.run(100, true, true, true), expected)) << "rows dealt";
    EXPECT_TRUE(same_bytes(chain.run(100, true, true, true, 1), expected)) << "codes made ahead";
    EXPECT_TRUE(same_bytes(chain.run(100, true, true, true, Chain::kFfn), expected)) << "those of the wide rows alone";
  }
  EXPECT_FALSE(same_bytes(chain.run(99, true, true), expected));
}

}  // namespace
}  // namespace gemma4::cuda
