// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <functional>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/gguf_writer.hpp"
#include "gemma4/model_tensors.hpp"
#include "gemma4/synthetic_vocabulary.hpp"
#include "gemma4/synthetic_weights.hpp"

/// A model of any shape with random weights, as a GGUF file that this project and llama.cpp load.
///
/// How the weights are scaled so that activations, attention and logits stay sane through any number of layers:
/// - Matrices ~ N(0, 1 / columns): a row of a normalised input gives numbers from N(0, 1).
/// - Norm weights are 1 + 0.1 z (z normal) times a gain. Gain 1 before a matrix.
/// - post_attention_norm and post_ffw_norm have gain p = 1 / sqrt(n_layer) and the layer ends with the scale
///   c = 1 / sqrt(1 + 2 p^2): from RMS 1 the residual stream comes to c sqrt(1 + p^2 + p^2) = 1, layer after layer, and
///   each layer has the same share in it; of the embedding c^n_layer = (1 + 2 / n_layer)^(-n_layer / 2) stays, about
///   1 / e, so that the output still depends on the tokens.
/// - Attention scores have no factor 1 / sqrt(head_dim): q and k norm weights have gain g = sqrt(s / sqrt(head_dim)),
///   which makes scores of unrelated q and k ~ N(0, s^2). Over n keys the entropy of the softmax is ln n - s^2 / 2.
/// - The embedding is tied and ~ N(0, 1 / hidden): times sqrt(hidden) it gives a stream of RMS 1; as output matrix it
///   gives logits ~ N(0, t^2) when output_norm has gain t. The signs of output_norm are random: with equal signs the
///   embedding that is still in the stream would make the last input token the likeliest output, always.
namespace gemma4 {

struct SyntheticOptions {
  std::uint64_t seed = 0;
  std::optional<TensorType> only = std::nullopt;  ///< every matrix in this type; absent: the Q4_K_M mix
  double score_deviation = 2.5;                   ///< s above: at 1024 keys 3.8 nats of entropy, at 131072 keys 8.7
  double logit_deviation = 3.0;                   ///< t above
};

namespace detail {

/// What a tensor of a synthetic model holds.
class SyntheticModel {
 public:
  SyntheticModel(const ModelConfig& config, const SyntheticOptions& options)
      : config_(config), options_(options), rows_(options.seed) {}

  void fill_row(const ModelTensor& tensor, std::int64_t row, std::span<std::byte> out) const {
    if (tensor.dims.size() > 1) {
      rows_.fill(tensor.name, row, tensor.type, tensor.row_len(), 1 / std::sqrt(static_cast<double>(tensor.row_len())),
                 out);
      return;
    }
    std::vector<float> values(static_cast<std::size_t>(tensor.row_len()));
    fill_vector(tensor, values);
    std::memcpy(out.data(), values.data(), out.size());
  }

 private:
  [[nodiscard]] double branch_gain() const { return 1 / std::sqrt(static_cast<double>(config_.n_layer())); }

  [[nodiscard]] double norm_gain(const ModelTensor& tensor) const {
    const std::string_view name = tensor.name;
    if (name.ends_with(".post_attention_norm.weight") || name.ends_with(".post_ffw_norm.weight")) return branch_gain();
    if (name.ends_with(".attn_q_norm.weight") || name.ends_with(".attn_k_norm.weight")) {
      return std::sqrt(options_.score_deviation / std::sqrt(static_cast<double>(tensor.row_len())));
    }
    return name == "output_norm.weight" ? options_.logit_deviation : 1.0;
  }

  void fill_vector(const ModelTensor& tensor, std::vector<float>& values) const {
    if (tensor.name == "rope_freqs.weight") {  // divides a frequency: 1 rotates, 1e30 does not
      for (std::size_t i = 0; i < values.size(); ++i) {
        values[i] = static_cast<std::int64_t>(i) < config_.full.rope_pairs ? 1.0f : 1e30f;
      }
    } else if (tensor.name.ends_with(".layer_output_scale.weight")) {
      values[0] = static_cast<float>(1 / std::sqrt(1 + 2 * branch_gain() * branch_gain()));
    } else {
      RowRandom random(options_.seed, tensor.name, 0);
      const double gain = norm_gain(tensor);
      for (float& value : values) {
        const bool is_negative = tensor.name == "output_norm.weight" && (random.next() & 1) != 0;
        value = static_cast<float>((is_negative ? -gain : gain) * (1 + 0.1 * random.normal()));
      }
    }
  }

