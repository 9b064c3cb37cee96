// SPDX-License-Identifier: Apache-2.0
#include "gemma4/model/accuracy.hpp"

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <map>
#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/accuracy_options.hpp"
#include "experiments/support/model_source.hpp"
#include "experiments/support/prefix_sessions.hpp"
#include "experiments/support/run_text.hpp"
#include "gemma4/model/accuracy_case.hpp"
#include "gemma4/model/trajectory.hpp"
#include "gemma4/plan/cache_bytes.hpp"
#include "gemma4/text/id_file.hpp"

/// What does a cache format cost in accuracy?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

const std::vector<std::string> kParameters = {"model", "backend", "text",  "cache", "ring", "base",
                                              "chunk", "context", "range", "off",   "plan"};
const std::vector<std::string> kMeasures = {
    // of predictions, and of key recall
    "n_position", "nll", "kl_mean", "kl_median", "kl_p99", "kl_p999", "kl_max", "same_top", "dp_rms", "cosine",
    "cosine_min", "seconds", "recall_correct", "recall_total",
    // what it takes
    "bytes_per_token", "allocated_bytes_per_token", "ring_bytes", "allocated_ring_bytes", "kl_noise", "dominated_by",
    // of greedy texts
    "n_text", "first_difference", "first_difference_least", "agreement"};
const std::vector<std::string> kShown = {
    "text",     "cache",  "context", "range",   "bytes_per_token", "nll",          "kl_mean",      "kl_p99",
    "same_top", "dp_rms", "cosine",  "seconds", "recall_correct",  "recall_total", "dominated_by", "first_difference",
    "agreement"};

class Accuracy {
 public:
  Accuracy(const AccuracyOptions& options, ResultTable& table)
      : options_(options),
        table_(table),
        source_(options, first_wish(options)),
        sessions_(options.session, options.model) {
    for (const std::string& name : options.caches) {
      const AccuracyCase wanted = parse_accuracy_case(name);
      require(wanted.chunk <= options.chunk, "case '", name, "': its chunk is longer than --chunk ", options.chunk);
      cases_.push_back(wanted);
    }
  }

  /// One pass over the longest context serves all: a position's prediction does not depend on what follows it.
  void run_text() {
    const std::int64_t longest = *std::ranges::max_element(options_.contexts);
    const Traces traces = run(longest, options_.chunk, [&](auto& backends, auto& ids, auto&& on_chunk) {
      return measure_accuracy<AnyBackend>(backends, ids, longest, options_.chunk, on_chunk);
    });
    for (const std::int64_t context : options_.contexts) write_context(context, longest, traces);
  }

  /// The last positions before each depth, for a model whose logits are too wide to look at all of them.
  void run_depths() {
    const std::vector<std::int64_t> positions = positions_before(options_.depths, options_.window);
    const auto n_row = static_cast<std::int64_t>(positions.size());
    const Traces traces = run(options_.depths.back(), n_row, [&](auto& backends, auto& ids, auto&& on_chunk) {
      return measure_positions<AnyBackend>(backends, ids, positions, options_.chunk, on_chunk, start_of(ids));
    });
    for (const auto& [wanted, trace] : traces) {
      for (const std::int64_t depth : options_.depths) {
        const auto begin =
            static_cast<std::size_t>(std::ranges::lower_bound(positions, depth - options_.window) - positions.begin());
        const auto part = std::span(trace.positions).subspan(begin, static_cast<std::size_t>(options_.window));
        ResultTable::Row line = row(text_name(options_), wanted, depth, {depth - options_.window, depth});
        set_measures(line, summarise(part));
        line.commit();
      }
    }
  }

  void run_recall(const std::filesystem::path& path) {
    const RecallTask task = read_recall_task(path, source_.config().vocab);
    const auto n_document = static_cast<std::int64_t>(task.documents.size());
    for (const AccuracyCase& wanted : cases_) {
      const auto backend = make_backend(wanted, task.document_len, options_.chunk);
      const std::int64_t chunk = std::min(options_.chunk, backend->max_chunk());
      Progress progress("recall " + wanted.name(), n_document * task.document_len,
                        progress_options(options_, "tokens"));
      const RecallResult result = or_failed(path.filename().string(), {wanted}, task.document_len, [&] {
        return measure_recall(*backend, task, chunk, [&](std::int64_t done) { progress.update(done); });
      });
      progress.finish();
      row(path.filename().string(), wanted, task.document_len, {0, task.document_len})
          .set("recall_correct", result.correct)
          .set("recall_total", result.total)
          .commit();
    }
  }

