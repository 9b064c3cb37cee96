// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "cuda/backend.cuh"
#include "gemma4/model/golden.hpp"
#include "reference/backend.hpp"
#include "tests/support/layer_streams.hpp"
#include "tests/support/model_logits.hpp"
#include "tests/support/retyped_model.hpp"

/// tiny and nano, requantised by this project's encoder to Q4_0, on the device against the reference: layer by layer,
/// each begun with the device's own stream, so that what a layer makes of an error is not counted.
namespace {

using namespace gemma4;
using testkit::all_matrices;
using testkit::Layers;
using testkit::RetypedModel;
using testkit::rows_close;

const std::filesystem::path kData = GEMMA4_TEST_DATA;

/// How far the device may be off, in what the same layer of the reference is off when its matrices are rounded to Q8_0
/// once more (0.53 % of normal weights, at random). An activation in 8 bits is off by s / sqrt(12), s = max / 127 of 32
/// values: 0.6 % of normal ones, and 1.3 %, 2.4 times as much, in the worst of all blocks, whose maximum is its length.
/// Six roundings to bf16 of 0.1 % on the way of a branch of three products add a tenth to that. The rest to 3 is for
/// two draws of a few rows. (A reference that rounds its activations so comes to 0.35 to 0.6 of the bound; the control
/// to four times it.)
constexpr double kRoundings = 3;

/// All in Q4_0; or the mix of published files, whose embedding stays as it is, Q6_K.
testkit::TypeOf q4_0(bool with_embedding) {
  return [with_embedding](const GgufTensor& tensor) {
    const bool is_chosen = tensor.dims.size() > 1 && (with_embedding || tensor.name != "token_embd.weight");
    return is_chosen ? std::optional(TensorType::kQ4_0) : std::nullopt;
  };
}

reference::Backend<float> reference_of(const ModelWeights& weights) {
  return {weights, {.cache = parse_cache_spec("bf16"), .context = 64, .max_chunk = 64}};
}

/// What the reference makes of each layer's stream before it, and at last of the logits.
Layers outputs(reference::Backend<float>&& backend, std::span<const std::int32_t> tokens, const Layers& stream) {
  Layers all = testkit::layer_by_layer(backend, tokens, stream, 0, 0);
  backend.set_residual(stream.back());
  all.push_back(testkit::logits_of_chunk(backend, tokens.size()));
  return all;
}

void expect_parity(const std::string& name, bool with_embedding, std::size_t n_token) {
  const RetypedModel model(kData / (name + ".gguf"), q4_0(with_embedding));
  const RetypedModel rounded(model.file(), all_matrices(TensorType::kQ8_0));
  const ModelWeights weights = model.weights(), rounded_weights = rounded.weights();
  const GgufFile original_file = GgufFile::open(kData / (name + ".gguf"));
  const ModelWeights original_weights = weights_from_gguf(original_file);
  std::vector<std::int32_t> tokens = read_golden_logits(kData / (name + "-logits.gguf")).ids;
  tokens.resize(n_token);

  const cuda::PackedModel packed(weights, model_tensors(model.file()), {});
  cuda::Backend device(packed, {.cache = parse_cache_spec("bf16"), .context = 64, .max_chunk = 64, .n_logit_row = 64});
  Layers stream = testkit::stream_of(device, tokens);
  const std::vector<float> logits = testkit::logits_of_chunk(device, tokens.size());
  const Layers expected = outputs(reference_of(weights), tokens, stream);
  const Layers nearby = outputs(reference_of(rounded_weights), tokens, stream);
  const Layers original = outputs(reference_of(original_weights), tokens, stream);
  ASSERT_EQ(expected.size(), static_cast<std::size_t>(weights.config.n_layer() + 1));
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const bool is_logits = i + 1 == expected.size();
    const std::int64_t row_len = is_logits ? weights.config.vocab : weights.config.hidden;
    const double bound = kRoundings * testkit::row_error(nearby[i], expected[i], row_len).worst;
    const std::vector<float>& actual = is_logits ? logits : stream[i + 1];
    const std::string where = concat(name, with_embedding ? "" : ", embedding as it was", ", ", n_token, " tokens, ",
                                     is_logits ? "logits" : concat("layer ", i));
    EXPECT_TRUE(rows_close(actual, expected[i], row_len, bound)) << where;
    // The control: the weights before they were requantised, 8.6 % from these.
    const bool is_other = !is_logits || with_embedding;
    EXPECT_TRUE(!is_other || !rows_close(actual, original[i], row_len, bound)) << where;
  }
}

TEST(RequantisedModel, TinyInQ4_0IsThatOfTheReference) {
  for (const char* name : {"tiny/tiny-a-Q6_K", "tiny/tiny-a-Q4_K_M"}) {
    for (const bool with_embedding : {true, false}) {
      for (const std::size_t n_token : {1u, 6u, 40u}) expect_parity(name, with_embedding, n_token);
    }
  }
}

TEST(RequantisedModel, NanoInQ4_0IsThatOfTheReference) {
  for (const bool with_embedding : {true, false}) {
    for (const std::size_t n_token : {1u, 6u, 40u}) expect_parity("nano/nano-Q4_K_M", with_embedding, n_token);
  }
}

/// The whole of a trained model, a token at a time and in one chunk: it makes no more of errors than its layers do.
TEST(RequantisedModel, LogitsOfNanoInQ4_0AreThoseOfTheReference) {
  const std::string name = "nano/nano-Q4_K_M";
  const RetypedModel model(kData / (name + ".gguf"), q4_0(true));
  const RetypedModel rounded(model.file(), all_matrices(TensorType::kQ8_0));
  const ModelWeights weights = model.weights(), rounded_weights = rounded.weights();
  std::vector<std::int32_t> tokens = read_golden_logits(kData / (name + "-logits.gguf")).ids;
  tokens.resize(48);
  const auto by_reference = [&](const ModelWeights& of) {
    reference::Backend<float> backend = reference_of(of);
    return testkit::logits_of(backend, tokens, {48});
  };
  const std::vector<float> expected = by_reference(weights);
  const std::int64_t vocab = weights.config.vocab;
  const double bound = kRoundings * testkit::row_error(by_reference(rounded_weights), expected, vocab).worst;
  const GgufFile original_file = GgufFile::open(kData / (name + ".gguf"));
  const std::vector<float> original = by_reference(weights_from_gguf(original_file));
  const cuda::PackedModel packed(weights, model_tensors(model.file()), {});
  cuda::Backend device(packed, {.cache = parse_cache_spec("bf16"), .context = 64, .max_chunk = 64, .n_logit_row = 64});
  for (const std::int64_t chunk : {48, 1}) {
    const std::vector<float> actual = testkit::logits_of(device, tokens, {chunk});
    EXPECT_TRUE(rows_close(actual, expected, vocab, bound)) << "chunks of " << chunk;
    EXPECT_FALSE(rows_close(actual, original, vocab, bound)) << "control, chunks of " << chunk;
  }
}

}  // namespace