  const ModelConfig& config_;
  SyntheticOptions options_;
  SyntheticRows rows_;
};

/// Number of general.file_type that llama.cpp prints for the mix.
[[nodiscard]] inline std::uint32_t file_type_number(std::optional<TensorType> only) {
  constexpr std::uint32_t kQ4KM = 15;
  if (!only) return kQ4KM;
  switch (*only) {
    case TensorType::kF32:
      return 0;
    case TensorType::kF16:
      return 1;
    case TensorType::kQ8_0:
      return 7;
    case TensorType::kQ4K:
      return 14;
    case TensorType::kQ6K:
      return 18;
    case TensorType::kBf16:
      return 32;
    default:
      require(false, "synthetic model: weights of type ", type_name(*only),
              "; expected Q4_K, Q6_K, Q8_0, BF16, F16 or F32");
      return 0;
  }
}

inline void set_model_keys(GgufWriter& writer, const ModelConfig& config, std::uint32_t file_type) {
  const auto set_count = [&](const std::string& key, std::int64_t value) {
    require(value >= 0 && value <= UINT32_MAX, "key '", key, "': ", value, " does not fit in 32 bits");
    writer.set(key, static_cast<std::uint32_t>(value));
  };
  std::vector<std::int32_t> n_head_kv;
  std::vector<bool> pattern;
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    n_head_kv.push_back(static_cast<std::int32_t>(config.attention(layer).n_head_kv));
    pattern.push_back(config.sliding_layer(layer));
  }
  writer.set("general.architecture", "gemma4");
  writer.set("general.name", "gemma4-synthetic");
  set_count("gemma4.context_length", config.context);
  set_count("gemma4.embedding_length", config.hidden);
  set_count("gemma4.block_count", config.n_layer());
  set_count("gemma4.feed_forward_length", config.ffn_hidden);
  set_count("gemma4.attention.head_count", config.n_head);
  writer.set_array("gemma4.attention.head_count_kv", n_head_kv);
  writer.set("gemma4.attention.layer_norm_rms_epsilon", config.rms_epsilon);
  writer.set("gemma4.rope.freq_base", static_cast<float>(config.full.rope_theta));
  writer.set("gemma4.rope.freq_base_swa", static_cast<float>(config.sliding.rope_theta));
  set_count("gemma4.attention.sliding_window", config.window);
  set_count("gemma4.attention.shared_kv_layers", 0);
  set_count("gemma4.embedding_length_per_layer_input", 0);
  writer.set_array("gemma4.attention.sliding_window_pattern", pattern);
  set_count("gemma4.attention.key_length", config.full.head_dim);
  set_count("gemma4.attention.value_length", config.full.head_dim);
  set_count("gemma4.attention.key_length_swa", config.sliding.head_dim);
  set_count("gemma4.attention.value_length_swa", config.sliding.head_dim);
  set_count("gemma4.rope.dimension_count", config.full.head_dim);
  set_count("gemma4.rope.dimension_count_swa", config.sliding.head_dim);
  writer.set("gemma4.final_logit_softcapping", config.softcap);
  set_count("gemma4.vocab_size", config.vocab);
  set_count("general.quantization_version", 2);
  writer.set("general.file_type", file_type);
}

inline void set_vocabulary_keys(GgufWriter& writer, std::int64_t vocab) {
  using V = SyntheticVocabulary;
  const V vocabulary = make_synthetic_vocabulary(vocab);
  writer.set("tokenizer.ggml.model", "gemma4");
  writer.set_array("tokenizer.ggml.tokens", vocabulary.tokens);
  writer.set_array("tokenizer.ggml.scores", vocabulary.scores);
  writer.set_array("tokenizer.ggml.token_type", vocabulary.types);
  writer.set_array("tokenizer.ggml.merges", vocabulary.merges);
  writer.set("tokenizer.ggml.bos_token_id", static_cast<std::uint32_t>(V::kBos));
  writer.set("tokenizer.ggml.eos_token_id", static_cast<std::uint32_t>(V::kEos));
  writer.set("tokenizer.ggml.padding_token_id", static_cast<std::uint32_t>(V::kPad));
  writer.set("tokenizer.ggml.unknown_token_id", static_cast<std::uint32_t>(V::kUnk));
  writer.set("tokenizer.ggml.add_bos_token", true);
  writer.set("tokenizer.ggml.add_space_prefix", false);
}

/// Runs body(i) for i in [0, count) on all threads, in no particular order; where the compiler has no OpenMP, on one.
/// The first exception ends the loop and is thrown on.
template <class TBody>
void for_each_in_parallel(std::int64_t count, TBody&& body) {
  std::exception_ptr error;
  std::mutex error_mutex;
  std::atomic<bool> failed = false;
  const auto guarded = [&](std::int64_t i) {
    if (failed) return;
    try {
      body(i);
    } catch (...) {
      const std::scoped_lock lock(error_mutex);
      if (!error) error = std::current_exception();
      failed = true;
    }
  };
#if defined(_OPENMP)
#pragma omp parallel for schedule(dynamic)
#endif
  for (std::int64_t i = 0; i < count; ++i) guarded(i);
  if (error) std::rethrow_exception(error);
}

/// Rows of a tensor that one thread makes at a time.
struct SyntheticPiece {
  std::size_t tensor = 0;
  std::int64_t first_row = 0;
  std::int64_t n_row = 0;
};

/// Pieces of about `piece_bytes`, at least one row each.
[[nodiscard]] inline std::vector<SyntheticPiece> synthetic_pieces(const std::vector<ModelTensor>& tensors,
                                                                  std::int64_t piece_bytes) {
  std::vector<SyntheticPiece> pieces;
  for (std::size_t t = 0; t < tensors.size(); ++t) {
    const std::int64_t rows = tensors[t].rows();
    const std::int64_t step = std::max<std::int64_t>(1, piece_bytes / row_bytes(tensors[t].type, tensors[t].row_len()));
    for (std::int64_t first = 0; first < rows; first += step) {
      pieces.push_back({.tensor = t, .first_row = first, .n_row = std::min(step, rows - first)});
    }
  }
  return pieces;
}

}  // namespace detail

