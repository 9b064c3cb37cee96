// SPDX-License-Identifier: Apache-2.0
#include "cuda/backend/finite.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cuda/device/device_buffer.cuh"
#include "cuda/session.cuh"
#include "gemma4/gguf/model_tensors.hpp"
#include "reference/backend.hpp"
#include "tests/support/property.hpp"
#include "tests/support/spoiled_model.hpp"

/// What is not finite on the device is an error with the position and the layer where the reference says that it began:
/// on the path of a few tokens and on that of prefill, in every cache format's attention, in the middle of a prompt,
/// and in a decode step. Each case has its control: the same weights unspoiled.
namespace {

using namespace gemma4;
using testkit::config_to_spoil;
using testkit::SpoiledModel;

constexpr const char* kCaches[] = {"bf16", "tq4"};

std::vector<std::int32_t> prompt(std::int64_t count) {
  std::vector<std::int32_t> tokens(static_cast<std::size_t>(count));
  std::iota(tokens.begin(), tokens.end(), 20);
  return tokens;
}

cuda::BackendOptions small_options(const std::string& cache) {
  return {.cache = parse_cache_spec(cache), .context = 128, .max_chunk = 64, .n_logit_row = 1};
}

/// Weights that are not finite are refused when they are loaded, by their names; here they become so afterwards.
using Poison = std::function<void(const cuda::PackedModel&)>;
void fill_with_nan(const void* data, std::int64_t bytes) {  // of float, float16 and bf16
  cuda::check(cudaMemset(const_cast<void*>(data), 0xFF, static_cast<std::size_t>(bytes)), "poison");
}
void poison_row(const cuda::PackedMatrix& matrix, std::int64_t row) {
  fill_with_nan(matrix.data + row * matrix.row_bytes(), matrix.row_bytes());
}

/// A model on the device, unspoiled but for what `poison` does to it.
struct PoisonedModel {
  PoisonedModel(std::uint64_t seed, const Poison& poison)
      : model(config_to_spoil(), seed), packed(model.weights, model_tensors(*model.file)) {
    poison(packed);
  }
  SpoiledModel model;
  cuda::PackedModel packed;
};

std::optional<NotFinite> where_on_device(const cuda::PackedModel& packed, const std::string& cache,
                                         std::span<const std::int32_t> tokens, std::int64_t chunk) {
  cuda::Backend backend(packed, small_options(cache));
  cuda::Session session(backend);
  try {
    session.prefill(tokens, chunk);
  } catch (const NotFiniteError& error) {
    return error.where();
  }
  return std::nullopt;
}

std::optional<NotFinite> where_in_reference(const SpoiledModel& model, const std::string& cache,
                                            std::span<const std::int32_t> tokens, std::int64_t chunk) {
  reference::Backend<float> backend(model.weights, {.cache = parse_cache_spec(cache), .context = 128, .max_chunk = 64});
  Model<reference::Backend<float>> graph(backend);
  try {
    graph.prefill(tokens, chunk, [](std::int64_t) {});
  } catch (const NotFiniteError& error) {
    return error.where();
  }
  return std::nullopt;
}

std::string text_of(const std::optional<NotFinite>& where) {
  return where ? concat("position ", where->position, ", layer ",
                        where->layer ? std::to_string(*where->layer) : std::string("not known"))
               : std::string("nowhere");
}

/// @param model of seed 3, spoiled for the reference as `poison` spoils it on the device
void expect_like_reference(const SpoiledModel& model, const std::string& what, bool is_spoiled, const Poison& poison) {
  const auto tokens = prompt(40);
  const PoisonedModel poisoned(3, poison);
  for (const char* cache : kCaches) {
    for (const std::int64_t chunk : {1, 5, 16, 64}) {
      const auto expected = where_in_reference(model, cache, tokens, chunk);
      ASSERT_EQ(expected.has_value(), is_spoiled) << what << ": the reference itself";
      const auto actual = where_on_device(poisoned.packed, cache, tokens, chunk);
      EXPECT_EQ(text_of(actual), text_of(expected)) << what << ", cache " << cache << ", chunk " << chunk;
    }
  }
}

TEST(BackendFinite, AnUnspoiledModelHasNothingToNote) {  // the control of all below
  expect_like_reference(SpoiledModel(config_to_spoil(), 3), "control", false, [](const cuda::PackedModel&) {});
}

TEST(BackendFinite, ANormThatIsNaNIsNamedByItsLayer) {
  {
    SpoiledModel model(config_to_spoil(), 3);
    const auto bytes = static_cast<std::int64_t>(model.weights.output_norm.size_bytes());
    model.spoil(model.weights.output_norm);
    expect_like_reference(model, "output_norm", true,
                          [&](const cuda::PackedModel& packed) { fill_with_nan(packed.output_norm(), bytes); });
  }
  using OfHost = std::span<const float> LayerWeights::*;
  using OfDevice = const float* cuda::PackedLayer::*;
  struct Norm {
    OfHost of_host;
    OfDevice of_device;
    const char* name;
  };
  const Norm norms[] = {
      {&LayerWeights::attn_norm, &cuda::PackedLayer::attn_norm, "attn_norm"},
      {&LayerWeights::attn_q_norm, &cuda::PackedLayer::attn_q_norm, "attn_q_norm"},
      {&LayerWeights::attn_k_norm, &cuda::PackedLayer::attn_k_norm, "attn_k_norm"},
      {&LayerWeights::post_attention_norm, &cuda::PackedLayer::post_attention_norm, "post_attention_norm"},
      {&LayerWeights::ffn_norm, &cuda::PackedLayer::ffn_norm, "ffn_norm"},
      {&LayerWeights::post_ffw_norm, &cuda::PackedLayer::post_ffw_norm, "post_ffw_norm"}};
  for (const Norm& norm : norms) {
    for (const std::size_t layer : {0u, 1u}) {  // sliding, full
      SpoiledModel model(config_to_spoil(), 3);
      std::span<const float>& values = model.weights.layers[layer].*norm.of_host;
      const auto bytes = static_cast<std::int64_t>(values.size_bytes());
      model.spoil(values);
      expect_like_reference(model, concat(norm.name, " of layer ", layer), true, [&](const cuda::PackedModel& packed) {
        fill_with_nan(packed.layer(static_cast<std::int64_t>(layer)).*norm.of_device, bytes);
      });
    }
  }
}

TEST(BackendFinite, AScaleOfAMatrixThatIsNaNIsNamedByItsLayer) {
  using OfHost = QuantizedMatrix LayerWeights::*;
  using OfDevice = cuda::PackedMatrix cuda::PackedLayer::*;
  struct Matrix {
    OfHost of_host;
    std::function<void(const cuda::PackedLayer&)> poison;
    const char* name;
  };
  const auto poison_of = [](OfDevice matrix) {
    return [matrix](const cuda::PackedLayer& layer) { poison_row(layer.*matrix, 2); };
  };
  const auto poison_pair = [](std::int64_t which) {  // gate and up in turn, where they are joined
    return [which](const cuda::PackedLayer& layer) {
      const auto& pair = layer.gate_up;
      if (pair.is_fused()) return poison_row(pair.joined, 2 * 2 + which);
      poison_row(which == 0 ? pair.gate : pair.up, 2);
    };
  };
  const Matrix matrices[] = {{&LayerWeights::attn_q, poison_of(&cuda::PackedLayer::attn_q), "attn_q"},
                             {&LayerWeights::attn_k, poison_of(&cuda::PackedLayer::attn_k), "attn_k"},
                             {&LayerWeights::attn_output, poison_of(&cuda::PackedLayer::attn_output), "attn_output"},
                             {&LayerWeights::ffn_gate, poison_pair(0), "ffn_gate"},
                             {&LayerWeights::ffn_up, poison_pair(1), "ffn_up"},
                             {&LayerWeights::ffn_down, poison_of(&cuda::PackedLayer::ffn_down), "ffn_down"}};
  for (const Matrix& matrix : matrices) {
    for (const std::size_t layer : {0u, 1u}) {
      SpoiledModel model(config_to_spoil(), 3);
      model.spoil(model.weights.layers[layer].*matrix.of_host, 2);
      expect_like_reference(
          model, concat(matrix.name, " of layer ", layer), true,
          [&](const cuda::PackedModel& packed) { matrix.poison(packed.layer(static_cast<std::int64_t>(layer))); });
    }
  }
}

TEST(BackendFinite, WeightsThatAreNotFiniteAreRefusedWhenTheyAreLoaded) {
  SpoiledModel model(config_to_spoil(), 3);
  model.spoil(model.weights.output_norm);
  EXPECT_THROW(cuda::PackedModel(model.weights, model_tensors(*model.file)), FormatError);
}

TEST(BackendFinite, AnEmbeddingThatIsNaNIsFoundInTheMiddleOfAPrompt) {
  const PoisonedModel poisoned(4, [](const cuda::PackedModel& packed) { poison_row(packed.token_embd(), 31); });
  const auto tokens = prompt(40);  // 31 is the twelfth
  for (const char* cache : kCaches) {
    for (const std::int64_t chunk : {1, 5, 16, 64}) {
      EXPECT_EQ(text_of(where_on_device(poisoned.packed, cache, tokens, chunk)), "position 11, layer -1")
          << "cache " << cache << ", chunk " << chunk;
    }
  }
}

TEST(BackendFinite, ADecodeStepThatIsNotFiniteIsNamedAndTheNextSequenceWorks) {
  // Rows beyond the greedy choice of the prompt do not matter: what the head makes of them is NaN for every position,
  // so the prompt's own logits are the first.
  const PoisonedModel poisoned(4, [](const cuda::PackedModel& packed) { poison_row(packed.token_embd(), 299); });
  cuda::Backend backend(poisoned.packed, small_options("bf16"));
  cuda::Session session(backend);
  try {
    session.prefill(prompt(20), 16);
    FAIL() << "nothing was thrown";
  } catch (const NotFiniteError& error) {
    EXPECT_EQ(text_of(error.where()), "position 19, layer 3") << error.what();
  }
  EXPECT_THROW(session.decode(1, {}), std::invalid_argument) << "there is nothing to continue";

  const SpoiledModel good(config_to_spoil(), 4);
  const cuda::PackedModel good_packed(good.weights, model_tensors(*good.file));
  for (const bool use_graph : {true, false}) {
    cuda::Backend steps(good_packed, small_options("bf16"));
    cuda::Session decoding(steps, {.use_graph = use_graph});
    decoding.prefill(prompt(20), 16);
    decoding.decode(5, {});
    steps.poison(0xFF);  // the logits, and every cache
    try {
      decoding.decode(5, {});
      ADD_FAILURE() << "nothing was thrown";
    } catch (const NotFiniteError& error) {
      EXPECT_EQ(error.where().position, 24) << error.what();
      EXPECT_FALSE(error.where().layer) << "once more the same tokens are finite: " << error.what();
    }
    decoding.reset();
    EXPECT_NO_THROW(decoding.prefill(prompt(20), 16));
    EXPECT_NO_THROW(decoding.decode(5, {}));
  }
}

TEST(BackendFinite, APromptAfterOneThatWasNotFiniteIsJudgedByItself) {
  const PoisonedModel poisoned(4, [](const cuda::PackedModel& packed) { poison_row(packed.token_embd(), 31); });
  cuda::Backend backend(poisoned.packed, small_options("tq4"));
  Model<cuda::Backend> graph(backend);
  const auto bad = prompt(20);
  const std::vector<std::int32_t> good(20, 77);
  graph.reset();
  graph.forward(bad, {});
  EXPECT_THROW(graph.require_finite(bad), NotFiniteError);
  graph.reset();
  graph.forward(good, {});
  EXPECT_NO_THROW(graph.require_finite(good)) << "no logits were asked for, and no row of it holds the token";
}

/// The kernel by itself: any place of any row, of rows longer than a block's share too.
RC_GTEST_PROP(BackendFinite, AnyPlaceIsSeenAndTheFirstPositionKept, ()) {
  const auto n_row = *rc::gen::inRange<std::int64_t>(1, 40);
  const auto row_len = *rc::gen::element<std::int64_t>(1, 255, 256, 257, 5376, 8191, 8192, 8193, 20000);
  const auto first = *rc::gen::inRange<std::int64_t>(0, 131072);
  const auto n_bad = *rc::gen::inRange<int>(0, 4);
  std::vector<float> values(static_cast<std::size_t>(n_row * row_len), -std::numeric_limits<float>::max());
  std::int64_t expected = std::numeric_limits<std::int64_t>::max();
  for (int i = 0; i < n_bad; ++i) {
    const auto at = *rc::gen::inRange<std::int64_t>(0, n_row * row_len);
    values[static_cast<std::size_t>(at)] =
        *rc::gen::element(std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                          -std::numeric_limits<float>::infinity());
    expected = std::min(expected, first + at / row_len);
  }
  const cuda::DeviceBuffer<float> device(values);
  cuda::DeviceBuffer<cuda::SequenceState> state(1);
  state.fill_bytes(0);
  cuda::note_not_finite(make_view(device.data(), n_row, row_len), first, state.data(), nullptr);
  const std::int32_t noted = state.to_host().front().not_finite;
  RC_ASSERT((noted == 0 ? std::numeric_limits<std::int64_t>::max() : std::int64_t{INT32_MAX} - noted) == expected);
}

}  // namespace
