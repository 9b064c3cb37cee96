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
#include "gemma4/gguf/gguf_split_writer.hpp"
#include "gemma4/gguf/gguf_writer.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/synthetic/synthetic_vocabulary.hpp"
#include "gemma4/synthetic/synthetic_weights.hpp"

/// A model of any shape with random weights, as a GGUF file that this project and llama.cpp load.
///
/// How the weights are scaled so that activations, attention and logits stay sane through any number of layers, and so
/// that the error of a compressed cache travels through them about as it does through a trained model:
/// - Matrices ~ N(0, 1 / columns): a row of a normalised input gives numbers from N(0, 1).
/// - Norm weights are 1 + 0.1 z (z normal) times a gain. Gain 1 before a matrix.
/// - post_attention_norm and post_ffw_norm have gains p_a and p_m, and the layer ends with the scale
///   c = 1 / sqrt(1 + p_a^2 + p_m^2): from RMS 1 the residual stream comes back to RMS 1, layer after layer. The gains
///   follow from S_a and S_m, the squared RMS of a branch over that of the stream which it joins, summed over the
///   layers: p_a^2 = S_a / n_layer, p_m^2 = (1 + p_a^2) S_m / n_layer. The sums are what carries over from a model of
///   few layers to one of many: of the embedding exp(-(S_a + S_m) / 2) stays, and noise that enters by a branch has the
///   same weight in the end, in however many steps the mixing is done.
/// - Attention scores have no factor 1 / sqrt(head_dim): q and k norm weights have gain g = sqrt(s / sqrt(head_dim)),
///   which makes scores of unrelated q and k ~ N(0, s^2). Over n keys the entropy of the softmax is ln n - s^2 / 2. A
///   code that is off by a share e of a key's length moves scores by e s.
/// - The embedding is tied and ~ N(0, 1 / hidden): times sqrt(hidden) it gives a stream of RMS 1; as output matrix it
///   gives logits ~ N(0, t^2) when output_norm has gain t. The signs of output_norm are random: with equal signs the
///   embedding that is still in the stream would make the last input token the likeliest output, always.
/// - The embeddings have a vector in common, a share m of their RMS, and hence so has the stream everywhere (attention
///   averages over keys and adds to it). Without it the values that a query attends to are unrelated, their mean over
///   N keys has only 1 / sqrt(N) of their length, and the noise of N codes, which averages no better, stays as large
///   beside it as it was in one code; worse, the same happens in every layer above to a difference in its input. In a
///   trained model values agree, and the mean keeps most of its length.
///
/// The defaults of s, S_a, S_m and m are what the trained nano model shows at position 1024 of random ids, which is
/// what synthetic models are run on (`statistics --model tests/data/nano/nano-Q4_K_M.gguf --depths 1024`):
/// - s = |q| |k| / sqrt(head_dim) = 2.4, on the full layers. S_a = 0.77, S_m = 0.58.
/// - The stream's common share rises from 0.25 at the embedding to 0.6 after four of twelve layers, 0.56 in the mean.
///   Random branches build it up more slowly; m = 0.4 is the start from which they come to that mean, in 60 layers.
/// What follows without being asked for, in a narrow model of 60 layers (results/accuracy/random-60-layers.json); in
/// brackets nano, and after it what m = 0, S_a = S_m = 1 and s = 2.5 give:
/// - RMS of the attention's output, mean over the layers: 0.61 (0.61; 0.40).
/// - Error of a full layer's output by its own TQ4 codes, by layer: 5 to 9 % (5 to 9 %; 11 to 19 %).
/// - Relative error behind a sliding layer's attention over that of its input: 0.9 to 1.7 (0.9 to 1.3; 1.5 to 2.7).
/// One figure is not nano's: the deviation of a query's scores over its keys is 2.2, in nano 2.7 with the same norms of
/// q and k, since trained queries and keys are related. Random ones that are given that deviation have longer q and k
/// for it, and a full layer's error by its own codes becomes 1.5 times nano's.
namespace gemma4 {

struct SyntheticOptions {
  std::uint64_t seed = 0;
  WeightMix mix = WeightMix::kQ4KM;               ///< the types of the matrices
  std::optional<TensorType> only = std::nullopt;  ///< every matrix in this type, whatever the mix
  double score_deviation = 2.4;                   ///< s above: at 1024 keys 4.1 nats of entropy, at 131072 keys 8.9
  double attention_share = 0.77;                  ///< S_a above
  double mlp_share = 0.58;                        ///< S_m above
  double common_share = 0.40;                     ///< m above
  double logit_deviation = 3.0;                   ///< t above
  std::int64_t split_max_bytes = 0;  ///< of tensors in a part of a split file; 0: one file that is not split
};

namespace detail {

/// What a tensor of a synthetic model holds.
class SyntheticModel {
 public:
  SyntheticModel(const ModelConfig& config, const SyntheticOptions& options)
      : config_(config),
        options_(options),
        rows_(options.seed),
        embeddings_(options.seed, options.common_share),
        attention_gain_(std::sqrt(options.attention_share / static_cast<double>(config.n_layer()))),
        mlp_gain_(std::sqrt(options.mlp_share / static_cast<double>(config.n_layer())) *
                  std::hypot(1.0, attention_gain_)) {}

