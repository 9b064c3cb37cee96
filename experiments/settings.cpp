// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/backend_info.hpp"
#include "experiments/support/decode_setting.hpp"
#include "experiments/support/run_text.hpp"
#include "experiments/support/text_session.hpp"
#include "experiments/support/writer.hpp"
#include "gemma4/cache_formats.hpp"
#include "gemma4/fnv1a.hpp"
#include "gemma4/step_limits.hpp"

/// What does each of several settings write, and how fast, from one depth on?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

struct Options : DriverOptions {
  std::vector<std::string> settings = {kTenSettings.begin(), kTenSettings.end()};
  std::string drafter = "lookup";
  std::int64_t depth = 2048;
  std::int64_t chunk = 512;
  std::int64_t window = 32;
  std::filesystem::path session;
};

using Ids = std::vector<std::int32_t>;
using Clock = std::chrono::steady_clock;

[[nodiscard]] double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Tokens that every cache can take back, rejected drafts among them: longer windows begin from a file.
constexpr std::int64_t kShortWindow = kMaxRewind - 1 - kBeyondWindow;

const TableShape kShape = {
    .parameters = {"model", "model_desc", "text", "backend", "context", "n_batch", "type_k", "type_v", "setting",
                   "drafter", "temperature", "top_k", "top_p", "n_draft", "n_depth", "n_gen", "off", "plan"},
    .measures = {"avg_ts", "us_a_token", "tokens_a_step", "n_same", "text_digest", "n_read", "fill_s", "begin_s",
                 "save_s", "file_bytes"},
    .shown = {"setting", "n_depth", "n_gen", "avg_ts", "tokens_a_step", "n_same", "n_read", "fill_s", "begin_s",
              "save_s"}};

class Run {
 public:
  Run(const Options& options, std::vector<DecodeSetting> settings, ResultTable& table)
      : options_(options),
        settings_(std::move(settings)),
        table_(table),
        desc_(model_desc(options.model)),
        source_(load_writer_source(options, wish(), DraftSettings{.drafter = options.drafter}.file())),
        ids_(text_ids(options, source_->vocab(), options.depth)),
        fill_(options.session, options.model, ids_),
        writer_(source_->make(wish())) {}

  void measure() {
    fill();
    Ids first;
    for (const DecodeSetting& setting : settings_) {
      writer_->set_policy(policy_of(setting));
      writer_->use({.drafter = setting.is_drafted ? options_.drafter : "none", .n_draft = setting.n_draft});
      if (options_.backend == "cuda") {  // once before: its kernels are loaded, its steps captured
        begin();
        (void)sequence().decode(options_.window, setting.sampler, [](std::int32_t) { return true; });
      }
      const double begin_s = begin();
      const draft::Counts before = writer_->counts();
      Ids text;
      const Stretch took = sequence().decode(options_.window, setting.sampler, [&](std::int32_t token) {
        text.push_back(token);
        return true;
      });
      if (first.empty()) first = text;
      const auto n_same = std::ranges::mismatch(text, first).in1 - text.begin();
      ResultTable::Row row = this->row(setting);
      row.set("avg_ts", took.tokens_per_second()).set("us_a_token", took.us / static_cast<double>(took.n_token));
      if (setting.is_drafted) row.set("tokens_a_step", writer_->counts().since(before).tokens_per_step());
      const auto bytes = std::as_bytes(std::span(text));
      row.set("text_digest",
              gemma4::detail::hash_text(fnv1a({reinterpret_cast<const char*>(bytes.data()), bytes.size()})));
      row.set("n_same", n_same).set("n_read", n_read_).set("fill_s", fill_s_).set("begin_s", begin_s);
      if (save_s_) row.set("save_s", *save_s_);
      if (fill_.has_file()) row.set("file_bytes", static_cast<std::int64_t>(fill_.file_bytes()));
      row.commit();
    }
  }

 private:
  [[nodiscard]] CudaSettings wish() const {
    const bool drafts = std::ranges::any_of(settings_, &DecodeSetting::is_drafted);
    return {.cache = with_seed(parse_cache_spec(options_.caches.front()), options_.seed),
            .context = options_.depth + options_.window,
            .max_chunk = std::max(options_.chunk, kDecodeChunk),
            .policy = options_.policy(),
            .max_draft = drafts ? draft::kMaxDrafts : 0,
            .lag = kWriterLag};
  }
  [[nodiscard]] ExecutionPolicy policy_of(const DecodeSetting& setting) const {
    std::vector<std::string> off = options_.off;
    off.insert(off.end(), setting.off.begin(), setting.off.end());
    return policy_without(off);
  }
  [[nodiscard]] Sequence& sequence() { return writer_->sequence(); }

