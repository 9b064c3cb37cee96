// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <iostream>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "experiments/build_info.hpp"
#include "experiments/support/numbers.hpp"
#include "experiments/support/process.hpp"
#include "gemma4/cache_formats.hpp"
#include "gemma4/partial_file.hpp"
#include "gemma4/plan/execution.hpp"
#include "gemma4/plan/step_plan.hpp"
#include "gemma4/report/progress.hpp"
#include "gemma4/report/result_table.hpp"
#include "gemma4/report/run_info.hpp"

/// What the drivers share: flags of one spelling, one way to fail, one place for results.
///
///   void run(int argc, char** argv) {
///     CLI::App app("What a TQ4 cache costs in accuracy.");
///     DriverOptions options;
///     add_model(app, options);
///     add_caches(app, options);
///     parse(app, argc, argv);
///     ...
///   }
///   int main(int argc, char** argv) { return run_main(argc, argv, run); }
///
/// What a driver owes to whoever runs it comes with these: numbers by add_whole() and its like (support/numbers.hpp),
/// the table by run_table(), output by std::cout, other files by write_whole_file(), everything under run_main()
/// (support/process.hpp). tests/house/ holds every driver to it.
namespace gemma4::experiment {

/// The values of the shared flags. A driver adds those it uses, and sets its own defaults before.
struct DriverOptions {
  std::filesystem::path model;
  std::string backend = "reference";
  std::vector<std::string> caches = {"bf16"};
  std::vector<std::int64_t> contexts;
  std::filesystem::path ids;
  std::vector<std::filesystem::path> recall;
  std::uint64_t seed = 0;
  std::filesystem::path out;
  bool is_quiet = false;
  std::vector<std::string> off;  ///< of kExecutionSwitches
  bool shows_plan = false;

