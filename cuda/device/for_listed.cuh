// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#include "gemma4/error.hpp"

/// From a value that is chosen when a program runs to the template that was compiled for it.
namespace gemma4::cuda {

/// Calls body.template operator()<kValue>() for the element of kList (a std::array of one structural type) that equals
/// `value`.
/// @throws std::invalid_argument with the message `missing` where none does
template <const auto& kList, class TBody>
void for_listed(const typename std::remove_cvref_t<decltype(kList)>::value_type& value, const char* missing,
                TBody&& body) {
  const auto visit = [&]<std::size_t... kIndex>(std::index_sequence<kIndex...>) {
    return ((value == kList[kIndex] ? (body.template operator()<kList[kIndex]>(), true) : false) || ...);
  };
  require(visit(std::make_index_sequence<kList.size()>{}), missing);
}

}  // namespace gemma4::cuda
