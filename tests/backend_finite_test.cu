// SPDX-License-Identifier: Apache-2.0
#include "cuda/backend/finite.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
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

std::optional<NotFinite> where_on_device(const SpoiledModel& model, const std::string& cache,
                                         std::span<const std::int32_t> tokens, std::int64_t chunk) {
  const cuda::PackedModel packed(model.weights, model_tensors(*model.file));
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

void expect_like_reference(const SpoiledModel& model, const std::string& what, bool is_spoiled) {
  const auto tokens = prompt(40);
  for (const char* cache : kCaches) {
    for (const std::int64_t chunk : {1, 5, 16, 64}) {
      const auto expected = where_in_reference(model, cache, tokens, chunk);
      ASSERT_EQ(expected.has_value(), is_spoiled) << what << ": the reference itself";
      const auto actual = where_on_device(model, cache, tokens, chunk);
      EXPECT_EQ(text_of(actual), text_of(expected)) << what << ", cache " << cache << ", chunk " << chunk;
    }
  }
}

TEST(BackendFinite, AnUnspoiledModelHasNothingToNote) {  // the control of all below
  expect_like_reference(SpoiledModel(config_to_spoil(), 3), "control", false);
}

TEST(BackendFinite, ANormThatIsNaNIsNamedByItsLayer) {
  {
    SpoiledModel model(config_to_spoil(), 3);
    model.spoil(model.weights.output_norm);
    expect_like_reference(model, "output_norm", true);
  }
  using Norm = std::span<const float> LayerWeights::*;
  const std::pair<Norm, const char*> norms[] = {
      {&LayerWeights::attn_norm, "attn_norm"},     {&LayerWeights::attn_q_norm, "attn_q_norm"},
      {&LayerWeights::attn_k_norm, "attn_k_norm"}, {&LayerWeights::post_attention_norm, "post_attention_norm"},
      {&LayerWeights::ffn_norm, "ffn_norm"},       {&LayerWeights::post_ffw_norm, "post_ffw_norm"}};
  for (const auto& [norm, name] : norms) {
    for (const std::size_t layer : {0u, 1u}) {  // sliding, full
      SpoiledModel model(config_to_spoil(), 3);
      model.spoil(model.weights.layers[layer].*norm);
      expect_like_reference(model, concat(name, " of layer ", layer), true);
    }
  }
}

TEST(BackendFinite, AScaleOfAMatrixThatIsNaNIsNamedByItsLayer) {
  using Matrix = QuantizedMatrix LayerWeights::*;
  const std::pair<Matrix, const char*> matrices[] = {
      {&LayerWeights::attn_q, "attn_q"},           {&LayerWeights::attn_k, "attn_k"},
      {&LayerWeights::attn_output, "attn_output"}, {&LayerWeights::ffn_gate, "ffn_gate"},
      {&LayerWeights::ffn_up, "ffn_up"},           {&LayerWeights::ffn_down, "ffn_down"}};
  for (const auto& [matrix, name] : matrices) {
    for (const std::size_t layer : {0u, 1u}) {
      SpoiledModel model(config_to_spoil(), 3);
      model.spoil(model.weights.layers[layer].*matrix, 2);
      expect_like_reference(model, concat(name, " of layer ", layer), true);
    }
  }
}

TEST(BackendFinite, AnEmbeddingThatIsNaNIsFoundInTheMiddleOfAPrompt) {
  SpoiledModel model(config_to_spoil(), 4);
  model.spoil(model.weights.token_embd, 31);
  const auto tokens = prompt(40);  // 31 is the twelfth
  for (const char* cache : kCaches) {
    for (const std::int64_t chunk : {1, 5, 16, 64}) {
      EXPECT_EQ(text_of(where_on_device(model, cache, tokens, chunk)), "position 11, layer -1")
          << "cache " << cache << ", chunk " << chunk;
    }
  }
}

TEST(BackendFinite, ADecodeStepThatIsNotFiniteIsNamedAndTheNextSequenceWorks) {
  SpoiledModel model(config_to_spoil(), 4);
  // Rows beyond the greedy choice of the prompt do not matter: what the head makes of them is NaN for every position,
  // so the prompt's own logits are the first.
  model.spoil(model.weights.token_embd, 299);
  const cuda::PackedModel packed(model.weights, model_tensors(*model.file));
  cuda::Backend backend(packed, small_options("bf16"));
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
  SpoiledModel model(config_to_spoil(), 4);
  model.spoil(model.weights.token_embd, 31);
  const cuda::PackedModel packed(model.weights, model_tensors(*model.file));
  cuda::Backend backend(packed, small_options("tq4"));
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
