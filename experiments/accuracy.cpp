// SPDX-License-Identifier: Apache-2.0
#include "gemma4/model/accuracy.hpp"

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/model_source.hpp"
#include "experiments/support/run_text.hpp"

/// What does a cache format cost in accuracy?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

struct Options : DriverOptions {
  Options() {
    caches = {"bf16", "tq4"};
    contexts = {512, 1024, 2048, 4096, 8192};
  }
  std::string base = "bf16";
  std::int64_t chunk = 512;
  std::vector<std::int64_t> depths;
  std::int64_t window = 32;
};

const std::vector<std::string> kParameters = {"model", "backend", "text",  "cache", "base",
                                              "chunk", "context", "range", "off",   "plan"};
const std::vector<std::string> kMeasures = {"n_position", "nll",      "kl_mean",        "kl_p99",
                                            "kl_max",     "same_top", "dp_rms",         "cosine",
                                            "cosine_min", "seconds",  "recall_correct", "recall_total"};
const std::vector<std::string> kShown = {"text",    "cache",          "context",     "range",  "nll",
                                         "kl_mean", "kl_p99",         "same_top",    "dp_rms", "cosine",
                                         "seconds", "recall_correct", "recall_total"};

class Accuracy {
 public:
  Accuracy(const Options& options, ResultTable& table)
      : options_(options), table_(table), source_(options, first_wish(options)) {}

  /// One pass over the longest context serves all: a position's prediction does not depend on what follows it.
  void run_text() {
    const std::int64_t longest = *std::ranges::max_element(options_.contexts);
    const auto traces = run(longest, options_.chunk, [&](auto& backends, auto& ids, auto&& on_chunk) {
      return measure_accuracy<AnyBackend>(backends, ids, longest, options_.chunk, on_chunk);
    });
    for (const auto& [cache, trace] : traces) {
      for (const std::int64_t context : options_.contexts) write_context(cache, context, trace);
    }
  }

  /// The last positions before each depth, for a model whose logits are too wide to look at all of them.
  void run_depths() {
    const std::vector<std::int64_t> positions = positions_before(options_.depths, options_.window);
    const auto n_row = static_cast<std::int64_t>(positions.size());
    const auto traces = run(options_.depths.back(), n_row, [&](auto& backends, auto& ids, auto&& on_chunk) {
      return measure_positions<AnyBackend>(backends, ids, positions, options_.chunk, on_chunk);
    });
    for (const auto& [cache, trace] : traces) {
      for (const std::int64_t depth : options_.depths) {
        const auto begin =
            static_cast<std::size_t>(std::ranges::lower_bound(positions, depth - options_.window) - positions.begin());
        const auto part = std::span(trace.positions).subspan(begin, static_cast<std::size_t>(options_.window));
        ResultTable::Row line = row(text_name(options_), cache, depth, {depth - options_.window, depth});
        set_measures(line, summarise(part));
        line.commit();
      }
    }
  }

  void run_recall(const std::filesystem::path& path) {
    const RecallTask task = read_recall_task(path, source_.config().vocab);
    const auto n_document = static_cast<std::int64_t>(task.documents.size());
    for (const std::string& cache : options_.caches) {
      const auto backend = make_backend(cache, task.document_len, options_.chunk);
      Progress progress("recall " + cache, n_document * task.document_len, progress_options(options_, "tokens"));
      const RecallResult result = or_failed(path.filename().string(), {cache}, task.document_len, [&] {
        return measure_recall(*backend, task, options_.chunk, [&](std::int64_t done) { progress.update(done); });
      });
      progress.finish();
      row(path.filename().string(), cache, task.document_len, {0, task.document_len})
          .set("recall_correct", result.correct)
          .set("recall_total", result.total)
          .commit();
    }
  }

 private:
  using Traces = std::vector<std::pair<std::string, AccuracyTrace>>;

  [[nodiscard]] static BackendWish first_wish(const Options& options) {
    std::int64_t longest = 1;
    if (!options.ids.empty() && !options.contexts.empty()) longest = *std::ranges::max_element(options.contexts);
    if (!options.depths.empty()) longest = std::max(longest, options.depths.back());
    return {.cache = parse_cache_spec(options.base),
            .context = longest,
            .max_chunk = options.chunk,
            .policy = options.policy()};
  }

