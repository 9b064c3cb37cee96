// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <variant>

#include "gemma4/cache_format.hpp"
#include "gemma4/error.hpp"
#include "gemma4/kv_format.hpp"
#include "gemma4/kvarn_format.hpp"
#include "gemma4/quantisers.hpp"

/// The one list of cache formats. The grammar of --cache, the memory plan, the caches of both backends and the tests
/// are made from it.
namespace gemma4 {

/// Formats as a list of types: what is made from it is a template on the list, so that a test can ask for one more.
template <class... TFormats>
struct CacheFormatList {
  static_assert((CacheFormat<TFormats> && ...), "a type of the list is no cache format: gemma4/cache_format.hpp");
  using Variant = std::variant<TFormats...>;

  [[nodiscard]] static std::string grammar() {
    std::string text;
    ((text += concat(text.empty() ? "" : " | ", TFormats::grammar())), ...);
    return text;
  }
  /// @throws std::invalid_argument naming what was not understood, and the grammar
  [[nodiscard]] static Variant parse(std::string_view name) {
    std::optional<Variant> found;
    const auto read = [&]<class TFormat>(std::optional<TFormat> format) {
      if (format && !found) found = Variant(*format);
    };
    (read(TFormats::parse(name)), ...);
    require(found.has_value(), "cache '", name, "' is not one of: ", grammar());
    return *found;
  }
};

using CacheFormats =
    ShippedSimulatedFormats::AppendTo<CacheFormatList, Bf16Format, F32Format, Tq4Format, KvFormat, KvarnFormat>;

/// What the flat cache of the full-attention layers holds: one of the list.
using CacheSpec = CacheFormats::Variant;

/// The spec that `name` stands for, seed 0.
/// @throws std::invalid_argument naming what was not understood, and the grammar
[[nodiscard]] inline CacheSpec parse_cache_spec(std::string_view name) {
  return CacheFormats::parse(name);
}

/// The name of a spec, without its seed: parse_cache_spec(to_string(spec)) == spec for seed 0.
[[nodiscard]] inline std::string to_string(const CacheSpec& spec) {
  return std::visit([](const auto& format) { return format.name(); }, spec);
}

/// Whether the newest tokens are exact and quantised only later: what a query sees of them then depends on how its
/// chunk was cut, and a sequence that goes back has lost them.
[[nodiscard]] inline bool keeps_a_tail(const CacheSpec& spec) {
  return std::visit(
      []<class TFormat>(const TFormat& format) {
        if constexpr (requires { format.tail; }) return format.tail > 0;
        return std::is_same_v<TFormat, KvarnFormat>;
      },
      spec);
}

/// The same format with another seed of everything random in it.
[[nodiscard]] inline CacheSpec with_seed(const CacheSpec& spec, std::uint64_t seed) {
  return std::visit([&](const auto& format) { return CacheSpec(format.with_seed(seed)); }, spec);
}

}  // namespace gemma4