  /// Greedy texts from prompts of the text, each against the base's.
  void run_trajectories() {
    const std::vector<std::int32_t> ids = options_.ids.empty()
                                              ? text_ids(options_, source_.config().vocab, options_.prompt_len)
                                              : read_ids(options_.ids, source_.config().vocab);
    const TrajectoryTask task = trajectory_task(ids, options_.n_prompt, options_.prompt_len, options_.trajectory);
    const auto base = texts(base_case(), task);
    for (const AccuracyCase& wanted : cases_) {
      const TrajectoryAgreement result = compare_texts(wanted == base_case() ? base : texts(wanted, task), base);
      for (const PositionRange& range : position_ranges(options_.trajectory, {16, 64, 256, 1024, 4096})) {
        row(text_name(options_) + " greedy", wanted, options_.prompt_len, range)
            .set("n_text", options_.n_prompt)
            .set("first_difference", result.median_difference())
            .set("first_difference_least", *std::ranges::min_element(result.first_difference))
            .set("agreement", result.mean_agreement(range.begin, range.end))
            .commit();
      }
    }
  }

 private:
  using Traces = std::vector<std::pair<AccuracyCase, AccuracyTrace>>;

  [[nodiscard]] static BackendWish first_wish(const AccuracyOptions& options) {
    std::int64_t longest = 1;
    if (!options.ids.empty() && !options.contexts.empty()) longest = *std::ranges::max_element(options.contexts);
    if (!options.depths.empty()) longest = std::max(longest, options.depths.back());
    return {.cache = parse_cache_spec(options.base),
            .context = longest,
            .max_chunk = options.chunk,
            .policy = options.policy()};
  }
  [[nodiscard]] AccuracyCase base_case() const { return {.cache = parse_cache_spec(options_.base)}; }
  /// The base and the cases, each once.
  [[nodiscard]] std::vector<AccuracyCase> all_cases() const {
    std::vector<AccuracyCase> all = {base_case()};
    for (const AccuracyCase& wanted : cases_) {
      if (std::ranges::find(all, wanted) == all.end()) all.push_back(wanted);
    }
    return all;
  }

  /// With --session: behind what each case has in its file, or puts there.
  [[nodiscard]] AccuracyStart<AnyBackend> start_of(std::span<const std::int32_t> ids) const {
    if (!sessions_.is_asked()) return {};
    const auto prefix = ids.first(static_cast<std::size_t>(options_.prefix()));
    return {.position = options_.prefix(), .bring = [this, prefix](std::size_t b, Model<AnyBackend>& model) {
              sessions_.bring(model, all_cases()[b], prefix, options_.chunk);
            }};
  }

  /// Runs base and cases side by side; `measure(backends, ids, on_chunk)`. The cases that were asked for come back.
  template <class TMeasure>
  [[nodiscard]] Traces run(std::int64_t longest, std::int64_t n_logit_row, TMeasure&& measure) {
    const std::vector<std::int32_t> ids = text_ids(options_, source_.config().vocab, longest + 1);
    const std::vector<AccuracyCase> all = all_cases();
    std::vector<std::unique_ptr<AnyBackend>> backends;
    std::vector<AnyBackend*> borrowed;
    for (const AccuracyCase& one : all) {
      backends.push_back(make_backend(one, longest, n_logit_row));
      borrowed.push_back(backends.back().get());
    }
    Progress progress("accuracy", longest * static_cast<std::int64_t>(all.size()),
                      progress_options(options_, "tokens"));
    std::vector<AccuracyTrace> traces = or_failed(text_name(options_), all, longest, [&] {
      return measure(borrowed, ids, [&](std::int64_t done) { progress.update(done); });
    });
    progress.finish();
    Traces wanted;
    for (std::size_t b = 0; b < all.size(); ++b) {
      if (std::ranges::find(cases_, all[b]) != cases_.end()) wanted.emplace_back(all[b], std::move(traces[b]));
    }
    return wanted;
  }

  /// measure(); where that ends in what is no number, its cache has a row that says so.
  template <class TMeasure>
  [[nodiscard]] std::invoke_result_t<TMeasure&> or_failed(const std::string& text,
                                                          const std::vector<AccuracyCase>& cases, std::int64_t context,
                                                          TMeasure&& measure) {
    try {
      return measure();
    } catch (const NotFiniteError& error) {
      row(text, cases[error.backend], context, {0, context}).fail(error.what());
      throw std::runtime_error(concat("cache ", cases[error.backend].name(), ": ", error.what()));
    }
  }

  [[nodiscard]] std::unique_ptr<AnyBackend> make_backend(const AccuracyCase& wanted, std::int64_t context,
                                                         std::int64_t n_logit_row) {
    auto backend = source_.make({.cache = with_seed(wanted.cache, options_.seed),
                                 .context = context,
                                 .max_chunk = wanted.chunk > 0 ? wanted.chunk : options_.chunk,
                                 .n_logit_row = n_logit_row,
                                 .policy = policy_of(wanted),
                                 .ring = with_seed(wanted.ring, options_.seed)});
    const std::vector<StepPlan> plans = backend->step_plans();
    show_plans(options_, concat(wanted.name(), " at ", context), plans);
    plans_[wanted.name()] = digest(plans);
    allocated_[wanted.name()] = backend->cache_bytes();
    return backend;
  }

  [[nodiscard]] ExecutionPolicy policy_of(const AccuracyCase& wanted) const {
    std::vector<std::string> off = options_.off;
    off.insert(off.end(), wanted.off.begin(), wanted.off.end());
    return policy_without(off);
  }

