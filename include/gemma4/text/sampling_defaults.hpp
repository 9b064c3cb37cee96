// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/sampler.hpp"

/// How the model's authors want it sampled: `general.sampling.*`, which converters copy from generation_config.json.
/// They are the defaults of whoever generates text; flags go before them.
namespace gemma4 {

/// What a file says; absent: nothing.
struct SamplingDefaults {
  std::optional<float> temperature;   ///< general.sampling.temp
  std::optional<std::int32_t> top_k;  ///< general.sampling.top_k; 0: off
  std::optional<float> top_p;         ///< general.sampling.top_p; 1: off
  std::vector<std::string> notes;     ///< keys that ask for what the sampler does not do, a line each

  [[nodiscard]] bool empty() const { return !temperature && !top_k && !top_p; }
  bool operator==(const SamplingDefaults&) const = default;
};

/// Which settings the caller was given: those the file does not change.
struct GivenSampling {
  bool temperature = false;
  bool top_k = false;
  bool top_p = false;
};

namespace detail {

inline constexpr std::string_view kSamplingPrefix = "general.sampling.";

/// A number of any stored type.
[[nodiscard]] inline std::optional<double> sampling_number(const GgufFile& file, std::string_view name) {
  const std::string key = concat(kSamplingPrefix, name);
  if (!file.has(key)) return std::nullopt;
  if (!file.is_array(key) && is_integer(file.value(key).type)) return static_cast<double>(file.get<std::int64_t>(key));
  return file.get<double>(key);
}

}  // namespace detail

/// @throws FormatError naming a key whose value is no number or none that its setting can have
[[nodiscard]] inline SamplingDefaults sampling_defaults(const GgufFile& file) {
  constexpr auto kMaxInt = static_cast<double>(std::numeric_limits<std::int32_t>::max());
  const std::string source = file.path().string();
  const auto check = [&](bool holds, const char* name, const char* expected, double found) {
    require_format(holds, source, ": ", detail::kSamplingPrefix, name, " is ", found, ", expected ", expected);
  };
  SamplingDefaults defaults;
  if (const auto temp = detail::sampling_number(file, "temp")) {
    check(std::isfinite(static_cast<float>(*temp)) && *temp >= 0, "temp", "0 (greedy) or a positive number", *temp);
    defaults.temperature = static_cast<float>(*temp);
  }
  if (const auto top_k = detail::sampling_number(file, "top_k")) {  // none, or less than none, is off
    check(*top_k == std::floor(*top_k) && *top_k <= kMaxInt, "top_k", "a whole number below 2^31", *top_k);
    defaults.top_k = *top_k <= 0 ? 0 : static_cast<std::int32_t>(*top_k);
  }
  if (const auto top_p = detail::sampling_number(file, "top_p")) {
    check(static_cast<float>(*top_p) > 0, "top_p", "a number above 0; 1: off", *top_p);
    defaults.top_p = *top_p >= 1 ? 1.0f : static_cast<float>(*top_p);
  }
  struct Off {
    std::string_view name;
    double value;
  };
  for (const Off& off : {Off{"min_p", 0}, Off{"xtc_probability", 0}, Off{"penalty_repeat", 1}, Off{"mirostat", 0}}) {
    const auto found = detail::sampling_number(file, off.name);
    if (!found || *found == off.value) continue;
    defaults.notes.push_back(concat(source, ": ", detail::kSamplingPrefix, off.name, " is ", *found,
                                    ", which this sampler does not do; it is left out"));
  }
  return defaults;
}

/// Fills in what was not given.
/// @return what was taken from the file, a line for stderr; empty where nothing was
[[nodiscard]] inline std::string apply_sampling_defaults(SamplerSettings& settings, const SamplingDefaults& defaults,
                                                         const GivenSampling& given) {
  std::string taken;
  const auto take = [&](auto& to, const auto& from, bool is_given, const char* flag) {
    if (!from || is_given) return;
    to = *from;
    taken += concat(taken.empty() ? "" : ", ", flag, " ", to);
  };
  take(settings.temperature, defaults.temperature, given.temperature, "--temperature");
  take(settings.top_k, defaults.top_k, given.top_k, "--top-k");
  take(settings.top_p, defaults.top_p, given.top_p, "--top-p");
  return taken.empty() ? taken : concat("sampling as the file says: ", taken);
}

}  // namespace gemma4
