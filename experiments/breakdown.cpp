// SPDX-License-Identifier: Apache-2.0
#include <cstdint>
#include <iostream>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/cuda_model.hpp"
#include "experiments/support/run_text.hpp"

/// Where does the time go?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

struct Options : DriverOptions {
  Options() { caches = {"tq4"}; }
  std::vector<std::int64_t> depths = {512, 130048};
  std::int64_t context = 0;
  std::int64_t chunk = 2048;
  std::int64_t n_decode = 16;
};

const std::vector<std::string> kParameters = {"model",     "model_desc", "text",     "context", "n_batch",
                                              "cache",     "phase",      "n_prompt", "n_gen",   "n_depth",
                                              "component", "off",        "plan"};
const std::vector<std::string> kMeasures = {"us", "share", "n_call"};

class Run {
 public:
  Run(const Options& options, ResultTable& table, const CudaModel& model, const CudaSettings& settings,
      std::string desc)
      : options_(options),
        table_(table),
        cache_(to_string(settings.cache)),
        desc_(std::move(desc)),
        context_(settings.context),
        policy_(settings.policy),
        session_(model.make_session(settings)),
        ids_(text_ids(options, model.config().vocab, settings.context)) {
    show_plans(options, cache_, session_->step_plans());
    plan_ = digest(session_->step_plans());
  }

  void run() {
    Progress progress("breakdown " + cache_, options_.depths.back(), progress_options(options_, "tokens"));
    for (const std::int64_t depth : options_.depths) {
      const std::int64_t begin = session_->position();
      (void)session_->prefill(ids(begin, depth), options_.chunk,
                              [&](std::int64_t done) { progress.update(begin + done); });
      profile_decode(depth);
      profile_chunk(depth);
    }
    progress.finish();
  }

 private:
  [[nodiscard]] std::span<const std::int32_t> ids(std::int64_t begin, std::int64_t end) const {
    return std::span(ids_).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
  }

  void profile_decode(std::int64_t depth) {
    (void)session_->decode(2, {}, {});  // loads the kernels
    session_->rewind(2);
    write("decode", 0, options_.n_decode, depth,
          session_->profile([&] { (void)session_->decode(options_.n_decode, {}, {}); }));
    session_->rewind(options_.n_decode);
  }

  void profile_chunk(std::int64_t depth) {
    write("chunk", options_.chunk, 0, depth,
          session_->profile([&] { (void)session_->prefill(ids(depth, depth + options_.chunk), options_.chunk, {}); }));
  }

  /// Microseconds are of one token decoded, or of the whole chunk.
  void write(const std::string& phase, std::int64_t n_prompt, std::int64_t n_gen, std::int64_t n_depth,
             const std::vector<ComponentTime>& times) {
    double total = 0;
    for (const ComponentTime& time : times) total += time.us;
    const double n_step = n_gen > 0 ? static_cast<double>(n_gen) : 1.0;
    const auto row = [&](const std::string& component, double us) {
      ResultTable::Row row = table_.row();
      set_run_text(row, options_, desc_);
      set_run_plan(row, policy_, plan_);
      row.set("context", context_).set("n_batch", options_.chunk).set("cache", cache_).set("phase", phase);
      row.set("n_prompt", n_prompt).set("n_gen", n_gen).set("n_depth", n_depth).set("component", component);
      row.set("us", us / n_step).set("share", us / total);
      return row;
    };
    for (const ComponentTime& time : times) {
      row(time.name, time.us).set("n_call", static_cast<double>(time.n_call) / n_step).commit();
    }
    row("total", total).commit();
  }

  const Options& options_;
  ResultTable& table_;
  std::string cache_, desc_, plan_;
  std::int64_t context_;
  ExecutionPolicy policy_;
  std::unique_ptr<CudaSession> session_;
  std::vector<std::int32_t> ids_;
};

void measure(const Options& options, ResultTable& table) {
  const auto settings = [&](const std::string& cache) {
    CudaSettings result{.cache = with_seed(parse_cache_spec(cache), options.seed),
                        .max_chunk = options.chunk,
                        .policy = options.policy()};
    result.policy.graph = false;
    result.context = options.context > 0 ? options.context : options.depths.back() + options.chunk;
    return result;
  };
  const auto model =
      load_cuda_model(options.model, {.progress = progress_options(options, "B")}, settings(options.caches.front()));
  for (const std::string& cache : options.caches) {
    Run(options, table, *model, settings(cache), model_desc(options.model)).run();
  }
}

void run(int argc, char** argv) {
  CLI::App app(
      "Time of every component in a decode step and in a prefill chunk at given depths, from events around each of "
      "them. "
      "Such a run launches kernels one by one and lets none overlap with the next: its total is longer than a step "
      "takes "
      "(see throughput), and shares are what it is for. Needs a CUDA device.");
  Options options;
  add_model(app, options);
  add_caches(app, options);
  add_tokens(app, "--depths", options.depths, "Depths, increasing")->delimiter(',');
  add_tokens(app, "--context", options.context, "Positions that the caches hold; 0: the last depth and one chunk", 0);
  add_tokens(app, "--chunk", options.chunk, "Tokens of a chunk");
  add_whole(app, "--decode-tokens", options.n_decode, "Decode steps that are averaged", {1, kMaxRewind - 1});
  add_policy(app, options);
  add_ids(app, options);
  add_seed(app, options);
  add_out(app, options);
  add_quiet(app, options);
  parse(app, argc, argv);
  require(!options.depths.empty(), "--depths: need at least one");
  for (std::size_t i = 1; i < options.depths.size(); ++i) {
    require(options.depths[i] >= options.depths[i - 1] + options.chunk, "--depths: ", options.depths[i], " after ",
            options.depths[i - 1], "; the chunk of ", options.chunk, " that is measured at a depth stays in the cache");
  }

  const RunInfo info = device_run_info("breakdown", argc, argv, options.seed);
  run_table(options, info,
            {kParameters, kMeasures, {"cache", "phase", "n_depth", "component", "us", "share", "n_call"}},
            [&](ResultTable& table) { measure(options, table); });
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