/// Writes the model to `path`: all of it or nothing. The file depends on config and options alone, not on the number of
/// threads, which make and write pieces of 1 MiB (at least one row) side by side: a thread's piece is all that it
/// holds, and the rate grows with the cores as long as the file system takes it.
/// @param on_progress called with the bytes of tensor data written so far, of total_bytes(model_tensors(config, only));
///        by one thread at a time
/// @throws std::invalid_argument for a config that no backend can run, rows that do not divide into blocks, a
///         vocabulary too small for its control tokens, or too little free space
inline void write_synthetic_model(const std::filesystem::path& path, const ModelConfig& config,
                                  const SyntheticOptions& options = {},
                                  const std::function<void(std::int64_t)>& on_progress = {}) {
  constexpr std::int64_t kPieceBytes = std::int64_t{1} << 20;
  const std::vector<ModelTensor> tensors = model_tensors(config, options.only);
  const std::uint32_t file_type = detail::file_type_number(options.only);
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  const std::filesystem::space_info space = std::filesystem::space(folder);
  require(static_cast<std::uintmax_t>(total_bytes(tensors)) <= space.available, "synthetic model: ", path.string(),
          " needs ", total_bytes(tensors), " bytes, free are ", space.available);

  GgufWriter writer(path);
  detail::set_model_keys(writer, config, file_type);
  detail::set_vocabulary_keys(writer, config.vocab);
  for (const ModelTensor& tensor : tensors) writer.add_tensor(tensor.name, tensor.type, tensor.dims);
  writer.place();

  const detail::SyntheticModel model(config, options);
  const std::vector<detail::SyntheticPiece> pieces = detail::synthetic_pieces(tensors, kPieceBytes);
  std::mutex progress_mutex;
  std::int64_t n_written = 0;
  detail::for_each_in_parallel(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t i) {
    const detail::SyntheticPiece& piece = pieces[static_cast<std::size_t>(i)];
    const ModelTensor& tensor = tensors[piece.tensor];
    const std::int64_t bytes_a_row = row_bytes(tensor.type, tensor.row_len());
    thread_local std::vector<std::byte> bytes;
    bytes.resize(static_cast<std::size_t>(piece.n_row * bytes_a_row));
    for (std::int64_t row = 0; row < piece.n_row; ++row) {
      model.fill_row(
          tensor, piece.first_row + row,
          std::span(bytes).subspan(static_cast<std::size_t>(row * bytes_a_row), static_cast<std::size_t>(bytes_a_row)));
    }
    writer.write_at(piece.tensor, static_cast<std::uint64_t>(piece.first_row * bytes_a_row), bytes);
    const std::scoped_lock lock(progress_mutex);
    n_written += static_cast<std::int64_t>(bytes.size());
    if (on_progress) on_progress(n_written);
  });
  writer.finish();
}

}  // namespace gemma4