  /// Once: what the file holds of the text, and the rest of it by prefill.
  void fill() {
    const Clock::time_point start = Clock::now();
    require(fill_.n_token() <= options_.depth, options_.session.string(), ": it holds ", fill_.n_token(),
            " tokens, --depth is ", options_.depth);
    if (fill_.has_file()) sequence().restore(fill_.file(), fill_.model_hash());
    const auto rest = std::span(ids_).subspan(static_cast<std::size_t>(fill_.n_token()));
    n_read_ = std::ssize(rest);
    Progress progress("fill", options_.depth, progress_options(options_, "tokens"));
    if (n_read_ > 1) {
      sequence().prefill(rest.first(rest.size() - 1), options_.chunk,
                         [&](std::int64_t done) { progress.update(fill_.n_token() + done); });
    }
    // By itself, as it goes through the model again behind a window that is taken back: the same bits for all settings.
    if (n_read_ > 0) sequence().prefill(rest.last(1), 1, {});
    fill_s_ = seconds_since(start);
    if (options_.session.empty() || fill_.has_file()) return;
    const Clock::time_point saving = Clock::now();
    fill_.make(sequence());
    save_s_ = seconds_since(saving);
    fill_ = TextSession(options_.session, options_.model, ids_);
  }

  /// Back at the depth: what a window wrote is taken back, or the sequence comes from the file once more. @return
  /// seconds
  double begin() {
    const Clock::time_point start = Clock::now();
    const auto n_back = static_cast<std::int64_t>(sequence().held().size()) - options_.depth;
    if (n_back <= std::min(kShortWindow, sequence().max_back())) {
      sequence().take_back(n_back);
    } else {
      sequence().restore(fill_.file(), fill_.model_hash());
    }
    return seconds_since(start);
  }

  [[nodiscard]] ResultTable::Row row(const DecodeSetting& setting) {
    ResultTable::Row row = table_.row();
    set_run_text(row, options_, desc_);
    set_run_plan(row, policy_of(setting), digest(sequence().step_plans()));
    const std::string& cache = options_.caches.front();
    row.set("backend", options_.backend).set("context", wish().context).set("n_batch", options_.chunk);
    row.set("type_k", cache).set("type_v", cache).set("setting", setting.name);
    row.set("drafter", setting.is_drafted ? options_.drafter : "none");
    row.set("temperature", setting.sampler.temperature).set("top_k", setting.sampler.top_k);
    row.set("top_p", setting.sampler.top_p).set("n_depth", options_.depth).set("n_gen", options_.window);
    if (setting.is_drafted) row.set("n_draft", setting.n_draft ? std::to_string(*setting.n_draft) : "auto");
    return row;
  }

  const Options& options_;
  std::vector<DecodeSetting> settings_;
  ResultTable& table_;
  std::string desc_;
  std::unique_ptr<WriterSource> source_;
  Ids ids_;
  TextSession fill_;
  std::unique_ptr<Writer> writer_;
  std::int64_t n_read_ = 0;
  double fill_s_ = 0;
  std::optional<double> save_s_;  ///< where the file was made
};

void add_options(CLI::App& app, Options& options) {
  add_model(app, options);
  add_cache(app, options);
  add_backend(app, options);
  app.add_option("--settings", options.settings,
                 "Ways to continue, comma-separated: greedy, or NAME=VALUE+NAME=VALUE of temperature, top-k, top-p, "
                 "seed, draft (1 to 7, or auto) and off (a switch, see --off); n_same is against the first")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--drafter", options.drafter,
                 "Who proposes where drafts are on: lookup, or the GGUF file of a drafter")
      ->capture_default_str();
  add_tokens(app, "--depth", options.depth, "Tokens of the text that are read, once");
  add_tokens(app, "--chunk", options.chunk, "Prompt tokens that go through the model at a time");
  add_tokens(app, "--window", options.window,
             concat("Tokens that each setting writes; more than ", kShortWindow, " need a --session"));
  app.add_option("--session", options.session,
                 "File of the caches at the depth: where it is there nothing is read, else it is made; each setting "
                 "begins from it where what was written cannot be taken back");
  add_policy(app, options);
  add_ids(app, options);
  add_seed(app, options);
  add_out(app, options);
  add_quiet(app, options);
}

void run(int argc, char** argv) {
  CLI::App app(
      "Several settings from one fill: the caches are filled once, by prefill or from a file, and each setting writes "
      "a "
      "window from the same depth, as if nothing else had been written there. One row per setting: its rate, tokens a "
      "step, how many tokens its text has in common with that of the first, and what it took to come back.");
  Options options;
  add_options(app, options);
  parse(app, argc, argv);
  std::vector<DecodeSetting> settings;
  for (const std::string& text : options.settings) settings.push_back(parse_decode_setting(text, options.seed));
  const bool has_tail = keeps_a_tail(parse_cache_spec(options.caches.front()));
  const std::int64_t n_back = has_tail ? 0 : kShortWindow;
  require(options.window <= n_back || !options.session.empty(), "--window ", options.window, ": the cache ",
          options.caches.front(), " can take back ", n_back, " tokens; give a --session to begin from");
  require_drafter({.drafter = options.drafter});
  for (const DecodeSetting& setting : settings) {
    require(setting.off.empty() || options.backend == "cuda", "--settings ", setting.name,
            ": the switches are a device's; give --backend cuda");
    require(!setting.is_drafted || !has_tail, "--settings ", setting.name, ": the cache ", options.caches.front(),
            " keeps its newest tokens exact and cannot go back");
  }
  const RunInfo info = backend_run_info(options, "settings", argc, argv);
  run_table(options, info, kShape, [&](ResultTable& table) { Run(options, settings, table).measure(); });
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
