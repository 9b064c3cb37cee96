// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/gguf/model_tensors.hpp"

/// The mixes of weight types that drivers know by name.
namespace gemma4::experiment {

[[nodiscard]] inline std::vector<std::string> mix_names() {
  std::vector<std::string> names;
  for (const WeightMixInfo& info : kWeightMixes) names.emplace_back(info.name);
  return names;
}

/// @param name one of mix_names()
[[nodiscard]] inline WeightMix parse_mix(const std::string& name) {
  return std::ranges::find(kWeightMixes, std::string_view(name), &WeightMixInfo::name)->mix;
}

}  // namespace gemma4::experiment
