// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/backend_info.hpp"
#include "experiments/support/cuda_model.hpp"
#include "experiments/support/drafting.hpp"
#include "experiments/support/run_text.hpp"
#include "experiments/support/sequence.hpp"
#include "experiments/support/text_session.hpp"
#include "experiments/support/writer.hpp"
#include "gemma4/cache_formats.hpp"
#include "gemma4/draft/step.hpp"
#include "gemma4/step_limits.hpp"

/// What does drafting gain at a depth, and how much of what is drafted stays?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

struct Options : DriverOptions, SessionOptions {
  std::vector<std::string> drafters = {"lookup"};
  std::vector<std::string> n_drafts = {"1", "3", "7", "auto"};
  std::vector<std::int64_t> depths = {512, 2048, 8192};
  std::int64_t chunk = 512;
  std::int64_t window = 32;
  std::int64_t sites = 8;
  std::int64_t stride = 64;
  bool sliding_rows = true;
};

const std::vector<std::string> kParameters = {"model",   "model_desc", "text",   "backend", "context",
                                              "n_batch", "type_k",     "type_v", "drafter", "n_draft",
                                              "n_gen",   "n_depth",    "n_site", "off",     "plan"};
const std::vector<std::string> kMeasures = {
    "tokens_a_step", "accepted_1", "accepted_2", "accepted_3", "accepted_4", "accepted_5", "accepted_6", "accepted_7",
    "n_step",        "ms_a_draft", "ms_a_step",  "ms_plain",   "avg_ts",     "plain_ts",   "of_plain",   "same_text"};
const std::vector<std::string> kShown = {"type_k",        "drafter",    "n_draft",    "n_depth",
                                         "tokens_a_step", "accepted_1", "accepted_3", "ms_a_step",
                                         "avg_ts",        "plain_ts",   "of_plain",   "same_text"};

using Ids = std::vector<std::int32_t>;

/// Tokens that are written before a window.
constexpr std::int64_t kBefore = 3;

[[nodiscard]] std::int64_t context_of(const Options& options) {
  return options.depths.back() + options.sites * options.stride + kBefore + options.window;
}

[[nodiscard]] CudaSettings settings(const Options& options, const std::string& cache) {
  return {.cache = with_seed(parse_cache_spec(cache), options.seed),
          .context = context_of(options),
          .max_chunk = std::max(options.chunk, kDecodeChunk),
          .policy = options.policy(),
          .checkpoints = options.kept(),
          .max_draft = draft::kMaxDrafts,
          .lag = kWriterLag,
          .sliding_rows = options.sliding_rows};
}

/// One drafter with one number of drafts, over the sites of a depth.
struct Case {
  DraftSettings settings;
  std::string n_draft;
  draft::Counts counts = {};
  double propose_us = 0;  ///< that the drafter took; on a device it is a part of the step
  Stretch took = {};
  bool same_text = true;
};

/// The drafter that is a model, if there is one. @throws std::invalid_argument for several, which no device holds
[[nodiscard]] std::filesystem::path file_of(const Options& options) {
  std::filesystem::path file;
  for (const std::string& drafter : options.drafters) {
    const DraftSettings settings{.drafter = drafter};
    require(!settings.is_file() || file.empty() || file == settings.file(), "--drafters ", file.string(), ",", drafter,
            ": on a device one file at most");
    if (settings.is_file()) file = settings.file();
  }
  return file;
}

/// One cache format: a sequence that grows from depth to depth along the text. At a depth and every `stride` tokens
/// behind it each drafter writes a window, greedily, which is taken back; and so does plain decoding, whose text each
/// must have written.
class Run {
 public:
  Run(const Options& options, ResultTable& table, const WriterSource& source, std::string cache, std::string desc)
      : options_(options), table_(table), cache_(std::move(cache)), desc_(std::move(desc)) {
    const std::int64_t n_text = options.depths.back() + options.sites * options.stride;
    ids_ = text_ids(options, source.vocab(), n_text);
    writer_ = source.make(settings(options, cache_));
    fill_.emplace(options.session, options.model, ids_);
    show_plans(options, cache_, sequence().step_plans());
    plan_ = digest(sequence().step_plans());
  }

