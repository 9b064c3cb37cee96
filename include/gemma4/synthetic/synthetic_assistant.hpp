// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "gemma4/assistant_config.hpp"
#include "gemma4/gguf/assistant_tensors.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/synthetic/synthetic_model.hpp"

/// A drafter of any shape with random weights. It costs what a trained one costs, and what it drafts is never accepted
/// but by chance.
namespace gemma4 {

namespace detail {

inline void set_assistant_keys(GgufWriter& writer, const AssistantConfig& config, std::uint32_t file_type) {
  const std::string architecture(kAssistantArchitecture);
  set_layer_keys(writer, architecture, config.own, config.own.n_layer());
  writer.set(architecture + ".embedding_length_out", static_cast<std::uint32_t>(config.hidden_target));
  writer.set(architecture + ".nextn_predict_layers", static_cast<std::uint32_t>(config.own.n_layer()));
  writer.set("general.quantization_version", std::uint32_t{2});
  writer.set("general.file_type", file_type);
}

}  // namespace detail

/// The type of a drafter's matrices: `only`, or Q8_0; the mixes are of text models.
[[nodiscard]] inline TensorType synthetic_assistant_type(const SyntheticOptions& options) {
  return options.only.value_or(TensorType::kQ8_0);
}

/// Writes the drafter to `path` as write_synthetic_model() does a model; weights are scaled alike.
/// @param on_progress called with the bytes of tensor data written so far, of total_bytes(assistant_tensors(...))
/// @return the files, in order
/// @throws std::invalid_argument as write_synthetic_model() does
inline std::vector<std::filesystem::path> write_synthetic_assistant(
    const std::filesystem::path& path, const AssistantConfig& config, const SyntheticOptions& options = {},
    const std::function<void(std::int64_t)>& on_progress = {}) {
  const TensorType type = synthetic_assistant_type(options);
  const std::vector<ModelTensor> tensors = assistant_tensors(config, type);
  const std::uint32_t file_type = detail::file_type_number(type, options.mix);
  const detail::SyntheticModel layers(config.own, options);
  const auto set_keys = [&](GgufWriter& writer) {
    detail::set_assistant_keys(writer, config, file_type);
    set_vocabulary_keys(writer, config.own.vocab);
  };
  const auto fill_row = [&](const ModelTensor& tensor, std::int64_t row, std::span<std::byte> out) {
    layers.fill_row(tensor, row, out);
  };
  return detail::write_synthetic_tensors(path, tensors, options.split_max_bytes, set_keys, fill_row, on_progress);
}

}  // namespace gemma4
