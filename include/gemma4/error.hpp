// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

/// Errors. A message names the thing, what was expected, what was found and, where there is one, the remedy.
/// std::invalid_argument is the caller's mistake, FormatError is a bad file, cuda::Error is CUDA.
namespace gemma4 {

/// A file whose bytes do not hold what its format promises.
class FormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// The arguments streamed one after another into a string.
template <class... TArgs>
[[nodiscard]] std::string concat(const TArgs&... args) {
  std::ostringstream stream;
  (stream << ... << args);
  return stream.str();
}

/// Throws std::invalid_argument with the streamed message unless `condition` holds.
template <class... TArgs>
void require(bool condition, const TArgs&... message) {
  if (!condition) throw std::invalid_argument(concat(message...));
}

/// Throws FormatError with the streamed message unless `condition` holds.
template <class... TArgs>
void require_format(bool condition, const TArgs&... message) {
  if (!condition) throw FormatError(concat(message...));
}

}  // namespace gemma4
