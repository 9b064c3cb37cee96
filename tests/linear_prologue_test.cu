// SPDX-License-Identifier: Apache-2.0
// Products that begin by finishing the residual stream, and chains of products that overlap.
#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "cuda/fused_mlp.cuh"
#include "cuda/lm_head.cuh"
#include "cuda/quantized_linear.cuh"
#include "cuda/residual_norm.cuh"
#include "tests/support/device_weights.cuh"
#include "tests/support/linear_case.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

namespace gemma4::cuda {
namespace {

using namespace gemma4::testkit;

template <class T>
bool same_bytes(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

/// A residual stream with something pending, and the norms around it.
struct Stream31 {
  std::int64_t n_token, hidden;
  DeviceBuffer<float> x, pending, post_norm, norm;
  bool is_pending;
  float scale;

  Stream31(std::int64_t tokens, std::int64_t width, bool has_pending, float layer_scale, std::uint32_t seed)
      : n_token(tokens),
        hidden(width),
        x(random_activations(tokens * width, seed)),
        pending(random_activations(tokens * width, seed + 1, 20.0f)),
        post_norm(random_activations(width, seed + 2)),
        norm(random_activations(width, seed + 3)),
        is_pending(has_pending),
        scale(layer_scale) {}

  [[nodiscard]] View<const float, 2> pending_view() const {
    return make_view(is_pending ? pending.data() : nullptr, n_token, hidden);
  }
  [[nodiscard]] LinearPrologue prologue(DeviceBuffer<float>& residual_out) const {
    return {.residual = make_view(x.data(), n_token, hidden),
            .pending = pending_view(),
            .post_norm = post_norm.data(),
            .scale = scale,
            .norm = norm.data(),
            .epsilon = 1e-6f,
            .residual_out = make_view(residual_out.data(), n_token, hidden)};
  }
};

struct Outputs {
  std::vector<float> residual, product, logits;
  std::vector<Bf16> gated;
};

struct Layers {
  DeviceWeights first, second, pair, table;
  Layers(TensorType a, TensorType b, std::int64_t rows, std::int64_t cols, std::uint32_t seed)
      : first(random_weights(a, rows, cols, seed)),
        second(random_weights(b, 2 * rows + 1, cols, seed + 1)),
        pair(random_weights(a, rows, cols, seed + 2), random_weights(a, rows, cols, seed + 3)),
        table(random_weights(b, rows + 3, cols, seed + 4)) {}
};

/// Every product of the residual stream in one form or the other.
/// @param run(product) calls product(input), a View or a LinearPrologue
template <class TInput>
Outputs products_of(const TInput& input, std::int64_t n_token, const Layers& layers, DeviceBuffer<float>& residual) {
  const std::array<PackedMatrix, 2> weights{layers.first.view(), layers.second.view()};
  const std::int64_t rows = weights[0].rows, rows2 = weights[1].rows, vocab = layers.table.view().rows;
  DeviceBuffer<float> product(n_token * (rows + rows2)), logits(n_token * vocab);
  DeviceBuffer<Bf16> gated(n_token * rows);
  product.fill_bytes(0xFF), logits.fill_bytes(0xFF), gated.fill_bytes(0xFF);
  const std::array<View<float, 2>, 2> outs{make_view(product.data(), n_token, rows),
                                           make_view(product.data() + n_token * rows, n_token, rows2)};
  const std::span<const PackedMatrix> weight_span(weights);
  const std::span<const View<float, 2>> out_span(outs);
  const GateUpWeights gate_up{.joined = layers.pair.view(), .gate = {}, .up = {}};
  const auto gated_view = make_view(gated.data(), n_token, rows);
  const auto logits_view = make_view(logits.data(), n_token, vocab);
  if constexpr (std::is_same_v<TInput, LinearPrologue>) {
    quantized_linear_decode<float>(input, weight_span, out_span, current_device(), nullptr);
    gate_up_decode<Bf16>(input, gate_up, {}, gated_view, current_device(), nullptr);
    lm_head(input, layers.table.view(), 30.0f, logits_view, current_device(), nullptr);
  } else {
    quantized_linear_decode<Bf16, float>(input, weight_span, out_span, current_device(), nullptr);
    gate_up_decode<Bf16, Bf16>(input, gate_up, {}, gated_view, current_device(), nullptr);
    lm_head(input, layers.table.view(), 30.0f, logits_view, current_device(), nullptr);
  }
  return {residual.to_host(), product.to_host(), logits.to_host(), gated.to_host()};
}

Outputs fused(const Stream31& stream, const Layers& layers) {
  DeviceBuffer<float> residual(stream.n_token * stream.hidden);
  residual.fill_bytes(0xFF);
  return products_of(stream.prologue(residual), stream.n_token, layers, residual);
}

Outputs unfused(const Stream31& stream, const Layers& layers) {
  DeviceBuffer<float> residual = stream.x.clone();
  DeviceBuffer<Bf16> h(stream.n_token * stream.hidden);
  residual_norm<float, Bf16>(make_view(residual.data(), stream.n_token, stream.hidden), stream.pending_view(),
                             stream.post_norm.data(), stream.scale, stream.norm.data(), 1e-6f,
                             make_view(h.data(), stream.n_token, stream.hidden), nullptr);
  return products_of(make_view(static_cast<const Bf16*>(h.data()), stream.n_token, stream.hidden), stream.n_token,
                     layers, residual);
}

bool same(const Outputs& a, const Outputs& b) {
  return same_bytes(a.residual, b.residual) && same_bytes(a.product, b.product) && same_bytes(a.logits, b.logits) &&
         same_bytes(a.gated, b.gated);
}

constexpr std::array kPackedTypes = {TensorType::kQ4K, TensorType::kQ5K, TensorType::kQ6K, TensorType::kQ8_0};

RC_GTEST_PROP(LinearPrologueGpu, FusedHasTheBitsOfUnfused, ()) {
  const std::int64_t hidden = 256 * *rc::gen::element<std::int64_t>(1, 2, 7, 21, 24);
  const auto rows = *rc::gen::inRange<std::int64_t>(1, 300);
  const auto n_token = *rc::gen::inRange<std::int64_t>(1, 9);
  const auto seed = *rc::gen::arbitrary<std::uint32_t>();
  const bool is_pending = *rc::gen::arbitrary<bool>();
  const float scale = *rc::gen::element(1.0f, 0.37f);
  const Layers layers(*rc::gen::elementOf(kPackedTypes), *rc::gen::elementOf(kPackedTypes), rows, hidden, seed);
  const Stream31 stream(n_token, hidden, is_pending, scale, seed);
  const Outputs expected = unfused(stream, layers), out = fused(stream, layers);
  RC_ASSERT(same(out, expected));
  RC_ASSERT(same(fused(stream, layers), out));  // again
  // Controls: what is pending matters, and so does the scale of the layer where something is.
  RC_ASSERT(!same(fused(Stream31(n_token, hidden, !is_pending, scale, seed), layers), expected));
  if (is_pending) {
    const float nearby = scale * (1.0f + 0x1p-22f);
    RC_ASSERT(!same(fused(Stream31(n_token, hidden, true, nearby, seed), layers), expected));
  }
}

TEST(LinearPrologueGpu, ResidualNeedNotBeStored) {
  const Layers layers(TensorType::kQ4K, TensorType::kQ6K, 70, 512, 5);
  const Stream31 stream(2, 512, true, 0.5f, 6);
  DeviceBuffer<float> residual(2 * 512);
  residual.fill_bytes(0);
  LinearPrologue in = stream.prologue(residual);
  in.residual_out.data = nullptr;
  const Outputs out = products_of(in, 2, layers, residual);
  EXPECT_TRUE(same_bytes(out.product, unfused(stream, layers).product));
  EXPECT_EQ(out.residual, std::vector<float>(2 * 512, 0.0f));
}

/// Steps of a model as long as a decode step: every product reads what the one before wrote.
class Chain {
 public:
  Chain() : device_(current_device()) {
    for (std::uint32_t i = 0; i < kLayers; ++i) {
      const TensorType type = i % 2 == 0 ? TensorType::kQ4K : TensorType::kQ6K;
      layers_.push_back({DeviceWeights(random_weights(type, kHidden, kHidden, 10 * i + 1)),
                         DeviceWeights(random_weights(type, kFfn, kHidden, 10 * i + 2),
                                       random_weights(type, kFfn, kHidden, 10 * i + 3)),
                         DeviceWeights(random_weights(type, kHidden, kFfn, 10 * i + 4))});
    }
  }

  /// The residual stream behind `n_layer` layers.
  /// @param dealt  rows by ticket, all products with the same tickets
  /// @param apart  the stream is finished and normalised in launches of their own
  std::vector<float> run(std::size_t n_layer, bool overlap, bool as_graph, std::int64_t hint_bytes, bool dealt = false,
                         bool apart = false) {
    dealt_ = dealt, apart_ = apart;
    DeviceInfo device = device_;
    if (!overlap) device.compute_capability = std::min(device.compute_capability, 80);
    residual_[0] = DeviceBuffer<float>(random_activations(kHidden, 77));
    if (as_graph) {
      const Graph graph = Graph::capture(stream_, [&] { enqueue(n_layer, device, hint_bytes); });
      graph.launch(stream_);
    } else {
      enqueue(n_layer, device, hint_bytes);
    }
    return pending_.to_host(stream_);
  }

 private:
  static constexpr std::int64_t kHidden = 1024, kFfn = 3072;
  static constexpr std::size_t kLayers = 24;
  struct Layer {
    DeviceWeights square, gate_up, down;
  };

  void enqueue(std::size_t n_layer, const DeviceInfo& device, std::int64_t hint_bytes) {
    int at = 0;
    bool is_pending = false;
    const auto normalised = [&] {
      residual_norm<float, Bf16>(
          make_view(residual_[0].data(), 1, kHidden),
          make_view(is_pending ? static_cast<const float*>(pending_.data()) : nullptr, 1, kHidden), norm_.data(), 0.9f,
          norm_.data(), 1e-6f, make_view(normed_.data(), 1, kHidden), stream_, device.compute_capability >= 90, true);
      is_pending = true;
      return make_view(static_cast<const Bf16*>(normed_.data()), 1, kHidden);
    };
    const auto prologue = [&] {
      const LinearPrologue in{
          .residual = make_view(static_cast<const float*>(residual_[at].data()), 1, kHidden),
          .pending = make_view(is_pending ? static_cast<const float*>(pending_.data()) : nullptr, 1, kHidden),
          .post_norm = norm_.data(),
          .scale = 0.9f,
          .norm = norm_.data(),
          .epsilon = 1e-6f,
          .residual_out = make_view(residual_[1 - at].data(), 1, kHidden)};
      at = 1 - at;
      is_pending = true;
      return in;
    };
    for (std::size_t i = 0; i < n_layer; ++i) {
      const Layer& layer = layers_[i % layers_.size()];
      const auto hint = [&](const DeviceWeights& next) {
        return LinearOptions{.tickets = dealt_ ? tickets_.data() : nullptr,
                             .next_weights = next.view().data,
                             .next_bytes = std::min(hint_bytes, next.view().bytes())};
      };
      const PackedMatrix square = layer.square.view();
      const View<float, 2> out = make_view(pending_.data(), 1, kHidden);
      // `pending_` is read and written by one launch: into another buffer, and back by the product behind it.
      const View<float, 2> between = make_view(between_.data(), 1, kHidden);
      const auto gated = make_view(gated_.data(), 1, kFfn);
      const GateUpWeights gate_up{.joined = layer.gate_up.view(), .gate = {}, .up = {}};
      if (apart_) {
        quantized_linear_decode<Bf16, float>(normalised(), square, between, device, stream_, hint(layer.square));
      } else {
        quantized_linear_decode<float>(prologue(), std::span(&square, 1), std::span(&between, 1), device, stream_,
                                       hint(layer.square));
      }
      quantized_linear_decode<float, float>(make_view(static_cast<const float*>(between_.data()), 1, kHidden), square,
                                            out, device, stream_, hint(layer.gate_up));
      if (apart_) {
        gate_up_decode<Bf16, Bf16>(normalised(), gate_up, {}, gated, device, stream_, hint(layer.down));
      } else {
        gate_up_decode<Bf16>(prologue(), gate_up, {}, gated, device, stream_, hint(layer.down));
      }
      quantized_linear_decode<Bf16, float>(make_view(static_cast<const Bf16*>(gated_.data()), 1, kFfn),
                                           layer.down.view(), out, device, stream_, hint(layer.square));
    }
  }

  DeviceInfo device_;
  bool dealt_ = false, apart_ = false;
  DeviceBuffer<LinearTickets> tickets_{std::vector<LinearTickets>(1)};
  gemma4::cuda::Stream stream_;
  std::vector<Layer> layers_;
  std::array<DeviceBuffer<float>, 2> residual_{DeviceBuffer<float>(kHidden), DeviceBuffer<float>(kHidden)};
  DeviceBuffer<float> pending_{kHidden}, between_{kHidden}, norm_{std::vector<float>(kHidden, 1.0f)};
  DeviceBuffer<Bf16> gated_{kFfn}, normed_{kHidden};
};

/// Kernels that begin before the one in front has ended read nothing too early and write nothing too early: 400
/// launches, each on the result of the one before, have the bits of launches one after another. (The control of the
/// comparison: one layer less is seen.)
TEST(LinearChainGpu, OverlapAndGraphDoNotChangeABit) {
  Chain chain;
  const std::vector<float> expected = chain.run(100, false, false, 0);
  for (int repeat = 0; repeat < 5; ++repeat) {
    EXPECT_TRUE(same_bytes(chain.run(100, true, false, 0), expected));
    EXPECT_TRUE(same_bytes(chain.run(100, true, true, 0), expected));
    EXPECT_TRUE(same_bytes(chain.run(100, true, true, 1 << 20), expected)) << "with hints";
    EXPECT_TRUE(same_bytes(chain.run(100, true, true, 0, true), expected)) << "with tickets";
    EXPECT_TRUE(same_bytes(chain.run(100, true, true, 1 << 20, true, true), expected)) << "normalised apart";
  }
  EXPECT_FALSE(same_bytes(chain.run(99, true, true, 0), expected));
}

TEST(LinearProloguePlan, Refusals) {
  std::vector<float> memory(1 << 15);
  float* const data = memory.data();
  const auto call = [&](auto change) {
    return [&, change] {
      LinearPrologue in{.residual = make_view(static_cast<const float*>(data), 1, 256),
                        .pending = make_view(static_cast<const float*>(data + 1024), 1, 256),
                        .post_norm = data,
                        .scale = 1.0f,
                        .norm = data,
                        .epsilon = 1e-6f,
                        .residual_out = make_view(data + 2048, 1, 256)};
      PackedMatrix weight{TensorType::kQ4K, 4, 256, nullptr};
      change(in, weight);
      const View<float, 2> out = make_view(data, in.residual.extent[0], 4);
      quantized_linear_decode<float>(in, std::span(&weight, 1), std::span(&out, 1), DeviceInfo{}, nullptr);
    };
  };
  EXPECT_TRUE(refuses(call([](auto& in, auto&) { in.norm = nullptr; }), {"norm"}));
  EXPECT_TRUE(refuses(call([](auto& in, auto&) { in.post_norm = nullptr; }), {"norm"}));
  EXPECT_TRUE(refuses(call([&](auto& in, auto&) { in.residual_out.data = data; }), {"residual_out", "residual"}));
  EXPECT_TRUE(refuses(call([](auto& in, auto&) { in.pending.extent[1] = 128; }), {"pending", "128", "256"}));
  EXPECT_TRUE(refuses(call([](auto&, auto& weight) { weight.type = TensorType::kBf16; }), {"BF16", "residual_norm"}));
  EXPECT_TRUE(refuses(call([&](auto& in, auto& weight) {
                        in.residual = make_view(static_cast<const float*>(data), 1, 8192);
                        weight.cols = 8192;
                      }),
                      {"8192 columns", "at most 6144"}));
  EXPECT_TRUE(refuses(call([&](auto& in, auto&) { in.residual = make_view(static_cast<const float*>(data), 9, 256); }),
                      {"9 tokens", "at most 8"}));
}

}  // namespace
}  // namespace gemma4::cuda
