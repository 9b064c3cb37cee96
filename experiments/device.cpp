// SPDX-License-Identifier: Apache-2.0
#include <cstdio>
#include <iostream>
#include <optional>
#include <string>

#include "experiments/driver.hpp"
#include "experiments/support/cuda_model.hpp"

/// Is there a GPU, and how much of its memory is free?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

int run(int argc, char** argv) {
  CLI::App app(
      "Says which CUDA device this program would use and how much of its memory is free; exit code 1 and the reason "
      "where "
      "there is none, or less free than --free-gib.");
  double needed_gib = 0;
  add_real(app, "--free-gib", needed_gib, "GiB that must be free", {});
  parse(app, argc, argv);
  if (const std::optional<std::string> reason = missing_device()) {
    std::cout << "no CUDA device: " << *reason << "\n";
    return EXIT_FAILURE;
  }
  const double free_gib = static_cast<double>(device_bytes_free()) / 0x1p30;
  char text[96];
  std::snprintf(text, sizeof(text), "%.2f GiB free", free_gib);
  std::cout << device_run_info("device", argc, argv, 0).gpu << ", " << text;
  if (free_gib < needed_gib) std::cout << ", too little: " << needed_gib << " GiB are needed";
  std::cout << "\n";
  return free_gib < needed_gib ? EXIT_FAILURE : EXIT_SUCCESS;
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