  [[nodiscard]] ExecutionPolicy policy() const { return policy_without(off); }
};

inline CLI::Option* add_model(CLI::App& app, DriverOptions& options) {
  return app.add_option("--model", options.model, "GGUF file of the model")->required()->check(CLI::ExistingFile);
}

inline CLI::Option* add_backend(CLI::App& app, DriverOptions& options) {
  return app.add_option("--backend", options.backend, "Who computes")
      ->check(CLI::IsMember({"reference", "cuda"}))
      ->capture_default_str();
}

/// Refuses a name that parse_cache_spec() does not know, with the grammar.
[[nodiscard]] inline std::string check_cache_name(const std::string& name) {
  try {
    (void)parse_cache_spec(name);
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

/// A list: a table compares them.
inline CLI::Option* add_caches(CLI::App& app, DriverOptions& options) {
  return app.add_option("--cache", options.caches, "Cache formats, comma-separated: " + CacheFormats::grammar())
      ->delimiter(',')
      ->check(CLI::Validator(check_cache_name, "CACHE"))
      ->capture_default_str();
}

/// A single one; the first entry of options.caches.
inline CLI::Option* add_cache(CLI::App& app, DriverOptions& options) {
  options.caches.resize(1);
  return app.add_option("--cache", options.caches.front(), "Cache format: " + CacheFormats::grammar())
      ->check(CLI::Validator(check_cache_name, "CACHE"))
      ->capture_default_str();
}

inline CLI::Option* add_contexts(CLI::App& app, DriverOptions& options) {
  return add_tokens(app, "--contexts", options.contexts, "Context lengths in tokens, comma-separated")->delimiter(',');
}

inline CLI::Option* add_ids(CLI::App& app, DriverOptions& options) {
  return app.add_option("--ids", options.ids, "Token ids: little-endian uint16 (*.u16) or int32 (*.i32)")
      ->check(CLI::ExistingFile);
}

inline CLI::Option* add_recall(CLI::App& app, DriverOptions& options) {
  return app.add_option("--recall", options.recall, "Key-recall file (GGUF); may be given more than once")
      ->check(CLI::ExistingFile);
}

inline CLI::Option* add_seed(CLI::App& app, DriverOptions& options) {
  return app.add_option("--seed", options.seed, "Seed of everything random")
      ->check(within(Limits<std::uint64_t>{}))
      ->capture_default_str();
}

inline CLI::Option* add_out(CLI::App& app, DriverOptions& options) {
  return app.add_option("--out", options.out,
                        "CSV file to append to; '-' for none; default results/<experiment>/<device>-<commit>.csv");
}

inline CLI::Option* add_quiet(CLI::App& app, DriverOptions& options) {
  return app.add_flag("--quiet", options.is_quiet, "No progress on stderr");
}

/// --off and --plan. The switches are a device's; the reference has none.
inline void add_policy(CLI::App& app, DriverOptions& options) {
  std::string help = "What is off, comma-separated:";
  std::vector<std::string> names;
  for (const ExecutionSwitch& entry : kExecutionSwitches) {
    names.emplace_back(entry.name);
    help += concat("\n  ", entry.name, ": ", entry.help);
  }
  app.add_option("--off", options.off, help)->delimiter(',')->check(CLI::IsMember(names));
  app.add_flag("--plan", options.shows_plan,
               "Say on stderr how a decode step and a chunk run, and why no faster way fits");
}

/// The plans on stderr, with --plan.
inline void show_plans(const DriverOptions& options, const std::string& what, const std::vector<StepPlan>& plans) {
  if (!options.shows_plan) return;
  std::cerr << "plan of " << what << ", digest " << digest(plans) << '\n';
  for (const StepPlan& plan : plans) print_step_plan(std::cerr, plan);
}

/// What --out stands for, as ResultTable takes it: an empty path is no file.
[[nodiscard]] inline std::filesystem::path result_path(const DriverOptions& options, const RunInfo& info) {
  if (options.out == "-") return {};
  return options.out.empty() ? default_result_path(info) : options.out;
}

[[nodiscard]] inline ProgressOptions progress_options(const DriverOptions& options, std::string unit) {
  ProgressOptions progress;
  if (options.is_quiet) progress.mode = ProgressMode::kSilent;
  progress.unit = std::move(unit);
  return progress;
}

/// The columns of a driver's table, and those of them that are printed in the end; none: the driver prints by itself.
struct TableShape {
  std::vector<std::string> parameters;
  std::vector<std::string> measures;
  std::vector<std::string> shown;
};

/// Opens the table, runs work(table), and prints the rows that there are, whatever became of the work or of the file: a
/// row that the disk does not take is still seen. Then what was wrong is thrown on.
/// @param path empty: no file
template <class TWork>
void run_table(const std::filesystem::path& path, const RunInfo& info, const TableShape& shape, TWork&& work) {
  ResultTable table(path, info, shape.parameters, shape.measures);
  table.keep_rows();
  std::exception_ptr first;
  const auto attempt = [&](auto&& step) {
    try {
      step();
    } catch (const std::exception& error) {
      if (first) std::cerr << "error: " << error.what() << '\n';
      if (!first) first = std::current_exception();
    }
  };
  attempt([&] { work(table); });
  if (!shape.shown.empty() && (table.n_row() > 0 || !first))
    attempt([&] { table.print_with_failures(std::cout, shape.shown); });
  attempt([&] { table.finish(); });
  if (first) std::rethrow_exception(first);
}
/// The same with the file that --out stands for.
template <class TWork>
void run_table(const DriverOptions& options, const RunInfo& info, const TableShape& shape, TWork&& work) {
  run_table(result_path(options, info), info, shape, std::forward<TWork>(work));
}

/// A text as a file that is there whole or not at all.
inline void write_whole_file(const std::filesystem::path& path, std::string_view text) {
  PartialFile file(path);
  file.write(text);
  file.commit();
}

/// Parses the command line. --help prints and leaves with code 0, a mistake with the message and another code.
inline void parse(CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& help) {
    throw Exit{app.exit(help)};
  } catch (const CLI::ParseError& error) {
    std::cerr << "error: " << error.what() << "\nRun with --help for what it takes.\n";
    throw Exit{error.get_exit_code() == 0 ? EXIT_FAILURE : error.get_exit_code()};
  }
}

/// The main of every driver: run_process() around fn(argc, argv), which returns an exit code or nothing.
template <class TFunction>
[[nodiscard]] int run_main(int argc, char** argv, TFunction&& fn) {
  return run_process([&] {
    if constexpr (std::is_void_v<std::invoke_result_t<TFunction, int, char**>>) {
      fn(argc, argv);
      return EXIT_SUCCESS;
    } else {
      return static_cast<int>(fn(argc, argv));
    }
  });
}

}  // namespace gemma4::experiment