  void measure() {
    Progress progress("draft " + cache_, static_cast<std::int64_t>(ids_.size()), progress_options(options_, "tokens"));
    for (const std::int64_t depth : options_.depths) {
      std::vector<Case> cases = make_cases();
      take_fill(depth);
      for (std::int64_t site = 0; site < options_.sites; ++site) {
        read_to(depth + site * options_.stride, progress);
        settle(cases.front());
        if (site == 0 && depth == options_.depths.back()) fill_->make(sequence());
        visit(cases);
      }
      for (std::size_t i = 1; i < cases.size(); ++i) write(depth, cases.front(), cases[i]);
    }
    progress.finish();
  }

 private:
  /// Plain decoding in front.
  [[nodiscard]] std::vector<Case> make_cases() const {
    std::vector<Case> cases;
    const auto add = [&](const std::string& drafter, const std::string& n_draft) {
      cases.push_back({{.drafter = drafter, .n_draft = parse_n_draft(n_draft)}, n_draft});
    };
    add("none", "auto");
    for (const std::string& drafter : options_.drafters) {
      for (const std::string& n_draft : options_.n_drafts) add(drafter, n_draft);
    }
    return cases;
  }

  /// The caches at a depth, from the file where it reaches so far.
  void take_fill(std::int64_t depth) {
    if (fill_->n_token() < depth) return;
    sequence().restore(fill_->file(), fill_->model_hash());
    sequence().take_back(fill_->n_token() - depth);
  }

  void read_to(std::int64_t end, Progress& progress) {
    const auto begin = static_cast<std::int64_t>(sequence().held().size());
    if (end <= begin) return;
    const auto part = std::span(ids_).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(end - begin));
    (void)sequence().prefill(part, options_.chunk, [&](std::int64_t done) { progress.update(begin + done); });
  }

  /// What is taken back leaves the last token of the prompt to a decode step, whose bits are not those of a chunk: so
  /// it is once before anything is compared.
  void settle(const Case& plain) {
    writer_->use(plain.settings);
    (void)sequence().decode(1, {}, [](std::int32_t) { return true; });
    sequence().take_back(1);
  }

  /// A window by each. The tokens before it are not counted: with them a drafter reads what it has not seen.
  void visit(std::vector<Case>& cases) {
    Ids plain;
    for (Case& one : cases) {
      Ids text;
      const auto note = [&](std::int32_t token) {
        text.push_back(token);
        return true;
      };
      writer_->use(one.settings);
      (void)sequence().decode(kBefore, {}, note);
      const draft::Counts counts = writer_->counts();
      const double propose_us = writer_->propose_us();
      const Stretch took = sequence().decode(options_.window, {}, note);
      one.counts.add(writer_->counts().since(counts));
      one.propose_us += writer_->propose_us() - propose_us;
      sequence().take_back(options_.window + kBefore);
      one.took.n_token += took.n_token;
      one.took.us += took.us;
      if (&one == &cases.front()) plain = text;
      one.same_text = one.same_text && text == plain;
    }
  }

  void write(std::int64_t depth, const Case& plain, const Case& one) {
    ResultTable::Row row = table_.row();
    set_run_text(row, options_, desc_);
    set_run_plan(row, options_.policy(), plan_);
    row.set("backend", options_.backend).set("context", context_of(options_)).set("n_batch", options_.chunk);
    row.set("type_k", cache_).set("type_v", cache_).set("drafter", one.settings.drafter).set("n_draft", one.n_draft);
    row.set("n_gen", options_.window).set("n_depth", depth).set("n_site", options_.sites);
    const draft::Counts& counts = one.counts;
    const auto n_step = static_cast<double>(std::max<std::int64_t>(1, counts.n_step));
    row.set("tokens_a_step", counts.tokens_per_step()).set("n_step", counts.n_step);
    for (std::size_t i = 0; i < counts.drafted.size(); ++i) {
      if (counts.drafted[i] == 0) continue;
      row.set(concat("accepted_", i + 1),
              static_cast<double>(counts.accepted[i]) / static_cast<double>(counts.drafted[i]));
    }
    const double rate = one.took.tokens_per_second(), plain_rate = plain.took.tokens_per_second();
    row.set("ms_a_draft", 1e-3 * one.propose_us / n_step).set("ms_a_step", 1e-3 * one.took.us / n_step);
    row.set("ms_plain", 1e-3 * plain.took.us / static_cast<double>(std::max<std::int64_t>(1, plain.took.n_token)));
    row.set("avg_ts", rate).set("plain_ts", plain_rate).set("of_plain", rate / plain_rate);
    row.set("same_text", one.same_text);
    if (one.same_text) {
      row.commit();
    } else {
      row.fail("the drafted text is not that of plain decoding");
    }
  }

  [[nodiscard]] Sequence& sequence() { return writer_->sequence(); }

  const Options& options_;
  ResultTable& table_;
  std::string cache_, desc_, plan_;
  Ids ids_;
  std::unique_ptr<Writer> writer_;
  std::optional<TextSession> fill_;
};

