// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf_reader.hpp"

/// What part of a file is the text model, and whether there is one: files that people have hold more, less or something
/// else.
namespace gemma4 {

inline constexpr std::string_view kArchitecture = "gemma4";
/// Of a drafter: a few layers that read a text model's caches (gemma4/gguf/assistant_from_gguf.hpp).
inline constexpr std::string_view kAssistantArchitecture = "gemma4-assistant";

namespace detail {

/// What a file is, where it is no model: by general.type, by its architecture, or by the keys that only it has.
/// Empty for a model of any architecture.
[[nodiscard]] inline std::string kind_of_file(const GgufFile& file) {
  const auto type = file.get_or<std::string>("general.type", "");
  const auto architecture = file.get_or<std::string>("general.architecture", "");
  if (type == "mmproj" || architecture == "clip") return "clip";
  if (type == "adapter" || file.has("adapter.type")) return "adapter";
  if (type == "imatrix" || architecture == "imatrix" || file.has("imatrix.datasets")) return "imatrix";
  if (architecture == "controlvector") return "control vector";
  return type == "model" ? "" : printable(type);
}

/// @param wanted what a file of that architecture is called
inline void require_architecture(const GgufFile& file, std::string_view expected, const char* wanted) {
  const std::string name = file.path().string();
  const std::string kind = kind_of_file(file);
  const bool is_an = !kind.empty() && std::string_view("aeiou").find(kind.front()) != std::string_view::npos;
  require_format(kind.empty(), name, ": this is ", is_an ? "an " : "a ", kind, " file, not a ", wanted);
  const auto architecture = file.get<std::string>("general.architecture");
  if (architecture == expected) return;
  require_format(architecture != kArchitecture, name, ": this is a text model, not a ", wanted);
  require_format(architecture != kAssistantArchitecture, name, ": this is a drafter (", kAssistantArchitecture,
                 "), not a ", wanted);
  require_format(false, name, ": general.architecture is '", printable(architecture), "', expected '", expected, "'");
}

}  // namespace detail

/// Refuses what is no text model of this architecture, by its kind, before anything else of it is looked at.
/// @throws FormatError such as "FILE: this is a clip file, not a text model"
inline void require_text_model(const GgufFile& file) {
  detail::require_architecture(file, kArchitecture, "text model");
}

/// The same for a drafter. @throws FormatError such as "FILE: this is a text model, not a drafter"
inline void require_assistant(const GgufFile& file) {
  detail::require_architecture(file, kAssistantArchitecture, "drafter");
}

/// A key of the model's own, named after its architecture: "gemma4.block_count".
[[nodiscard]] inline std::string model_key(const GgufFile& file, std::string_view name) {
  return concat(file.get<std::string>("general.architecture"), ".", name);
}

/// Whether a tensor belongs to the text model; those of the vision and audio encoders and their projectors do not.
[[nodiscard]] constexpr bool is_text_tensor(std::string_view name) {
  return !name.starts_with("v.") && !name.starts_with("mm.") && !name.starts_with("a.");
}

/// Refuses a file with a part of its tensors: of those that every model of the family has, the first that is missing.
/// For whoever needs no weights; weights_from_gguf() looks at all of them. A file without tensors is a vocabulary.
inline void require_no_part(const GgufFile& file) {
  if (file.tensors().empty()) return;
  static_cast<void>(file.tensor("token_embd.weight"));
  static_cast<void>(file.tensor("output_norm.weight"));
  const auto n_layer = file.get_or<std::int64_t>("gemma4.block_count", 0);
  for (std::int64_t layer = 0; layer < n_layer; ++layer) {
    for (const char* name : {"attn_norm", "attn_q", "attn_q_norm", "attn_output", "post_attention_norm", "ffn_norm",
                             "ffn_gate", "ffn_up", "ffn_down", "post_ffw_norm"}) {
      static_cast<void>(file.tensor(concat("blk.", layer, ".", name, ".weight")));
    }
  }
}

/// Tokens of the file's tokenizer; nothing where the file has none.
[[nodiscard]] inline std::optional<std::int64_t> n_tokenizer_token(const GgufFile& file) {
  constexpr std::string_view kKey = "tokenizer.ggml.tokens";
  if (!file.has(kKey) || !file.is_array(kKey)) return std::nullopt;
  return static_cast<std::int64_t>(file.value(kKey).count);
}

/// Rows of an embedding or output matrix that stand for tokens: those of the tokenizer, of `rows` in the file. The
/// others pad the matrix; they are never looked up and have no logits, so that they are never sampled either.
/// @throws FormatError when the tokenizer has more tokens than the matrix rows
[[nodiscard]] inline std::int64_t n_token_row(const GgufFile& file, std::int64_t rows) {
  const std::int64_t n_token = n_tokenizer_token(file).value_or(rows);
  require_format(n_token <= rows, file.path().string(), ": tokenizer.ggml.tokens has ", n_token,
                 " tokens, tensor 'token_embd.weight' ", rows, " rows, expected at least as many");
  return n_token;
}

/// What was done with a file that is not as expected, a line each for stderr: tensors that are not the text model's and
/// were left out, a tokenizer shorter than the embedding.
[[nodiscard]] inline std::vector<std::string> model_notes(const GgufFile& file) {
  std::vector<std::string> notes;
  const std::string name = file.path().string();
  constexpr std::array<std::string_view, 3> kPrefixes = {"v.", "mm.", "a."};
  std::int64_t total = 0;
  std::string counts;
  for (const std::string_view prefix : kPrefixes) {
    std::int64_t count = 0;
    for (const GgufTensor& tensor : file.tensors()) count += tensor.name.starts_with(prefix);
    if (count > 0) counts += concat(counts.empty() ? "" : ", ", count, " of ", prefix, "*");
    total += count;
  }
  if (total > 0)
    notes.push_back(concat(name, ": left out ", total, " tensors that are not the text model's: ", counts));
  const GgufTensor* const embedding = file.find_tensor("token_embd.weight");
  const std::optional<std::int64_t> n_token = n_tokenizer_token(file);
  if (embedding != nullptr && embedding->dims.size() == 2 && n_token && *n_token < embedding->dims[1]) {
    notes.push_back(concat(name, ": the tokenizer has ", *n_token, " tokens, the embedding ", embedding->dims[1],
                           " rows; the last ", embedding->dims[1] - *n_token, " are never sampled"));
  }
  return notes;
}

}  // namespace gemma4