  /// Runs base and caches side by side; `measure(backends, ids, on_chunk)`. The caches that were asked for come back.
  template <class TMeasure>
  [[nodiscard]] Traces run(std::int64_t longest, std::int64_t n_logit_row, TMeasure&& measure) {
    const std::vector<std::int32_t> ids = text_ids(options_, source_.config().vocab, longest + 1);
    std::vector<std::string> caches = {options_.base};
    for (const std::string& cache : options_.caches) {
      if (std::ranges::find(caches, cache) == caches.end()) caches.push_back(cache);
    }
    std::vector<std::unique_ptr<AnyBackend>> backends;
    std::vector<AnyBackend*> borrowed;
    for (const std::string& cache : caches) {
      backends.push_back(make_backend(cache, longest, n_logit_row));
      borrowed.push_back(backends.back().get());
    }
    Progress progress("accuracy", longest * static_cast<std::int64_t>(caches.size()),
                      progress_options(options_, "tokens"));
    const std::vector<AccuracyTrace> traces = or_failed(text_name(options_), caches, longest, [&] {
      return measure(borrowed, ids, [&](std::int64_t done) { progress.update(done); });
    });
    progress.finish();
    Traces wanted;
    for (std::size_t b = 0; b < caches.size(); ++b) {
      if (std::ranges::find(options_.caches, caches[b]) != options_.caches.end()) {
        wanted.emplace_back(caches[b], traces[b]);
      }
    }
    return wanted;
  }

  /// measure(); where that ends in what is no number, its cache has a row that says so.
  template <class TMeasure>
  [[nodiscard]] std::invoke_result_t<TMeasure&> or_failed(const std::string& text,
                                                          const std::vector<std::string>& caches, std::int64_t context,
                                                          TMeasure&& measure) {
    try {
      return measure();
    } catch (const NotFiniteError& error) {
      row(text, caches[error.backend], context, {0, context}).fail(error.what());
      throw std::runtime_error(concat("cache ", caches[error.backend], ": ", error.what()));
    }
  }

  [[nodiscard]] std::unique_ptr<AnyBackend> make_backend(const std::string& cache, std::int64_t context,
                                                         std::int64_t n_logit_row) {
    const CacheSpec spec = with_seed(parse_cache_spec(cache), options_.seed);
    auto backend = source_.make({.cache = spec,
                                 .context = context,
                                 .max_chunk = options_.chunk,
                                 .n_logit_row = n_logit_row,
                                 .policy = options_.policy()});
    const std::vector<StepPlan> plans = backend->step_plans();
    show_plans(options_, concat(cache, " at ", context), plans);
    plans_[cache] = digest(plans);
    return backend;
  }

  ResultTable::Row row(const std::string& text, const std::string& cache, std::int64_t context,
                       const PositionRange& range) {
    ResultTable::Row row = table_.row();
    row.set("model", options_.model.filename().string())
        .set("backend", options_.backend)
        .set("text", text)
        .set("cache", cache)
        .set("base", options_.base)
        .set("chunk", options_.chunk)
        .set("context", context)
        .set("range", range.name());
    set_run_plan(row, options_.policy(), plans_[cache]);
    return row;
  }

  static void set_measures(ResultTable::Row& line, const AccuracySummary& summary) {
    line.set("n_position", summary.count)
        .set("nll", summary.nll)
        .set("kl_mean", summary.kl_mean)
        .set("kl_p99", summary.kl_p99)
        .set("kl_max", summary.kl_max)
        .set("same_top", summary.same_top)
        .set("dp_rms", summary.dp_rms)
        .set("cosine", summary.cosine)
        .set("cosine_min", summary.cosine_min);
  }

  void write_context(const std::string& cache, std::int64_t context, const AccuracyTrace& trace) {
    for (const PositionRange& range : position_ranges(context)) {
      ResultTable::Row line = row(text_name(options_), cache, context, range);
      set_measures(line, summarise(std::span(trace.positions)
                                       .subspan(static_cast<std::size_t>(range.begin),
                                                static_cast<std::size_t>(range.end - range.begin))));
      if (range.begin == 0 && range.end == context)
        line.set("seconds", trace.forward_s[static_cast<std::size_t>(context) - 1]);
      line.commit();
    }
  }

  const Options& options_;
  ResultTable& table_;
  ModelSource source_;
  std::map<std::string, std::string> plans_;  ///< digests, by cache
};

int run(int argc, char** argv) {
  CLI::App app(
      "What a cache format costs in accuracy: next-token predictions over a text, each beside those of the base cache, "
      "and key recall. One row per cache, context or recall file, and position range.");
  Options options;
  add_model(app, options);
  add_backend(app, options);
  add_caches(app, options);
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
  add_policy(app, options);
  add_seed(app, options);
  add_out(app, options);
  add_quiet(app, options);
  parse(app, argc, argv);
  require(!options.ids.empty() || !options.recall.empty() || !options.depths.empty(),
          "nothing to measure: give --ids, --recall or --depths");
  require(!options.contexts.empty(), "--contexts is empty");
  require(std::ranges::is_sorted(options.depths), "--depths: need increasing depths");

  const RunInfo info = backend_run_info(options, "accuracy", argc, argv);
  run_table(options, info, {kParameters, kMeasures, kShown}, [&](ResultTable& table) {
    Accuracy accuracy(options, table);
    if (!options.depths.empty()) {
      accuracy.run_depths();
    } else if (!options.ids.empty()) {
      accuracy.run_text();
    }
    for (const std::filesystem::path& path : options.recall) accuracy.run_recall(path);
  });
  return EXIT_SUCCESS;
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
