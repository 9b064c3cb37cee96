// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "gemma4/assistant_config.hpp"
#include "gemma4/config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/gguf/config_from_gguf.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/text_model.hpp"

/// Reads the shape of a drafter (`gemma4-assistant.*`) from GGUF metadata, and holds it against that of its target.
namespace gemma4 {

namespace detail {

/// Of `name` there must be as many as the drafter has layers: all are drafting layers, and none has a cache.
inline void require_count_of_layers(const GgufFile& file, const char* name, std::int64_t n_layer) {
  const std::string key = model_key(file, name);
  const auto count = file.get<std::int64_t>(key);
  require_format(count == n_layer, file.path().string(), ": ", key, " is ", count, ", expected ",
                 model_key(file, "block_count"), " = ", n_layer);
}

inline void refuse_other_drafters(const GgufFile& file) {
  for (const GgufTensor& tensor : file.tensors()) {
    refuse_feature(file, tensor.name.starts_with("masked_embd_"),
                   "masked embeddings, as the drafters of E2B and E4B do", concat("tensor '", tensor.name, "'"));
    require_format(is_text_tensor(tensor.name), file.path().string(), ": tensor '", tensor.name,
                   "' is not part of a drafter");
  }
  const std::string key = model_key(file, "final_logit_softcapping");
  const auto softcap = file.get_or<double>(key, 0.0);
  refuse_feature(file, softcap != 0.0, "a softcap of the drafter's logits", concat(key, " = ", softcap));
}

}  // namespace detail

/// @throws FormatError naming the kind of a file that is no drafter, a feature that is not implemented, or the key or
///         tensor, what was found and what was expected
[[nodiscard]] inline AssistantConfig assistant_config_from_gguf(const GgufFile& file) {
  require_assistant(file);
  detail::refuse_unimplemented(file);
  detail::refuse_other_drafters(file);
  AssistantConfig config{.own = detail::read_layers(file)};
  detail::require_count_of_layers(file, "nextn_predict_layers", config.own.n_layer());
  detail::require_count_of_layers(file, "attention.shared_kv_layers", config.own.n_layer());
  config.hidden_target = detail::read_size(file, model_key(file, "embedding_length_out"));
  require_format(config.hidden_target >= 1, file.path().string(), ": ", model_key(file, "embedding_length_out"), " is ",
                 config.hidden_target, ", expected at least 1");
  detail::require_runnable(file, config.own);
  return config;
}

/// Refuses a drafter that was made for another target: what it reads must be what the target's layers wrote.
/// @param name of the drafter, for the message
/// @throws FormatError naming what differs, with both values
inline void require_assistant_fits(const std::string& name, const AssistantConfig& drafter, const ModelConfig& target) {
  const auto same = [&](const std::string& what, auto found, auto wanted) {
    require_format(found == wanted, name, ": the drafter's ", what, " is ", found, ", the target's is ", wanted,
                   "; it was made for another model");
  };
  same("embedding_length_out", drafter.hidden_target, target.hidden);
  same("number of tokens", drafter.own.vocab, target.vocab);
  for (const bool sliding : {true, false}) {
    const ModelConfig& own = drafter.own;
    const std::int64_t n_own = sliding ? own.n_layer() - own.n_full_layer() : own.n_full_layer();
    const std::int64_t n_target = sliding ? target.n_layer() - target.n_full_layer() : target.n_full_layer();
    if (n_own == 0) continue;
    const std::string kind = sliding ? "sliding " : "full ";
    require_format(n_target > 0, name, ": the drafter has ", n_own, " ", kind, "layers, the target has none");
    const AttentionConfig& mine = sliding ? own.sliding : own.full;
    const AttentionConfig& theirs = sliding ? target.sliding : target.full;
    same(kind + "head size", mine.head_dim, theirs.head_dim);
    same(kind + "number of KV heads", mine.n_head_kv, theirs.n_head_kv);
    same(kind + "RoPE base", mine.rope_theta, theirs.rope_theta);
    same(kind + "number of rotated pairs", mine.rope_pairs, theirs.rope_pairs);
    if (!sliding) continue;
    same("window", own.window, target.window);
    require_format(own.window >= 2, name, ": the drafter's window is ", own.window,
                   ", expected at least 2: it sees one key less than that");
  }
}

}  // namespace gemma4
