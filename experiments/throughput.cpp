// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <iostream>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/cuda_model.hpp"
#include "experiments/support/rates.hpp"
#include "experiments/support/run_text.hpp"
#include "experiments/support/text_session.hpp"
#include "gemma4/plan/step_bytes.hpp"

/// How fast is the model at a depth, and in how much memory?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

struct Options : DriverOptions, SessionOptions {
  Options() { caches = {"tq4", "bf16"}; }
  std::vector<std::int64_t> prompts = {512, 2048};
  std::vector<std::int64_t> depths = {512, 2048, 8192, 32768, 65536, 130048};
  std::vector<std::string> modes = {"graph", "eager"};
  std::int64_t context = 131072;
  std::int64_t chunk = 2048;
  std::int64_t window = 60;
  std::int64_t repeat = 4;
};

const std::vector<std::string> kParameters = {"model",  "model_desc", "text", "context", "n_batch",
                                              "type_k", "type_v",     "mode", "phase",   "n_prompt",
                                              "n_gen",  "n_depth",    "off",  "plan"};
const std::vector<std::string> kMeasures = {
    "avg_ts",      "stddev_ts",     "n_sample",          "us_a_token",      "read_bytes", "copy_gb_per_s",
    "of_roofline", "planned_bytes", "peak_device_bytes", "load_peak_bytes", "load_s"};
const std::vector<std::string> kShown = {
    "type_k",    "mode",        "phase",         "n_prompt",          "n_gen", "n_depth", "avg_ts",
    "stddev_ts", "of_roofline", "planned_bytes", "peak_device_bytes", "load_s"};

/// What a decode step is held against: the bytes that it must read, at the rate of a copy in the same run.
struct Roofline {
  std::vector<ModelTensor> tensors;
  double copy_gb_per_s = 0;
};

/// One cache format: one sequence that grows from depth to depth, its cache filled by prefill alone. What is decoded at
/// a depth is taken back before the prompt goes on.
class Run {
 public:
  Run(const Options& options, ResultTable& table, const CudaModel& model, const Roofline& roofline, std::string cache,
      std::string desc)
      : options_(options),
        table_(table),
        model_(model),
        roofline_(roofline),
        cache_(std::move(cache)),
        desc_(std::move(desc)) {
    const std::int64_t deepest = *std::max_element(options.depths.begin(), options.depths.end());
    const std::int64_t longest = std::max(deepest, *std::max_element(options.prompts.begin(), options.prompts.end()));
    ids_ = text_ids(options, model.config().vocab, std::min(longest + options.chunk, options.context));
    spec_ = with_seed(parse_cache_spec(cache_), options.seed);
    session_ = model.make_session({.cache = spec_,
                                   .context = options.context,
                                   .max_chunk = options.chunk,
                                   .policy = options.policy(),
                                   .checkpoints = options.kept()});
    fill_.emplace(options.session, options.model, ids_);
    show_plans(options, cache_, session_->step_plans());
    plan_ = digest(session_->step_plans());
  }

  /// A cache whose numbers are none has a row that says so.
  void run() {
    try {
      measure();
    } catch (const NotFiniteError& error) {
      row().fail(error.what());
      throw std::runtime_error(concat("cache ", cache_, ": ", error.what()));
    }
  }

 private:
  void measure() {
    Progress progress("throughput " + cache_, options_.depths.back(), progress_options(options_, "tokens"));
    for (const std::int64_t n_prompt : options_.prompts) run_prompt(n_prompt);
    session_->reset();
    Stretch whole;
    for (const std::int64_t depth : options_.depths) {
      fill(depth, whole, progress);
      if (whole.n_token == depth) write("prefill", {.n_prompt = depth}, {whole.tokens_per_second()});
      for (const std::string& mode : options_.modes) run_decode(mode, depth);
      run_chunk(depth, whole);
    }
    progress.finish();
  }

  struct Case {
    std::int64_t n_prompt = 0, n_gen = 0, n_depth = 0;
    std::string mode = {};
  };

  void note_memory() { peak_bytes_ = std::max(peak_bytes_, device_bytes_in_use()); }

  [[nodiscard]] std::span<const std::int32_t> ids(std::int64_t begin, std::int64_t end) const {
    return std::span(ids_).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
  }

  void run_prompt(std::int64_t n_prompt) {
    const std::vector<double> rates = prompt_rates(*session_, ids(0, n_prompt), options_.chunk, options_.repeat);
    note_memory();
    write("prompt", {.n_prompt = n_prompt}, rates);
  }

  void fill(std::int64_t depth, Stretch& whole, Progress& progress) {
    const std::int64_t begin = session_->position();
    if (fill_->n_token() >= depth) {
      take_fill(depth);
    } else if (depth > begin) {
      add(whole, session_->prefill(ids(begin, depth), options_.chunk,
                                   [&](std::int64_t done) { progress.update(begin + done); }));
    }
    note_memory();
    if (depth == options_.depths.back()) fill_->make(*session_);
  }

  /// The caches at a depth, from the file, and not by prefill: no rate comes of it.
  void take_fill(std::int64_t depth) {
    session_->restore(fill_->file(), fill_->model_hash());
    if (session_->position() > depth) session_->rewind(session_->position() - depth);
  }

