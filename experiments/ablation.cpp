// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <iostream>
#include <map>
#include <memory>
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

struct Options : DriverOptions {
  Options() {
    caches = {"tq4"};
    for (const ExecutionSwitch& entry : kExecutionSwitches) off.emplace_back(entry.name);
  }
  std::vector<std::int64_t> depths = {512, 32768};
  std::int64_t context = 131072;
  std::int64_t chunk = 2048;
  std::int64_t window = 20;
  std::int64_t repeat = 5;
};

const std::vector<std::string> kParameters = {"model", "model_desc", "text",     "context", "n_batch", "cache",
                                              "off",   "phase",      "n_prompt", "n_gen",   "n_depth", "plan"};
const std::vector<std::string> kMeasures = {
    "avg_ts", "stddev_ts", "n_sample", "us_a_token", "time_ratio_to_on", "time_ratio_deviation", "acts"};

/// What is measured side by side: everything on, or one switch off.
struct Case {
  std::string name;
  ExecutionPolicy policy;

  [[nodiscard]] bool acts_in(Phase phase) const { return name == kNone || execution_switch(name).acts_in(phase); }
};

[[nodiscard]] Case case_of(const std::string& name) {
  return {name, name == kNone ? ExecutionPolicy{} : policy_without(std::vector<std::string>{name})};
}

/// One load of the model. The cases take turns, and each round begins with another of them: what the card does over
/// minutes falls on all alike. A ratio is of one round, and its deviation the scatter over rounds.
class Run {
 public:
  Run(const Options& options, ResultTable& table, const std::string& desc, const ExecutionPolicy& load)
      : options_(options),
        table_(table),
        desc_(desc),
        settings_{.cache = with_seed(parse_cache_spec(options.caches.front()), options.seed),
                  .context = options.context,
                  .max_chunk = options.chunk,
                  .policy = load},
        model_(load_cuda_model(options.model, {.progress = progress_options(options, "B")}, settings_)),
        session_(model_->make_session(settings_)),
        ids_(text_ids(options, model_->config().vocab, std::max(options.depths.back(), options.chunk))) {}

  /// @param cases all of one load. @param base rates of `none` of another load, by phase and depth; filled where empty
  void run(const std::vector<Case>& cases, std::map<std::string, std::vector<double>>& base) {
    const auto prompt = std::span(ids_).first(static_cast<std::size_t>(options_.chunk));
    measure(cases, Phase::kPrefill, 0, base,
            [&] { return prompt_rates(*session_, prompt, options_.chunk, 1).front(); });
    session_->reset();
    Progress progress("ablation", options_.depths.back(), progress_options(options_, "tokens"));
    for (const std::int64_t depth : options_.depths) {
      session_->set_policy(settings_.policy);
      const std::int64_t begin = session_->position();
      (void)session_->prefill(
          std::span(ids_).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(depth - begin)),
          options_.chunk, [&](std::int64_t done) { progress.update(begin + done); });
      measure(cases, Phase::kDecode, depth, base, [&] { return decode_rates(*session_, options_.window, 1).front(); });
    }
    progress.finish();
  }

 private:
  template <class TMeasure>
  void measure(const std::vector<Case>& cases, Phase phase, std::int64_t depth,
               std::map<std::string, std::vector<double>>& base, TMeasure&& measure_once) {
    std::vector<std::size_t> acting;
    for (std::size_t i = 0; i < cases.size(); ++i) {
      if (cases[i].acts_in(phase)) acting.push_back(i);
    }
    std::vector<std::vector<double>> rates(cases.size());
    std::vector<std::string> plans(cases.size());
    for (std::int64_t round = 0; round < options_.repeat; ++round) {
      for (std::size_t turn = 0; turn < acting.size(); ++turn) {
        const std::size_t i = acting[(turn + static_cast<std::size_t>(round)) % acting.size()];
        session_->set_policy(cases[i].policy);
        plans[i] = digest(session_->step_plans());
        rates[i].push_back(measure_once());
      }
    }
    const std::string key = concat(static_cast<int>(phase), ' ', depth);
    for (std::size_t i = 0; i < cases.size(); ++i) {
      if (cases[i].name == kNone) base.emplace(key, rates[i]);
    }
    for (std::size_t i = 0; i < cases.size(); ++i) write(cases[i], phase, depth, rates[i], base[key], plans[i]);
  }

  void write(const Case& what, Phase phase, std::int64_t depth, const std::vector<double>& rates,
             const std::vector<double>& base, const std::string& plan) {
    const bool decodes = phase == Phase::kDecode;
    ResultTable::Row row = table_.row();
    set_run_text(row, options_, desc_);
    row.set("context", options_.context).set("n_batch", options_.chunk).set("cache", options_.caches.front());
    row.set("off", what.name).set("phase", decodes ? "decode" : "prompt").set("plan", plan);
    row.set("n_prompt", decodes ? 0 : options_.chunk).set("n_gen", decodes ? options_.window : 0);
    row.set("n_depth", depth);
    if (rates.empty()) {  // the switch cannot act here, and a ratio would be a measurement of nothing
      row.set("acts", "n/a").commit();
      return;
    }
    set_rates(row, rates);
    std::vector<double> ratios;
    for (std::size_t i = 0; i < std::min(rates.size(), base.size()); ++i) ratios.push_back(base[i] / rates[i]);
    const SampleSummary ratio = summarise_samples(ratios);
    row.set("time_ratio_to_on", ratio.mean).set("acts", "yes");
    if (ratio.count > 1) row.set("time_ratio_deviation", ratio.deviation);
    row.commit();
  }

  const Options& options_;
  ResultTable& table_;
  const std::string& desc_;
  CudaSettings settings_;
  std::unique_ptr<CudaModel> model_;
  std::unique_ptr<CudaSession> session_;
  std::vector<std::int32_t> ids_;
};

