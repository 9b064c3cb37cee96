// SPDX-License-Identifier: Apache-2.0
#include "gemma4/model/accuracy.hpp"

#include <algorithm>
#include <filesystem>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/reference_only.hpp"
#include "gemma4/id_file.hpp"
#include "reference/backend.hpp"

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
};

const std::vector<std::string> kParameters = {"model", "backend", "text", "cache", "base", "chunk", "context", "range"};
const std::vector<std::string> kMeasures = {"n_position",  "nll",    "kl_mean", "kl_p99",  "kl_max",
                                            "same_top",    "dp_rms", "cosine",  "seconds", "recall_correct",
                                            "recall_total"};

class Accuracy {
 public:
  Accuracy(const Options& options, ResultTable& table)
      : options_(options), table_(table), file_(GgufFile::open(options.model)), weights_(weights_from_gguf(file_)) {}

  /// One pass over the longest context serves all: a position's prediction does not depend on what follows it.
  void run_text() {
    const std::int64_t longest = *std::max_element(options_.contexts.begin(), options_.contexts.end());
    const std::vector<std::int32_t> ids = read_ids(options_.ids, weights_.config.vocab, longest + 1);
    require(static_cast<std::int64_t>(ids.size()) > longest, "--ids ", options_.ids.string(), ": ", ids.size(),
            " ids, context ", longest, " needs ", longest + 1);
    std::vector<std::string> caches = {options_.base};
    for (const std::string& cache : options_.caches) {
      if (std::find(caches.begin(), caches.end(), cache) == caches.end()) caches.push_back(cache);
    }
    std::vector<std::unique_ptr<reference::Backend<float>>> backends;
    std::vector<reference::Backend<float>*> borrowed;
    for (const std::string& cache : caches) {
      backends.push_back(make_backend(cache, longest));
      borrowed.push_back(backends.back().get());
    }
    Progress progress("accuracy", longest * static_cast<std::int64_t>(caches.size()),
                      progress_options(options_, "tokens"));
    const auto traces = measure_accuracy<reference::Backend<float>>(borrowed, ids, longest, options_.chunk,
                                                                    [&](std::int64_t done) { progress.update(done); });
    progress.finish();
    for (std::size_t b = 0; b < caches.size(); ++b) {
      const bool is_wanted =
          std::find(options_.caches.begin(), options_.caches.end(), caches[b]) != options_.caches.end();
      for (const std::int64_t context : options_.contexts) {
        if (is_wanted) write_context(caches[b], context, traces[b]);
      }
    }
  }

  void run_recall(const std::filesystem::path& path) {
    const RecallTask task = read_recall_task(path);
    const auto n_document = static_cast<std::int64_t>(task.documents.size());
    for (const std::string& cache : options_.caches) {
      const auto backend = make_backend(cache, task.document_len);
      Progress progress("recall " + cache, n_document * task.document_len, progress_options(options_, "tokens"));
      const RecallResult result =
          measure_recall(*backend, task, options_.chunk, [&](std::int64_t done) { progress.update(done); });
      progress.finish();
      row(path, cache, task.document_len, {0, task.document_len})
          .set("recall_correct", result.correct)
          .set("recall_total", result.total)
          .commit();
    }
  }

 private:
  [[nodiscard]] std::unique_ptr<reference::Backend<float>> make_backend(const std::string& cache,
                                                                        std::int64_t context) const {
    CacheSpec spec = parse_cache_spec(cache);
    spec.tq4.seed = options_.seed;
    return std::make_unique<reference::Backend<float>>(
        weights_, reference::BackendOptions{.cache = spec, .context = context, .max_chunk = options_.chunk});
  }

  ResultTable::Row row(const std::filesystem::path& text, const std::string& cache, std::int64_t context,
                       const PositionRange& range) {
    ResultTable::Row row = table_.row();
    row.set("model", options_.model.filename().string())
        .set("backend", options_.backend)
        .set("text", text.filename().string())
        .set("cache", cache)
        .set("base", options_.base)
        .set("chunk", options_.chunk)
        .set("context", context)
        .set("range", range.name());
    return row;
  }

  void write_context(const std::string& cache, std::int64_t context, const AccuracyTrace& trace) {
    for (const PositionRange& range : position_ranges(context)) {
      const AccuracySummary summary = summarise(
          std::span(trace.positions)
              .subspan(static_cast<std::size_t>(range.begin), static_cast<std::size_t>(range.end - range.begin)));
      ResultTable::Row line = row(options_.ids, cache, context, range);
      line.set("n_position", summary.count)
          .set("nll", summary.nll)
          .set("kl_mean", summary.kl_mean)
          .set("kl_p99", summary.kl_p99)
          .set("kl_max", summary.kl_max)
          .set("same_top", summary.same_top)
          .set("dp_rms", summary.dp_rms)
          .set("cosine", summary.cosine);
      if (range.begin == 0 && range.end == context)
        line.set("seconds", trace.forward_s[static_cast<std::size_t>(context) - 1]);
      line.commit();
    }
  }

  const Options& options_;
  ResultTable& table_;
  GgufFile file_;
  ModelWeights weights_;
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
  app.add_option("--chunk", options.chunk, "Tokens that go through the model at a time")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  add_seed(app, options);
  add_out(app, options);
  add_quiet(app, options);
  parse(app, argc, argv);
  require_reference(options.backend);
  require(!options.ids.empty() || !options.recall.empty(), "nothing to measure: give --ids, --recall or both");
  require(!options.contexts.empty(), "--contexts is empty");

  const RunInfo info = run_info("accuracy", argc, argv, options.seed, build_info());
  ResultTable table(result_path(options, info), info, kParameters, kMeasures);
  Accuracy accuracy(options, table);
  if (!options.ids.empty()) accuracy.run_text();
  for (const std::filesystem::path& path : options.recall) accuracy.run_recall(path);
  table.print(std::cout, {"text", "cache", "context", "range", "nll", "kl_mean", "kl_p99", "same_top", "dp_rms",
                          "cosine", "seconds", "recall_correct", "recall_total"});
  return EXIT_SUCCESS;
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
