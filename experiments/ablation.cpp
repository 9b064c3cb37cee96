// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/cuda_model.hpp"
#include "experiments/support/rates.hpp"
#include "experiments/support/run_text.hpp"

/// What is each part of the speed owed to?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

constexpr const char* kNone = "none";
constexpr const char* kGraph = "graph";
constexpr const char* kGateUp = "gate_up_fusion";

struct Options : DriverOptions {
  Options() {
    caches = {"tq4"};
    off = {kGraph, kGateUp};
    off.insert(off.begin(), kSwitchNames.begin(), kSwitchNames.end());
  }
  std::vector<std::string> off;
  std::vector<std::int64_t> depths = {512, 32768};
  std::int64_t context = 131072;
  std::int64_t chunk = 2048;
  std::int64_t window = 20;
  std::int64_t repeat = 3;
};

const std::vector<std::string> kParameters = {"model", "model_desc", "text",     "context", "n_batch", "cache",
                                              "off",   "phase",      "n_prompt", "n_gen",   "n_depth"};
const std::vector<std::string> kMeasures = {"avg_ts", "stddev_ts", "n_sample", "us_a_token", "time_ratio_to_on"};

/// One load of the model: everything that can be switched while a sequence lives, and what the load itself decides.
class Run {
 public:
  Run(const Options& options, ResultTable& table, const std::string& desc, bool join_gate_up)
      : options_(options),
        table_(table),
        desc_(desc),
        join_gate_up_(join_gate_up),
        settings_(make_settings(options)),
        model_(load_cuda_model(options.model,
                               {.join_gate_up = join_gate_up, .progress = progress_options(options, "B")}, settings_)),
        session_(model_->make_session(settings_)),
        ids_(text_ids(options, model_->config().vocab, std::max(options.depths.back(), options.chunk))) {}

  /// @param base microseconds a token of the cases with everything on, by phase and depth; filled where it is empty
  void run(const std::vector<std::string>& off, std::map<std::string, double>& base) {
    for (const std::string& name : off) {
      if (name != kGraph) run_prompt(name, base);
    }
    session_->reset();
    Progress progress("ablation", options_.depths.back(), progress_options(options_, "tokens"));
    for (const std::int64_t depth : options_.depths) {
      switch_off(kNone);
      const std::int64_t begin = session_->position();
      (void)session_->prefill(
          std::span(ids_).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(depth - begin)),
          options_.chunk, [&](std::int64_t done) { progress.update(begin + done); });
      for (const std::string& name : off) run_decode(name, depth, base);
    }
    progress.finish();
  }

 private:
  [[nodiscard]] static CudaSettings make_settings(const Options& options) {
    CudaSettings settings{.cache = with_seed(parse_cache_spec(options.caches.front()), options.seed),
                          .context = options.context,
                          .max_chunk = options.chunk};
    return settings;
  }

  void switch_off(const std::string& name) {
    const bool is_live = std::ranges::find(kSwitchNames, name) != kSwitchNames.end();
    session_->set_off(is_live ? std::vector<std::string>{name} : std::vector<std::string>{});
    session_->set_use_graph(name != kGraph);
  }

  /// A prompt of one chunk.
  void run_prompt(const std::string& off, std::map<std::string, double>& base) {
    switch_off(off);
    const auto ids = std::span(ids_).first(static_cast<std::size_t>(options_.chunk));
    const std::vector<double> rates = prompt_rates(*session_, ids, options_.chunk, options_.repeat);
    write(off, "prompt", options_.chunk, 0, 0, rates, base);
  }

  void run_decode(const std::string& off, std::int64_t depth, std::map<std::string, double>& base) {
    switch_off(off);
    const std::vector<double> rates = decode_rates(*session_, options_.window, options_.repeat);
    write(off, "decode", 0, options_.window, depth, rates, base);
  }

  void write(const std::string& off, const std::string& phase, std::int64_t n_prompt, std::int64_t n_gen,
             std::int64_t n_depth, const std::vector<double>& rates, std::map<std::string, double>& base) {
    const std::string key = phase + std::to_string(n_depth);
    ResultTable::Row row = table_.row();
    set_run_text(row, options_, desc_);
    row.set("context", options_.context).set("n_batch", options_.chunk).set("cache", options_.caches.front());
    row.set("off", join_gate_up_ ? off : std::string(kGateUp)).set("phase", phase);
    row.set("n_prompt", n_prompt).set("n_gen", n_gen).set("n_depth", n_depth);
    const double us = 1e6 / set_rates(row, rates);
    if (off == kNone) base.emplace(key, us);
    if (base.contains(key)) row.set("time_ratio_to_on", us / base.at(key));
    row.commit();
  }

  const Options& options_;
  ResultTable& table_;
  const std::string& desc_;
  bool join_gate_up_;
  CudaSettings settings_;
  std::unique_ptr<CudaModel> model_;
  std::unique_ptr<CudaSession> session_;
  std::vector<std::int32_t> ids_;
};

void add_options(CLI::App& app, Options& options) {
  const CLI::Range tokens(std::int64_t{1}, std::int64_t{1} << 24);
  const std::vector<std::string> known = options.off;
  add_model(app, options);
  add_cache(app, options);
  app.add_option("--off", options.off, "What is switched off, one at a time")
      ->delimiter(',')
      ->check(CLI::IsMember(known))
      ->capture_default_str();
  app.add_option("--depths", options.depths, "Depths at which decode is measured, increasing")
      ->delimiter(',')
      ->check(tokens)
      ->capture_default_str();
  app.add_option("--context", options.context, "Positions that the caches hold: what a lost clamp walks over")
      ->check(tokens)
      ->capture_default_str();
  app.add_option("--chunk", options.chunk, "Tokens of the prompt, and of a chunk")
      ->check(tokens)
      ->capture_default_str();
  app.add_option("--window", options.window, "Tokens decoded at a time; the caches can take back so many")
      ->check(CLI::Range(std::int64_t{1}, kMaxRewind - 1))
      ->capture_default_str();
  app.add_option("--repeat", options.repeat, "Windows, and runs of the prompt")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  add_ids(app, options);
  add_seed(app, options);
  add_out(app, options);
  add_quiet(app, options);
}

void run(int argc, char** argv) {
  CLI::App app(
      "Rates of decode at each depth and of a prompt of one chunk with everything on (`none` is off), and then with "
      "one "
      "thing switched off at a time: the slow path that gives the same tokens up to rounding. time_ratio_to_on is the "
      "time a token takes, over that with everything on. Needs a CUDA device.");
  Options options;
  add_options(app, options);
  parse(app, argc, argv);
  require(std::ranges::is_sorted(options.depths) && !options.depths.empty(), "--depths: need increasing depths");

  const RunInfo info = device_run_info("ablation", argc, argv, options.seed);
  ResultTable table(result_path(options, info), info, kParameters, kMeasures);
  const std::string desc = model_desc(options.model);
  std::map<std::string, double> base;
  std::vector<std::string> live = {kNone};
  for (const std::string& name : options.off) {
    if (name != kGateUp) live.push_back(name);
  }
  Run(options, table, desc, true).run(live, base);
  // "none" of a model that was loaded with gate and up apart.
  if (std::ranges::find(options.off, kGateUp) != options.off.end()) Run(options, table, desc, false).run({kNone}, base);
  table.print(std::cout, {"off", "phase", "n_prompt", "n_gen", "n_depth", "avg_ts", "stddev_ts", "time_ratio_to_on"});
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