void add_options(CLI::App& app, Options& options) {
  const std::vector<std::string> known = options.off;
  add_model(app, options);
  add_cache(app, options);
  app.add_option("--off", options.off, "What is switched off, one at a time")
      ->delimiter(',')
      ->check(CLI::IsMember(known))
      ->capture_default_str();
  add_tokens(app, "--depths", options.depths, "Depths at which decode is measured, increasing")->delimiter(',');
  add_tokens(app, "--context", options.context, "Positions that the caches hold: what a lost clamp walks over");
  add_tokens(app, "--chunk", options.chunk, "Tokens of the prompt, and of a chunk");
  add_whole(app, "--window", options.window, "Tokens decoded at a time; the caches can take back so many",
            {1, kMaxRewind - 1});
  add_whole(app, "--repeat", options.repeat, "Rounds: a window, or a run of the prompt, of every case in each",
            {1, 1000});
  add_ids(app, options);
  add_seed(app, options);
  add_out(app, options);
  add_quiet(app, options);
}

void measure(const Options& options, ResultTable& table) {
  const std::string desc = model_desc(options.model);
  std::vector<Case> live = {case_of(kNone)}, loaded;
  for (const std::string& name : options.off) {
    (execution_switch(name).scope == SwitchScope::kLoad ? loaded : live).push_back(case_of(name));
  }
  std::map<std::string, std::vector<double>> base;
  Run(options, table, desc, {}).run(live, base);
  // Decided when the model is loaded: measured behind the others, not in turn with them.
  for (const Case& what : loaded) Run(options, table, desc, what.policy).run({what}, base);
}

void run(int argc, char** argv) {
  CLI::App app(
      "Rates of decode at each depth and of a prompt of one chunk with everything on (`none` is off), and then with "
      "one "
      "thing switched off at a time: the slow path that gives the same tokens up to rounding. The cases take turns; "
      "time_ratio_to_on is the time a token takes over that with everything on in the same round, n/a where a switch "
      "cannot act. Needs a CUDA device.");
  Options options;
  add_options(app, options);
  parse(app, argc, argv);
  require(std::ranges::is_sorted(options.depths) && !options.depths.empty(), "--depths: need increasing depths");

  const RunInfo info = device_run_info("ablation", argc, argv, options.seed);
  run_table(
      options, info,
      {kParameters,
       kMeasures,
       {"off", "phase", "n_prompt", "n_gen", "n_depth", "avg_ts", "acts", "time_ratio_to_on", "time_ratio_deviation"}},
      [&](ResultTable& table) { measure(options, table); });
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
