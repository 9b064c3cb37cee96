// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "experiments/support/drafting.hpp"
#include "experiments/support/numbers.hpp"
#include "gemma4/error.hpp"
#include "gemma4/plan/execution.hpp"
#include "gemma4/sampler.hpp"

/// One way to continue a text, as a word of a command line.
namespace gemma4::experiment {

/// Those that are tried where no others are given.
inline constexpr std::array<const char*, 10> kTenSettings = {"greedy",
                                                             "temperature=0.7",
                                                             "temperature=1",
                                                             "temperature=1+top-k=40",
                                                             "temperature=1+top-p=0.9",
                                                             "draft=1",
                                                             "draft=3",
                                                             "draft=5",
                                                             "draft=7",
                                                             "draft=auto"};

///   greedy | NAME=VALUE[+NAME=VALUE...]   of temperature, top-k, top-p, seed, draft (1 to 7, or auto), off (a switch)
///   temperature=0.7+top-k=40              sampled
///   draft=3+off=graph                     greedy, three drafts a step, launched one by one
struct DecodeSetting {
  std::string name;
  SamplerSettings sampler;
  bool is_drafted = false;
  std::optional<std::int64_t> n_draft = {};  ///< none: AutoDrafts decides
  std::vector<std::string> off = {};
};

/// @param seed of the sampler where the text has none
/// @throws std::invalid_argument naming the part that was not understood
[[nodiscard]] inline DecodeSetting parse_decode_setting(std::string_view text, std::uint64_t seed) {
  DecodeSetting setting{.name = std::string(text), .sampler = {.seed = seed}};
  if (text == "greedy") return setting;
  for (std::size_t at = 0; at <= text.size();) {
    const std::size_t end = std::min(text.find('+', at), text.size());
    const std::string_view part = text.substr(at, end - at);
    const std::size_t equals = std::min(part.find('='), part.size());
    const std::string_view name = part.substr(0, equals), value = part.substr(std::min(equals + 1, part.size()));
    const auto number = [&](auto& to) {
      require(detail::read_number(value, to) == detail::NumberKind::kGood, "setting '", text, "': ", name, " is '",
              value, "', need a number");
    };
    if (name == "temperature") {
      number(setting.sampler.temperature);
    } else if (name == "top-k") {
      number(setting.sampler.top_k);
    } else if (name == "top-p") {
      number(setting.sampler.top_p);
    } else if (name == "seed") {
      number(setting.sampler.seed);
    } else if (name == "draft") {
      setting.is_drafted = true;
      setting.n_draft = parse_n_draft(value);
    } else if (name == "off") {
      setting.off.emplace_back(execution_switch(value).name);
    } else {
      require(false, "setting '", text, "': '", part,
              "' is not understood; a setting is greedy, or NAME=VALUE+NAME=VALUE of temperature, top-k, top-p, seed, "
              "draft and off");
    }
    at = end + 1;
  }
  validate(setting.sampler);
  return setting;
}

}  // namespace gemma4::experiment
