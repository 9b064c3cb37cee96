// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "experiments/benchmark.cuh"
#include "experiments/block_formats.hpp"
#include "experiments/driver.hpp"
#include "experiments/gpu_run_info.cuh"
#include "experiments/support/linear_bench.cuh"
#include "experiments/support/linear_launches.cuh"
#include "gemma4/gguf/model_tensors.hpp"

namespace gemma4::experiment {
namespace {

constexpr std::size_t kRowsPerStep = 12;  ///< of the table, at most: nine matrices, their sum, and two chains of them

/// What a row says besides its matrix and its time.
struct RowContext {
  std::string mix;
  Width width;
  Start start = Start::kPlain;
};

class Experiment {
 public:
  Experiment(LinearBench& bench, ResultTable& table, Progress& progress)
      : bench_(bench), table_(table), progress_(progress) {}

  void measure(const std::string& mix, const std::vector<Width>& widths) {
    const std::vector<Launch> launches = launches_of(gemma4_31b(), tensors_of_31b(mix));
    const LinearBench::Weights weights = bench_.make_weights(launches);
    for (const Width& width : widths) {
      measure_launches(launches, {mix, width});
      for (const Start start : {Start::kPlain, Start::kNormLaunch}) {
        write_step("step_chained", launches, {mix, width, start}, bench_.time_token(launches, weights, width, start));
      }
    }
  }

  /// One matrix of a step.
  void measure_matrix(const std::string& mix, const std::string& name, const std::vector<Width>& widths) {
    const std::vector<Launch> launches = launches_of(gemma4_31b(), tensors_of_31b(mix));
    const auto has_name = [&](const Launch& launch) { return launch.name == name; };
    const auto found = std::ranges::find_if(launches, has_name);
    for (const Width& width : widths) {
      write_launch(*found, std::ranges::count_if(launches, has_name), {mix, width}, bench_.time_launch(*found, width));
      progress_.advance();
    }
  }

 private:
  void measure_launches(const std::vector<Launch>& launches, const RowContext& context) {
    std::vector<std::pair<Launch, std::int64_t>> distinct;
    for (const Launch& launch : launches) {
      const auto same = [&](const auto& entry) { return entry.first == launch; };
      const auto found = std::ranges::find_if(distinct, same);
      found == distinct.end() ? (void)distinct.emplace_back(launch, 1) : (void)++found->second;
    }
    Timing sum;
    for (const auto& [launch, count] : distinct) {
      const Timing timing = bench_.time_launch(launch, context.width);
      write_launch(launch, count, context, timing);
      const auto n = static_cast<double>(count);
      sum.median_us += n * timing.median_us, sum.p10_us += n * timing.p10_us, sum.p90_us += n * timing.p90_us;
      sum.n_repeat = timing.n_repeat;
      progress_.advance();
    }
    write_step("step_sum", launches, context, sum);
  }

  [[nodiscard]] ResultTable::Row row_of(const RowContext& context, const std::string& matrix, std::int64_t count,
                                        std::int64_t bytes, const Timing& timing, const std::string& types = {}) {
    const double gb_per_s = 1e-3 * static_cast<double>(bytes) / timing.median_us;
    auto row = table_.row();
    row.set("mix", context.mix).set("matrix", matrix).set("n_token", context.width.n_token);
    row.set("n_per_step", count).set("input", input_name(context.start)).set("path", context.width.path_name());
    row.set("median_us", timing.median_us).set("p10_us", timing.p10_us).set("p90_us", timing.p90_us);
    row.set("n_repeat", timing.n_repeat).set("bytes", bytes).set("gb_per_s", gb_per_s);
    row.set("copy_gb_per_s", bench_.copy_rate()).set("of_copy", gb_per_s / bench_.copy_rate());
    row.set("step_us", static_cast<double>(count) * timing.median_us);
    const std::string what = context.mix + ' ' + matrix + ' ' + types + ' ' + input_name(context.start);
    const bool is_one = context.width.n_token == 1 && context.width.path == cuda::LinearPath::kDot;
    if (is_one) one_token_us_[what] = timing.median_us;
    const auto one = one_token_us_.find(what);
    if (one != one_token_us_.end()) row.set("over_one_token", timing.median_us / one->second);
    return row;
  }

