// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/text_model.hpp"

/// Reads a ModelConfig from GGUF metadata (`gemma4.*`) and refuses, by the feature's name, what is not implemented.
namespace gemma4 {

namespace detail {

inline void refuse_feature(const GgufFile& file, bool present, const char* feature, const std::string& evidence) {
  require_format(!present, file.path().string(), ": the model uses ", feature, " (", evidence,
                 "), which is not implemented");
}

/// Refuses a feature that shows as a count above 0.
inline void refuse_counted(const GgufFile& file, const char* name, const char* feature) {
  const std::string key = model_key(file, name);
  const auto count = file.get_or<std::int64_t>(key, 0);
  refuse_feature(file, count != 0, feature, concat(key, " = ", count));
}

/// Features of other members of the family, each recognised by its metadata or its tensors.
inline void refuse_unimplemented(const GgufFile& file) {
  refuse_counted(file, "embedding_length_per_layer_input", "per-layer embeddings");
  refuse_counted(file, "expert_count", "experts");
  for (const GgufTensor& tensor : file.tensors()) {
    const std::string_view name = tensor.name;
    if (!is_text_tensor(name)) continue;
    const auto evidence = [&] { return concat("tensor '", tensor.name, "'"); };
    refuse_feature(file, name.starts_with("per_layer_") || name.find(".per_layer_") != name.npos,
                   "per-layer embeddings", evidence());
    refuse_feature(file, name.find("_exps.") != name.npos || name.find(".ffn_gate_inp") != name.npos, "experts",
                   evidence());
    refuse_feature(file, name.ends_with(".scale") || name.ends_with(".input_scale"),
                   "scales beside its weights, as NVFP4 has them", evidence());
  }
}

/// A size from the metadata; more than 2^24 is no size of a model, and products of sizes stay far from overflow.
[[nodiscard]] inline std::int64_t read_size(const GgufFile& file, std::string_view key) {
  constexpr std::int64_t kMaxSize = std::int64_t{1} << 24;
  const auto size = file.get<std::int64_t>(key);
  require_format(size <= kMaxSize, file.path().string(), ": ", key, " is ", size, ", expected at most ", kMaxSize);
  return size;
}

/// The pattern as an array of bool, one a layer.
inline std::vector<std::uint8_t> read_pattern(const GgufFile& file, std::int64_t n_layer) {
  const std::string key = model_key(file, "attention.sliding_window_pattern");
  const std::vector<bool> flags = file.array<bool>(key);
  require_format(static_cast<std::int64_t>(flags.size()) == n_layer, file.path().string(), ": ", key, " has ",
                 flags.size(), " entries, expected ", model_key(file, "block_count"), " = ", n_layer);
  return {flags.begin(), flags.end()};
}

/// KV heads of the sliding or the full layers; head_count_kv is one number or an array with one a layer.
inline std::int64_t read_n_head_kv(const GgufFile& file, const std::vector<std::uint8_t>& is_sliding, bool sliding) {
  const std::string key = model_key(file, "attention.head_count_kv");
  if (!file.is_array(key)) return read_size(file, key);
  const std::vector<std::int64_t> counts = file.array<std::int64_t>(key);
  require_format(counts.size() == is_sliding.size(), file.path().string(), ": ", key, " has ", counts.size(),
                 " entries, expected ", model_key(file, "block_count"), " = ", is_sliding.size());
  std::int64_t found = 0;
  for (std::size_t layer = 0; layer < counts.size(); ++layer) {
    if ((is_sliding[layer] != 0) != sliding) continue;
    if (found == 0) found = counts[layer];
    require_format(counts[layer] == found, file.path().string(), ": ", key, " of layer ", layer, " is ", counts[layer],
                   ", expected ", found, " as in the other ", sliding ? "sliding" : "full", " layers");
  }
  return found;
}

/// Of a full layer's coordinates: a quarter is rotated, partial_rotary_factor = 0.25 in the published configurations.
inline constexpr std::int64_t kFullRotaryDivisor = 4;

/// Rotated pairs of the full layers: `rope_freqs.weight` divides each frequency, by 1 for a rotated pair and by a huge
/// number (1e30) for one that stays. There must be as many as the architecture's partial rotary factor says: another
/// number is the mark of a converter that took another model's.
inline std::int64_t read_rope_pairs(const GgufFile& file, std::int64_t head_dim) {
  const GgufTensor& tensor = file.tensor("rope_freqs.weight");
  const auto factors = data_as<float>(tensor);
  require_format(static_cast<std::int64_t>(factors.size()) == head_dim / 2, file.path().string(),
                 ": tensor 'rope_freqs.weight' has ", factors.size(),
                 " values, expected head_dim / 2 = ", head_dim / 2);
  std::int64_t n_pair = 0;
  while (n_pair < head_dim / 2 && factors[static_cast<std::size_t>(n_pair)] == 1.0f) ++n_pair;
  for (std::int64_t pair = n_pair; pair < head_dim / 2; ++pair) {
    const float factor = factors[static_cast<std::size_t>(pair)];
    require_format(factor >= 1e20f, file.path().string(), ": tensor 'rope_freqs.weight' has ", factor, " at ", pair,
                   ", expected 1 (rotated pairs first) or at least 1e20 (pairs that stay)");
  }
  const std::int64_t expected = head_dim / 2 / kFullRotaryDivisor;
  require_format(n_pair == expected, file.path().string(), ": tensor 'rope_freqs.weight' rotates ", n_pair, " of ",
                 head_dim / 2, " pairs, expected ", expected, ", a partial rotary factor of 1/", kFullRotaryDivisor);
  return n_pair;
}

inline AttentionConfig read_attention(const GgufFile& file, const std::vector<std::uint8_t>& is_sliding, bool sliding) {
  const auto key = [&](const char* name) { return model_key(file, name) + (sliding ? "_swa" : ""); };
  const std::string key_length = key("attention.key_length");
  const std::string value_length = key("attention.value_length");
  AttentionConfig attention;
  attention.head_dim = read_size(file, key_length);
  require_format(file.get<std::int64_t>(value_length) == attention.head_dim, file.path().string(), ": ", value_length,
                 " is ", file.get<std::int64_t>(value_length), ", expected ", key_length, " = ", attention.head_dim);
  const std::string rope_dims = key("rope.dimension_count");
  const auto n_rope = file.get_or<std::int64_t>(rope_dims, attention.head_dim);
  require_format(n_rope == attention.head_dim, file.path().string(), ": ", rope_dims, " is ", n_rope, ", expected ",
                 key_length, " = ", attention.head_dim);
  attention.n_head_kv = read_n_head_kv(file, is_sliding, sliding);
  attention.rope_theta = file.get<double>(key("rope.freq_base"));
  attention.rope_pairs = sliding ? attention.head_dim / 2 : read_rope_pairs(file, attention.head_dim);
  return attention;
}

}  // namespace detail

namespace detail {

/// What a decoder of the family says of its layers, whatever the architecture its keys are named after. The number of
/// tokens is that of the tokenizer, where the embedding has more rows. The softcap is its default.
[[nodiscard]] inline ModelConfig read_layers(const GgufFile& file) {
  const auto key = [&](const char* name) { return model_key(file, name); };
  ModelConfig config;
  const auto n_layer = file.get<std::int64_t>(key("block_count"));
  require_format(n_layer >= 1 && n_layer <= 4096, file.path().string(), ": ", key("block_count"), " is ", n_layer,
                 ", expected 1 to 4096");
  config.is_sliding = read_pattern(file, n_layer);
  config.hidden = read_size(file, key("embedding_length"));
  config.ffn_hidden = read_size(file, key("feed_forward_length"));
  config.n_head = read_size(file, key("attention.head_count"));
  const std::string window = key("attention.sliding_window");
  config.window = file.has(window) ? read_size(file, window) : 0;
  config.context = read_size(file, key("context_length"));
  config.rms_epsilon = file.get<float>(key("attention.layer_norm_rms_epsilon"));
  if (config.n_full_layer() < n_layer) config.sliding = read_attention(file, config.is_sliding, true);
  if (config.n_full_layer() > 0) config.full = read_attention(file, config.is_sliding, false);
  const GgufTensor& embedding = file.tensor("token_embd.weight");
  require_format(embedding.dims.size() == 2, file.path().string(), ": tensor 'token_embd.weight' has ",
                 embedding.dims.size(), " dimensions, expected 2");
  config.vocab = n_token_row(file, embedding.dims[1]);
  return config;
}

/// Refuses, as the file's mistake, what no backend can run.
inline void require_runnable(const GgufFile& file, const ModelConfig& config) {
  try {
    require_config(config);
  } catch (const std::invalid_argument& error) {
    throw FormatError(concat(file.path().string(), ": ", error.what()));
  }
}

}  // namespace detail

/// `vocab` is the number of tokens: that of the tokenizer, where the embedding has more rows.
/// @throws FormatError naming the kind of a file that is no text model, or the key or tensor, what was found and what
///         was expected
[[nodiscard]] inline ModelConfig config_from_gguf(const GgufFile& file) {
  require_text_model(file);
  detail::refuse_counted(file, "attention.shared_kv_layers", "shared KV layers");
  detail::refuse_unimplemented(file);
  ModelConfig config = detail::read_layers(file);
  config.softcap = file.get<float>("gemma4.final_logit_softcapping");
  detail::require_runnable(file, config);
  return config;
}

}  // namespace gemma4
