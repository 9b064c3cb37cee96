// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <filesystem>
#include <iostream>
#include <string>
#include <vector>

#include "experiments/driver.hpp"
#include "gemma4/error.hpp"
#include "gemma4/model/accuracy_case.hpp"

/// The command line of experiments/accuracy.cpp.
namespace gemma4::experiment {

struct AccuracyOptions : DriverOptions {
  AccuracyOptions() {
    caches = {"bf16", "tq4"};
    contexts = {512, 1024, 2048, 4096, 8192};
  }
  std::string base = "bf16";
  std::int64_t chunk = 512;
  std::vector<std::int64_t> depths;
  std::int64_t window = 32;
  bool is_shelf = false;
  std::int64_t trajectory = 0;  ///< tokens of each greedy text
  std::int64_t n_prompt = 8;
  std::int64_t prompt_len = 2048;
  std::filesystem::path session;

  /// Of --depths: the whole chunks before the first position that is looked at.
  [[nodiscard]] std::int64_t prefix() const { return (depths.front() - window) / chunk * chunk; }
};

/// Refuses a name that parse_accuracy_case() does not know.
[[nodiscard]] inline std::string check_case_name(const std::string& name) {
  try {
    (void)parse_accuracy_case(name);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

inline void add_accuracy_options(CLI::App& app, AccuracyOptions& options) {
  add_model(app, options);
  add_backend(app, options);
  app.add_option("--cache", options.caches,
                 "Cases, comma-separated, each CACHE[@ring=RING][@chunk=N][@off=SWITCH+SWITCH]. Caches: " +
                     CacheFormats::grammar() + ". Rings: bf16, or a simulated format")
      ->delimiter(',')
      ->check(CLI::Validator(check_case_name, "CASE"))
      ->capture_default_str();
  app.add_flag("--shelf", options.is_shelf,
               "The cases of gemma4/model/accuracy_case.hpp, or of them those of --cache; at 131072 tokens in chunks of "
               "2048 unless --contexts and --chunk say otherwise; rows go to results/shelf/");
  app.add_option("--base", options.base, "Cache that the others are compared with")
      ->check(CLI::Validator(check_cache_name, "CACHE"))
      ->capture_default_str();
  add_contexts(app, options);
  add_ids(app, options);
  add_recall(app, options);
  add_tokens(app, "--chunk", options.chunk, "Tokens that go through the model at a time");
  add_tokens(app, "--depths", options.depths,
             "Look at the last --window positions before each of these depths and at no others; without --ids over "
             "random ids")
      ->delimiter(',');
  add_tokens(app, "--window", options.window, "Positions before a depth");
  add_tokens(app, "--trajectory", options.trajectory,
             "Instead: greedy texts of so many tokens from prompts of the text, each case against the base: where "
             "they first differ, and their agreement by position");
  add_tokens(app, "--prompts", options.n_prompt, "Prompts of --trajectory, evenly spread over --ids");
  add_tokens(app, "--prompt-len", options.prompt_len, "Tokens of each of them");
  app.add_option("--session", options.session,
                 "With --depths, or --trajectory of one prompt: what the caches held before the first position that is "
                 "looked at, in a file FILE.CASE for the base and each case; used where it is there, else made");
  add_policy(app, options);
  add_seed(app, options);
  add_out(app, options);
  add_quiet(app, options);
}

/// --shelf stands for these.
inline void take_shelf(const CLI::App& app, AccuracyOptions& options) {
  const ShelfCases shelf = shelf_cases(options.backend == "cuda");
  if (app.count("--cache") == 0) options.caches = shelf.cases;
  if (app.count("--contexts") == 0) options.contexts = {131072};
  if (app.count("--chunk") == 0) options.chunk = 2048;
  if (shelf.unknown.empty()) return;
  std::cerr << "shelf: not in this build:";
  for (const std::string& name : shelf.unknown) std::cerr << ' ' << name;
  std::cerr << '\n';
}

/// Refuses what contradicts itself, before anything is loaded.
inline void check_accuracy_options(const AccuracyOptions& options) {
  require(!options.ids.empty() || !options.recall.empty() || !options.depths.empty() || options.trajectory > 0,
          "nothing to measure: give --ids, --recall, --depths or --trajectory");
  require(!options.contexts.empty(), "--contexts is empty");
  require(std::ranges::is_sorted(options.depths), "--depths: need increasing depths");
  if (options.session.empty()) return;
  require(options.recall.empty(), "--session: --recall asks all along its documents, nothing of them can be kept");
  require(options.trajectory > 0 || !options.depths.empty(),
          "--session: a run that looks at every position has nothing in front that could be kept; give --depths");
  require(options.trajectory == 0 || options.n_prompt == 1, "--session: a file holds one text, --prompts is ",
          options.n_prompt);
  require(options.trajectory > 0 || options.prefix() > 0, "--session: position ",
          options.depths.front() - options.window, ", the first of --depths and --window, is in the first --chunk of ",
          options.chunk, "; there is nothing in front of it");
}

}  // namespace gemma4::experiment