  /// One row: `count` launches of a token take `timing` each.
  void write_launch(const Launch& launch, std::int64_t count, const RowContext& context, const Timing& timing) {
    double error = 0;
    bool has_bits = true;
    for (const TensorType type : launch.types) {
      error = std::max(error, bench_.error_of_bound(type, launch.cols, context.width));
      has_bits = has_bits && bench_.has_bits_of_one(type, launch.cols, context.width);
    }
    auto row = row_of(context, launch.name, count, launch.bytes(), timing, launch.type_text());
    row.set("types", launch.type_text()).set("n_out", launch.total_rows()).set("n_in", launch.cols);
    if (context.width.path == cuda::LinearPath::kDot) {  // once for each number of tokens
      const double blas_us = bench_.time_blas(launch, context.width.n_token).median_us;
      row.set("blas_bf16_us", blas_us).set("over_blas", blas_us / timing.median_us);
    }
    row.set("error_of_bound", error);
    if (error > 1.0) {
      row.fail("wrong: the error is beyond the bound");
    } else if (!has_bits) {
      row.fail("wrong: other bits than each token alone");
    } else {
      row.commit();
    }
  }

  /// A step as one row: the sum of its launches, or the chain of them.
  void write_step(const std::string& name, const std::vector<Launch>& launches, const RowContext& context,
                  const Timing& timing) {
    std::int64_t bytes = 0;
    for (const Launch& launch : launches) bytes += launch.bytes();
    row_of(context, name, 1, bytes, timing).commit();
    progress_.advance();
  }

  LinearBench& bench_;
  ResultTable& table_;
  Progress& progress_;
  std::map<std::string, double> one_token_us_;  ///< by dot products, by what was measured
};

const TableShape kShape = {
    {"mix", "matrix", "types", "n_out", "n_in", "n_token", "n_per_step", "input", "path"},
    {"median_us", "p10_us", "p90_us", "n_repeat", "bytes", "gb_per_s", "copy_gb_per_s", "of_copy", "step_us",
     "over_one_token", "blas_bf16_us", "over_blas", "error_of_bound"},
    {"mix", "matrix", "types", "n_out", "n_in", "n_token", "n_per_step", "input", "path", "median_us", "gb_per_s",
     "of_copy", "step_us", "over_one_token", "over_blas", "error_of_bound", "status"}};

void run(int argc, char** argv) {
  CLI::App app("How fast the matrices of a decode step of the 31B are read, one by one and as a whole step.");
  DriverOptions driver;
  std::vector<std::int64_t> tokens = {1, 2, 4, 8, 16};
  std::vector<std::string> mixes = {"q4_k_m", "q4_k"}, formats = block_format_names(), paths = {"dot", "int8"};
  add_seed(app, driver);
  add_out(app, driver);
  add_quiet(app, driver);
  add_whole(app, "--tokens", tokens, "Tokens of a step, comma-separated", {1, cuda::kMaxInt8Tokens})->delimiter(',');
  app.add_option("--path", paths,
                 "What multiplies, comma-separated: dot (a dot product a token, up to 8) or int8 (tensor cores)")
      ->delimiter(',')
      ->check(CLI::IsMember({"dot", "int8"}))
      ->capture_default_str();
  app.add_option("--mix", mixes, "Types of the weights: a mix, or a block format for every matrix, comma-separated")
      ->delimiter(',')
      ->check(CLI::IsMember(mix_or_format_names()))
      ->capture_default_str();
  app.add_option("--format", formats, "Block formats of which gate and up alone are measured, comma-separated; or none")
      ->delimiter(',')
      ->check(CLI::IsMember(block_format_names_or_none()))
      ->capture_default_str();
  LinearTuning tuning;  // until a table says what is faster, and the constants are that alone
  add_whole(app, "--variant", tuning.variant,
            "Products done otherwise, a sum of: 1 dealt rows by fours, 2 stages of four rows, 4 dealt rows a share of "
            "the launch, 16 one block of four tokens (dot), 8 all activations in one block where two would have a "
            "chunk (int8)",
            {0, cuda::LinearVariant::kMost})
      ->capture_default_str();
  add_whole(app, "--codes-from", tuning.codes_from,
            "Values of a call, of all its tokens, from which a launch in front makes its activations codes",
            {0, 1 << 20})
      ->capture_default_str();
  add_whole(app, "--norm-codes-from", tuning.norm_codes_from,
            "Tokens from which the norm in front of a product makes its activations codes", {1, 17})
      ->capture_default_str();
  parse(app, argc, argv);
  formats = formats_beside(mixes, formats);
  const std::vector<Width> widths = widths_of(tokens, paths);

  const RunInfo info = gpu_run_info("linear", argc, argv, driver.seed);
  run_table(driver, info, kShape, [&](ResultTable& table) {
    LinearBench bench(driver.seed, tuning);
    Progress progress("linear",
                      static_cast<std::int64_t>((mixes.size() * kRowsPerStep + formats.size()) * widths.size()),
                      progress_options(driver, "row"));
    Experiment experiment(bench, table, progress);
    for (const std::string& mix : mixes) experiment.measure(mix, widths);
    for (const std::string& format : formats) experiment.measure_matrix(format, "gate_up", widths);
    progress.finish();
  });
}

}  // namespace
}  // namespace gemma4::experiment

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, gemma4::experiment::run);
}
