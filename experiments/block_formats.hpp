// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cctype>
#include <string>
#include <vector>

#include "gemma4/gguf/gguf.hpp"
#include "gemma4/quantized_matrix.hpp"

/// The formats of weights in blocks as drivers name them: "q4_0", "iq4_xs". Mixes of whole models have Q4_K, Q6_K and
/// Q8_0 already; these are the others.
namespace gemma4::experiment {

[[nodiscard]] inline std::string lower_name(TensorType type) {
  std::string name(type_name(type));
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

[[nodiscard]] inline bool is_of_a_mix(TensorType type) {
  return type == TensorType::kQ4K || type == TensorType::kQ6K || type == TensorType::kQ8_0;
}

[[nodiscard]] inline std::vector<std::string> block_format_names() {
  std::vector<std::string> names;
  for (const TensorType type : kWeightTypes) {
    if (block_size(type) > 1 && !is_of_a_mix(type)) names.push_back(lower_name(type));
  }
  return names;
}

/// @throws std::invalid_argument for a name of none
[[nodiscard]] inline TensorType block_format(const std::string& name) {
  for (const TensorType type : kWeightTypes) {
    if (block_size(type) > 1 && lower_name(type) == name) return type;
  }
  require(false, "'", name, "' is no block format");
  return TensorType::kF32;
}

[[nodiscard]] inline std::vector<std::string> with_none(std::vector<std::string> names) {
  names.emplace_back("none");
  return names;
}

}  // namespace gemma4::experiment