  void fill_row(const ModelTensor& tensor, std::int64_t row, std::span<std::byte> out) const {
    if (tensor.dims.size() > 1) {
      const SyntheticRows& rows = tensor.name == "token_embd.weight" ? embeddings_ : rows_;
      rows.fill(tensor.name, row, tensor.type, tensor.row_len(), 1 / std::sqrt(static_cast<double>(tensor.row_len())),
                out);
      return;
    }
    std::vector<float> values(static_cast<std::size_t>(tensor.row_len()));
    fill_vector(tensor, values);
    std::memcpy(out.data(), values.data(), out.size());
  }

 private:
  [[nodiscard]] double norm_gain(const ModelTensor& tensor) const {
    const std::string_view name = tensor.name;
    if (name.ends_with(".post_attention_norm.weight")) return attention_gain_;
    if (name.ends_with(".post_ffw_norm.weight")) return mlp_gain_;
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
      values[0] = static_cast<float>(1 / std::hypot(1.0, attention_gain_, mlp_gain_));
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
  SyntheticRows embeddings_;
  double attention_gain_;
  double mlp_gain_;
};

/// Number of general.file_type that llama.cpp prints for the mix.
[[nodiscard]] inline std::uint32_t file_type_number(std::optional<TensorType> only, WeightMix mix) {
  if (!only) return std::ranges::find(kWeightMixes, mix, &WeightMixInfo::mix)->file_type;
  switch (*only) {
    case TensorType::kF32:
      return 0;
    case TensorType::kF16:
      return 1;
    case TensorType::kQ4_0:
      return 2;
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
              "; expected Q4_0, Q4_K, Q6_K, Q8_0, BF16, F16 or F32");
      return 0;
  }
}

/// What a decoder of the family says of its layers, its keys named after the architecture.
inline void set_layer_keys(GgufWriter& writer, const std::string& architecture, const ModelConfig& config,
                           std::int64_t shared_kv_layers) {
  const auto key = [&](const char* name) { return architecture + "." + name; };
  const auto set_count = [&](const char* name, std::int64_t value) {
    require(value >= 0 && value <= UINT32_MAX, "key '", key(name), "': ", value, " does not fit in 32 bits");
    writer.set(key(name), static_cast<std::uint32_t>(value));
  };
  std::vector<std::int32_t> n_head_kv;
  std::vector<bool> pattern;
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    n_head_kv.push_back(static_cast<std::int32_t>(config.attention(layer).n_head_kv));
    pattern.push_back(config.sliding_layer(layer));
  }
  writer.set("general.architecture", architecture);
  writer.set("general.name", architecture + "-synthetic");
  set_count("context_length", config.context);
  set_count("embedding_length", config.hidden);
  set_count("block_count", config.n_layer());
  set_count("feed_forward_length", config.ffn_hidden);
  set_count("attention.head_count", config.n_head);
  writer.set_array(key("attention.head_count_kv"), n_head_kv);
  writer.set(key("attention.layer_norm_rms_epsilon"), config.rms_epsilon);
  writer.set(key("rope.freq_base"), static_cast<float>(config.full.rope_theta));
  writer.set(key("rope.freq_base_swa"), static_cast<float>(config.sliding.rope_theta));
  set_count("attention.sliding_window", config.window);
  set_count("attention.shared_kv_layers", shared_kv_layers);
  set_count("embedding_length_per_layer_input", 0);
  writer.set_array(key("attention.sliding_window_pattern"), pattern);
  set_count("attention.key_length", config.full.head_dim);
  set_count("attention.value_length", config.full.head_dim);
  set_count("attention.key_length_swa", config.sliding.head_dim);
  set_count("attention.value_length_swa", config.sliding.head_dim);
  set_count("rope.dimension_count", config.full.head_dim);
  set_count("rope.dimension_count_swa", config.sliding.head_dim);
}

inline void set_model_keys(GgufWriter& writer, const ModelConfig& config, std::uint32_t file_type) {
  set_layer_keys(writer, "gemma4", config, 0);
  writer.set("gemma4.final_logit_softcapping", config.softcap);
  writer.set("gemma4.vocab_size", static_cast<std::uint32_t>(config.vocab));
  writer.set("general.quantization_version", std::uint32_t{2});
  writer.set("general.file_type", file_type);
}

}  // namespace detail

