// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <optional>
#include <string_view>
#include <variant>

#include "gemma4/quantisers/block32.hpp"
#include "gemma4/quantisers/int8_token.hpp"
#include "gemma4/quantisers/quantiser.hpp"
#include "gemma4/quantisers/scalar_codes.hpp"
#include "gemma4/quantisers/trellis_codes.hpp"

/// The simulated cache formats that ship:
///   sim-k<bits>v<bits> | sim-int8 | sim-q8_0 | sim-q4_0 | sim-t<bits>l<state bits>, each with
///   [-had][-tail<n>][-sink<n>]
/// Bits are 2 to 8, of a trellis 3 and 4 with 8 to 10 of state.
namespace gemma4 {

/// One of several simulated formats. What can be done with each is a visit without an `else`.
template <Quantiser... TQuantiser>
struct SimulatedFormats {
  using Any = std::variant<Simulated<TQuantiser>...>;
  /// TList<TFirst..., Simulated<TQuantiser>...>: how gemma4/cache_formats.hpp takes them in.
  template <template <class...> class TList, class... TFirst>
  using AppendTo = TList<TFirst..., Simulated<TQuantiser>...>;

  /// The format of a name, seed 0; nothing where no format of the list has it.
  [[nodiscard]] static std::optional<Any> parse(std::string_view name) {
    std::optional<Any> found;
    const auto try_one = [&]<class TSimulated>(std::optional<TSimulated> format) {
      if (format && !found) found = *format;
    };
    (try_one(Simulated<TQuantiser>::parse(name)), ...);
    return found;
  }
};

using ShippedSimulatedFormats = SimulatedFormats<ScalarCodes, Int8Token, Q80Cache, Q40Cache, TrellisCodes>;
using AnySimulated = ShippedSimulatedFormats::Any;

}  // namespace gemma4