  [[nodiscard]] std::vector<std::vector<std::int32_t>> texts(const AccuracyCase& wanted, const TrajectoryTask& task) {
    const auto backend = make_backend(wanted, task.context(), 1);
    const std::int64_t chunk = std::min(options_.chunk, backend->max_chunk());
    PromptReader<AnyBackend> read;
    if (sessions_.is_asked()) {
      read = [&](Model<AnyBackend>& model, auto prompt) { sessions_.bring(model, wanted, prompt, chunk); };
    }
    Progress progress("texts " + wanted.name(), options_.n_prompt * options_.trajectory,
                      progress_options(options_, "tokens"));
    auto written = or_failed(text_name(options_) + " greedy", {wanted}, options_.prompt_len, [&] {
      return greedy_texts(
          *backend, task, chunk, [&](std::int64_t done) { progress.update(done); }, read);
    });
    progress.finish();
    return written;
  }

  ResultTable::Row row(const std::string& text, const AccuracyCase& wanted, std::int64_t context,
                       const PositionRange& range) {
    ResultTable::Row row = table_.row();
    row.set("model", options_.model.filename().string())
        .set("backend", options_.backend)
        .set("text", text)
        .set("cache", wanted.name())
        .set("ring", to_string(wanted.ring))
        .set("base", options_.base)
        .set("chunk", wanted.chunk > 0 ? wanted.chunk : options_.chunk)
        .set("context", context)
        .set("range", range.name());
    set_run_plan(row, policy_of(wanted), plans_[wanted.name()]);
    return row;
  }

  static void set_measures(ResultTable::Row& line, const AccuracySummary& summary) {
    line.set("n_position", summary.count)
        .set("nll", summary.nll)
        .set("kl_mean", summary.kl_mean)
        .set("kl_median", summary.kl_median)
        .set("kl_p99", summary.kl_p99)
        .set("kl_p999", summary.kl_p999)
        .set("kl_max", summary.kl_max)
        .set("same_top", summary.same_top)
        .set("dp_rms", summary.dp_rms)
        .set("cosine", summary.cosine)
        .set("cosine_min", summary.cosine_min);
  }

  /// What the cache of the whole context takes, and whether another of these rows takes no more and errs less.
  void set_bytes(ResultTable::Row& line, const CaseCost& cost, std::int64_t longest) {
    const CacheBytes allocated = allocated_[cost.of.name()];
    line.set("bytes_per_token", cost.full_bytes_per_token())
        .set("allocated_bytes_per_token", static_cast<double>(allocated.full) / static_cast<double>(longest))
        .set("ring_bytes", cost.idea.sliding)
        .set("allocated_ring_bytes", allocated.sliding)
        .set("kl_noise", cost.noise)
        .set("dominated_by", cost.dominated_by);
  }

  void write_context(std::int64_t context, std::int64_t longest, const Traces& traces) {
    std::vector<CaseCost> costs;
    for (const auto& [wanted, trace] : traces) {
      const auto seen = std::span(trace.positions).first(static_cast<std::size_t>(context));
      costs.push_back({.of = wanted,
                       .idea = idea_bytes(source_.config(), wanted.cache, wanted.ring, context),
                       .context = context,
                       .kl = summarise(seen).kl_mean});
    }
    judge_costs(costs, base_case());
    for (std::size_t i = 0; i < traces.size(); ++i) {
      const auto& [wanted, trace] = traces[i];
      for (const PositionRange& range : position_ranges(context)) {
        ResultTable::Row line = row(text_name(options_), wanted, context, range);
        set_measures(line, summarise(std::span(trace.positions)
                                         .subspan(static_cast<std::size_t>(range.begin),
                                                  static_cast<std::size_t>(range.end - range.begin))));
        if (range.begin == 0 && range.end == context) {
          line.set("seconds", trace.forward_s[static_cast<std::size_t>(context) - 1]);
          set_bytes(line, costs[i], longest);
        }
        line.commit();
      }
    }
  }

  const AccuracyOptions& options_;
  ResultTable& table_;
  ModelSource source_;
  PrefixSessions sessions_;
  std::vector<AccuracyCase> cases_;
  std::map<std::string, std::string> plans_;     ///< digests, by case
  std::map<std::string, CacheBytes> allocated_;  ///< by case, of the longest context
};

int run(int argc, char** argv) {
  CLI::App app(
      "What a cache format costs in accuracy: next-token predictions over a text, each beside those of the base cache, "
      "and key recall. One row per case, context or recall file, and position range.");
  AccuracyOptions options;
  add_accuracy_options(app, options);
  parse(app, argc, argv);
  if (options.is_shelf) take_shelf(app, options);
  check_accuracy_options(options);

  const RunInfo info = backend_run_info(options, options.is_shelf ? "shelf" : "accuracy", argc, argv);
  run_table(options, info, {kParameters, kMeasures, kShown}, [&](ResultTable& table) {
    Accuracy accuracy(options, table);
    if (options.trajectory > 0) {
      accuracy.run_trajectories();
    } else if (!options.depths.empty()) {
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