void add_options(CLI::App& app, Options& options) {
  add_model(app, options);
  add_caches(app, options);
  add_backend(app, options);
  app.add_option("--drafters", options.drafters, "Who proposes: lookup, or GGUF files of drafters; comma-separated")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--drafts", options.n_drafts, "Tokens to propose for each step, 1 to 7, or auto; comma-separated")
      ->delimiter(',')
      ->capture_default_str();
  add_tokens(app, "--depths", options.depths, "Depths at which text is written, increasing")->delimiter(',');
  add_tokens(app, "--chunk", options.chunk, "Prompt tokens that go through the model at a time");
  add_whole(app, "--window", options.window, "Tokens written at a site; the caches can take back so many",
            {1, kMaxRewind - 1 - kBeyondWindow - kBefore});
  add_whole(app, "--sites", options.sites, "Places at a depth from which text is written", {1, 100000});
  add_whole(app, "--stride", options.stride, "Tokens of the text from one site to the next", {kMaxRewind, 1 << 20});
  add_session_at_depths(app, options);
  add_policy(app, options);
  app.add_flag("--sliding-rows,!--no-sliding-rows", options.sliding_rows,
               "The rows of a step go through a sliding layer in launches of up to four, not one by one; on a device");
  add_ids(app, options);
  add_seed(app, options);
  add_out(app, options);
  add_quiet(app, options);
}

void measure(const Options& options, ResultTable& table) {
  const std::string desc = model_desc(options.model);
  const auto source = load_writer_source(options, settings(options, options.caches.front()),
                                         options.backend == "cuda" ? file_of(options) : std::filesystem::path());
  for (const std::string& cache : options.caches) Run(options, table, *source, cache, desc).measure();
}

void run(int argc, char** argv) {
  CLI::App app(
      "What drafting gains: at each depth of a text, and at sites behind it, each drafter writes a window greedily, "
      "and "
      "so does plain decoding. One row per cache, depth, drafter and number of drafts: tokens a step, the share "
      "accepted at each place of those drafted there, milliseconds a draft and a step, tokens a second and their ratio "
      "to plain decoding of the same run. A text that is not that of plain decoding is a failure.");
  Options options;
  add_options(app, options);
  parse(app, argc, argv);
  require(std::ranges::is_sorted(options.depths) && !options.depths.empty(), "--depths: need increasing depths");
  for (std::size_t i = 1; i < options.depths.size(); ++i) {
    require(options.depths[i] >= options.depths[i - 1] + options.sites * options.stride, "--depths ", options.depths[i],
            ": the ", options.sites, " sites behind ", options.depths[i - 1], " reach beyond it");
  }
  require_one_cache(options, options);
  for (const std::string& drafter : options.drafters) require_drafter({.drafter = drafter});
  for (const std::string& n_draft : options.n_drafts) (void)parse_n_draft(n_draft);
  const RunInfo info = backend_run_info(options, "draft", argc, argv);
  run_table(options, info, {kParameters, kMeasures, kShown}, [&](ResultTable& table) { measure(options, table); });
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
