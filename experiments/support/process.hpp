// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdlib>
#include <functional>
#include <new>
#include <stdexcept>

/// The one way in which a driver begins and ends. Compiled once for all of them.
namespace gemma4::experiment {

/// Leaves run_process() with an exit code; the message has been printed.
struct Exit {
  int code = EXIT_SUCCESS;
};

/// Standard output could not be written.
class OutputError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An allocation by `new` that the host refused; drivers replace the operator, so that its size is known.
class AllocationError : public std::bad_alloc {
 public:
  explicit AllocationError(std::size_t bytes) noexcept : bytes_(bytes) {}
  [[nodiscard]] const char* what() const noexcept override { return "out of memory"; }
  [[nodiscard]] std::size_t bytes() const noexcept { return bytes_; }

 private:
  std::size_t bytes_;
};

/// Runs body(), whose exit code it returns. Nothing escapes:
///
/// - what body() throws is printed as `error: ...` on stderr, and the code is not 0; of memory that was refused it says
///   how much was asked for and how much there is;
/// - what std::cout does not get rid of, to a full disk or a pipe that nobody reads, is such an error, thrown where it
/// is
///   written, so that work whose output is lost ends;
/// - an interrupt removes what is half written, then ends the program as it would have (gemma4/interrupt.hpp).
[[nodiscard]] int run_process(const std::function<int()>& body);

}  // namespace gemma4::experiment
