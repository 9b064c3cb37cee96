// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cctype>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/quantized_matrix.hpp"

/// The weights of the 31B by a name: a mix as files have it ("q4_k_m"), or one block format for every matrix ("q4_0",
/// "iq4_xs").
namespace gemma4::experiment {

[[nodiscard]] inline std::string lower_name(TensorType type) {
  std::string name(type_name(type));
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

[[nodiscard]] inline std::vector<std::string> block_format_names() {
  std::vector<std::string> names;
  for (const TensorType type : kWeightTypes) {
    if (block_size(type) > 1) names.push_back(lower_name(type));
  }
  return names;
}

[[nodiscard]] inline std::vector<std::string> mix_or_format_names() {
  std::vector<std::string> names;
  for (const WeightMixInfo& info : kWeightMixes) names.emplace_back(info.name);
  std::ranges::copy(block_format_names(), std::back_inserter(names));
  return names;
}

/// @throws std::invalid_argument for a name of neither
[[nodiscard]] inline std::vector<ModelTensor> tensors_of_31b(const std::string& name) {
  const auto mix = std::ranges::find(kWeightMixes, std::string_view(name), &WeightMixInfo::name);
  if (mix != kWeightMixes.end()) return model_tensors(gemma4_31b(), std::nullopt, mix->mix);
  const auto type = std::ranges::find(kWeightTypes, name, lower_name);
  require(type != kWeightTypes.end() && block_size(*type) > 1, "'", name, "' is no mix and no block format");
  return model_tensors(gemma4_31b(), *type);
}

/// What --format takes.
[[nodiscard]] inline std::vector<std::string> block_format_names_or_none() {
  std::vector<std::string> names = block_format_names();
  names.emplace_back("none");
  return names;
}

/// The formats that were asked for and are not measured as a mix anyway.
[[nodiscard]] inline std::vector<std::string> formats_beside(const std::vector<std::string>& mixes,
                                                             std::vector<std::string> formats) {
  std::erase_if(formats, [&](const std::string& format) {
    return format == "none" || std::ranges::find(mixes, format) != mixes.end();
  });
  return formats;
}

}  // namespace gemma4::experiment