/// The `tokenizer.ggml.*` keys of make_synthetic_vocabulary(vocab).
/// @throws std::invalid_argument as that does
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

namespace detail {

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

namespace detail {

/// Writes a file, or the parts of one, with rows that `fill_row(tensor, row, bytes)` makes, on all threads.
/// @param set_keys of its first part
template <class TFillRow>
std::vector<std::filesystem::path> write_synthetic_tensors(const std::filesystem::path& path,
                                                           const std::vector<ModelTensor>& tensors,
                                                           std::int64_t split_max_bytes,
                                                           const std::function<void(GgufWriter&)>& set_keys,
                                                           TFillRow&& fill_row,
                                                           const std::function<void(std::int64_t)>& on_progress) {
  constexpr std::int64_t kPieceBytes = std::int64_t{1} << 20;
  const std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
  const std::filesystem::space_info space = std::filesystem::space(folder);
  require(static_cast<std::uintmax_t>(total_bytes(tensors)) <= space.available, "synthetic model: ", path.string(),
          " needs ", total_bytes(tensors), " bytes, free are ", space.available);
  GgufSplitWriter files(path, tensors, split_max_bytes, set_keys);

  const std::vector<SyntheticPiece> pieces = synthetic_pieces(tensors, kPieceBytes);
  std::mutex progress_mutex;
  std::int64_t n_written = 0;
  for_each_in_parallel(static_cast<std::int64_t>(pieces.size()), [&](std::int64_t i) {
    const SyntheticPiece& piece = pieces[static_cast<std::size_t>(i)];
    const ModelTensor& tensor = tensors[piece.tensor];
    const std::int64_t bytes_a_row = row_bytes(tensor.type, tensor.row_len());
    thread_local std::vector<std::byte> bytes;
    bytes.resize(static_cast<std::size_t>(piece.n_row * bytes_a_row));
    for (std::int64_t row = 0; row < piece.n_row; ++row) {
      fill_row(
          tensor, piece.first_row + row,
          std::span(bytes).subspan(static_cast<std::size_t>(row * bytes_a_row), static_cast<std::size_t>(bytes_a_row)));
    }
    files.write_at(piece.tensor, static_cast<std::uint64_t>(piece.first_row * bytes_a_row), bytes);
    const std::scoped_lock lock(progress_mutex);
    n_written += static_cast<std::int64_t>(bytes.size());
    if (on_progress) on_progress(n_written);
  });
  files.finish();
  return files.paths();
}

}  // namespace detail

/// Writes the model to `path`: all of it or nothing. With split_max_bytes to parts beside it that are named after it.
/// The files depend on config and options alone, not on the number of threads, which make and write pieces of 1 MiB (at
/// least one row) side by side: a thread's piece is all that it holds, and the rate grows with the cores as long as the
/// file system takes it.
/// @param on_progress called by one thread at a time with the bytes of tensor data written so far; the last are
///        total_bytes(model_tensors(config, only, mix))
/// @return the files, in order
/// @throws std::invalid_argument for a config that no backend can run, rows that do not divide into blocks, a
///         vocabulary too small for its control tokens, or too little free space
inline std::vector<std::filesystem::path> write_synthetic_model(
    const std::filesystem::path& path, const ModelConfig& config, const SyntheticOptions& options = {},
    const std::function<void(std::int64_t)>& on_progress = {}) {
  const std::vector<ModelTensor> tensors = model_tensors(config, options.only, options.mix);
  const std::uint32_t file_type = detail::file_type_number(options.only, options.mix);
  const detail::SyntheticModel model(config, options);
  const auto set_keys = [&](GgufWriter& writer) {
    detail::set_model_keys(writer, config, file_type);
    set_vocabulary_keys(writer, config.vocab);
  };
  const auto fill_row = [&](const ModelTensor& tensor, std::int64_t row, std::span<std::byte> out) {
    model.fill_row(tensor, row, out);
  };
  return detail::write_synthetic_tensors(path, tensors, options.split_max_bytes, set_keys, fill_row, on_progress);
}

}  // namespace gemma4