  void run_decode(const std::string& mode, std::int64_t depth) {
    ExecutionPolicy policy = options_.policy();
    policy.graph = mode == "graph";
    session_->set_policy(policy);
    const std::vector<double> rates = decode_rates(*session_, options_.window, options_.repeat);
    note_memory();
    write("decode", {.n_gen = options_.window, .n_depth = depth, .mode = mode}, rates);
  }

  /// The next chunk of the prompt by itself: as much of one as the context has room for.
  void run_chunk(std::int64_t depth, Stretch& whole) {
    const std::int64_t end = std::min(depth + options_.chunk, static_cast<std::int64_t>(ids_.size()));
    if (end == depth) return;
    const Stretch took = session_->prefill(ids(depth, end), options_.chunk, {});
    add(whole, took);
    write("chunk", {.n_prompt = end - depth, .n_depth = depth}, {took.tokens_per_second()});
  }

  static void add(Stretch& sum, const Stretch& part) {
    sum.n_token += part.n_token;
    sum.us += part.us;
  }

  [[nodiscard]] ResultTable::Row row() {
    ResultTable::Row row = table_.row();
    set_run_text(row, options_, desc_);
    set_run_plan(row, options_.policy(), plan_);
    row.set("context", options_.context).set("n_batch", options_.chunk).set("type_k", cache_).set("type_v", cache_);
    return row;
  }

  void write(const std::string& phase, const Case& what, const std::vector<double>& rates) {
    ResultTable::Row row = this->row();
    if (!what.mode.empty()) row.set("mode", what.mode);
    row.set("phase", phase).set("n_prompt", what.n_prompt).set("n_gen", what.n_gen).set("n_depth", what.n_depth);
    const double mean = set_rates(row, rates);
    if (phase == "decode") {
      const double bytes = mean_step_read_bytes(model_.config(), roofline_.tensors, spec_, what.n_depth, what.n_gen);
      row.set("read_bytes", static_cast<std::int64_t>(bytes)).set("copy_gb_per_s", roofline_.copy_gb_per_s);
      row.set("of_roofline", 1e-9 * bytes * mean / roofline_.copy_gb_per_s);
    }
    row.set("planned_bytes", session_->plan().total_bytes()).set("peak_device_bytes", peak_bytes_);
    row.set("load_peak_bytes", model_.load_peak_bytes()).set("load_s", model_.load_seconds()).commit();
  }

  const Options& options_;
  ResultTable& table_;
  const CudaModel& model_;
  const Roofline& roofline_;
  std::string cache_, desc_, plan_;
  CacheSpec spec_;
  std::vector<std::int32_t> ids_;
  std::unique_ptr<CudaSession> session_;
  std::int64_t peak_bytes_ = 0;
  std::optional<TextSession> fill_;
};

void add_options(CLI::App& app, Options& options) {
  add_model(app, options);
  add_caches(app, options);
  add_tokens(app, "--prompts", options.prompts, "Prompts of their own, in tokens")->delimiter(',');
  add_tokens(app, "--depths", options.depths, "Depths at which decode and the next chunk are measured, increasing")
      ->delimiter(',');
  app.add_option("--modes", options.modes, "Decode steps replayed from a graph, launched one by one, or both")
      ->delimiter(',')
      ->check(CLI::IsMember({"graph", "eager"}))
      ->capture_default_str();
  add_tokens(app, "--context", options.context, "Positions that the caches hold");
  add_tokens(app, "--chunk", options.chunk, "Prompt tokens that go through the model at a time");
  add_whole(app, "--window", options.window, "Tokens decoded at a time; the caches can take back so many",
            {1, kMaxRewind - 1});
  add_session_at_depths(app, options);
  add_whole(app, "--repeat", options.repeat, "Windows at a depth, and runs of a prompt", {1, 1000});
  add_policy(app, options);
  add_ids(app, options);
  add_seed(app, options);
  add_out(app, options);
  add_quiet(app, options);
}

void measure(const Options& options, ResultTable& table) {
  const std::string desc = model_desc(options.model);
  const Roofline roofline{.tensors = model_tensors(GgufFile::open(options.model)),
                          .copy_gb_per_s = device_copy_gb_per_s()};  // before the model takes the memory
  CudaSettings planned{.cache = parse_cache_spec(options.caches.front()),
                       .context = options.context,
                       .max_chunk = options.chunk,
                       .policy = options.policy()};
  const auto model = load_cuda_model(options.model, {.progress = progress_options(options, "B")}, planned);
  for (const std::string& cache : options.caches) Run(options, table, *model, roofline, cache, desc).run();
}

void run(int argc, char** argv) {
  CLI::App app(
      "Rates of prefill and decode at each depth, with the cache filled by prefill, and device memory, planned and "
      "measured. One row per cache, depth and phase: `prompt` is a prompt of its own, `prefill` the whole prompt up to "
      "here, `chunk` the next chunk at a depth, `decode` a window of tokens at a depth, with the share of the "
      "roofline: the "
      "bytes that a token must read, at the rate of a copy. Needs a CUDA device.");
  Options options;
  add_options(app, options);
  parse(app, argc, argv);
  require(std::ranges::is_sorted(options.depths) && !options.depths.empty(), "--depths: need increasing depths");
  require(options.depths.back() + options.window <= options.context, "--depths ", options.depths.back(),
          ": a window of ", options.window, " does not fit the context of ", options.context);
  require_one_cache(options, options);
  const RunInfo info = device_run_info("throughput", argc, argv, options.seed);
  run_table(options, info, {kParameters, kMeasures, kShown}, [&](ResultTable& table) { measure(options, table); });
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
