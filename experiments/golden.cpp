// SPDX-License-Identifier: Apache-2.0
#include "gemma4/model/golden.hpp"

#include <filesystem>
#include <iostream>
#include <optional>
#include <string>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/model_source.hpp"
#include "experiments/support/run_text.hpp"
#include "gemma4/model/assistant_weights.hpp"
#include "gemma4/text/id_file.hpp"
#include "reference/assistant_check.hpp"
#include "reference/backend.hpp"
#include "reference/golden_check.hpp"

/// Do we compute what other implementations computed?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

struct Options : DriverOptions {
  std::vector<std::filesystem::path> logits;
  std::vector<std::filesystem::path> tq4;
  std::filesystem::path drafter, agreement;
  std::vector<std::filesystem::path> drafts;
  std::int64_t n_position = 8192;
  double bound = 3e-3;
  std::int64_t chunk = 512;
};

const std::vector<std::string> kParameters = {"golden_case", "what",  "model", "backend",
                                              "cache",       "chunk", "off",   "plan"};
const std::vector<std::string> kMeasures = {"n_compared", "n_same", "max_err", "bound"};

/// Codes may differ at ties only; a norm is within the roundoff of bf16; the peer's codebook leaves a relative RMS
/// error of sqrt(0.00999), and the mean of a case's 5000 values or more stays within 10 % of that.
constexpr double kDecompressedBound = 0.11;
constexpr double kDecodedBound = 1e-5;  // the case was computed in float64 and stored in float32, values below 4

/// A model and a drafter for it, on the processor.
struct Drafting {
  explicit Drafting(const Options& options)
      : file(GgufFile::open(options.model)),
        weights(weights_from_gguf(file)),
        drafter_file(GgufFile::open(options.drafter)),
        drafter(assistant_weights_from_gguf(drafter_file, weights.config)) {}

  [[nodiscard]] reference::Backend<float> backend(std::int64_t context, const Options& options) const {
    return {weights,
            {.cache = parse_cache_spec(options.caches.front()), .context = context, .max_chunk = options.chunk}};
  }

  GgufFile file;
  ModelWeights weights;
  GgufFile drafter_file;
  AssistantWeights drafter;
};

class Golden {
 public:
  Golden(const Options& options, ResultTable& table) : options_(options), table_(table) {}

  void run_logits(const std::filesystem::path& path) {
    const GoldenLogits golden = read_golden_logits(path);
    const auto n_token = static_cast<std::int64_t>(golden.ids.size());
    const BackendWish wish{.cache = parse_cache_spec(options_.caches.front()),
                           .context = n_token,
                           .max_chunk = options_.chunk,
                           .n_logit_row = static_cast<std::int64_t>(golden.positions.size()),
                           .policy = options_.policy()};
    const ModelSource source(options_, wish);
    const auto backend = source.make(wish);
    show_plans(options_, options_.caches.front(), backend->step_plans());
    plan_ = digest(backend->step_plans());
    Progress progress("golden", n_token, progress_options(options_, "tokens"));
    GoldenComparison result;
    try {
      result = compare_with_golden(*backend, golden, options_.chunk, [&](std::int64_t done) { progress.update(done); });
    } catch (const NotFiniteError& error) {
      row(path, "logits").fail(error.what());
      throw;
    }
    progress.finish();
    judge(path, "logits",
          {.n_compared = result.n_position,
           .n_same = result.n_same_argmax,
           .error = result.max_abs,
           .bound = options_.bound});
  }

  void run_tq4(const std::filesystem::path& path) {
    const reference::Tq4GoldenComparison result = reference::compare_with_golden(read_tq4_golden(path));
    judge(path, "codes",
          {result.n_value, result.n_value - result.n_tie - result.n_other_code,
           static_cast<double>(result.n_other_code), 0.0});
    judge(path, "norms", {.error = result.norm_error, .bound = reference::kNormRoundoff});
    judge(path, "decompressed", {.error = result.decompressed_rms, .bound = kDecompressedBound});
    judge(path, "attention_on_decoded", {.error = result.decoded_error, .bound = kDecodedBound});
    judge(path, "tq4_attention_over_bound", {.error = result.attention_miss, .bound = 1.0});
  }

  /// What a drafter drafts, by the reference: n_same counts drafted tokens.
  void run_drafts(const Drafting& drafting, const std::filesystem::path& path) {
    const reference::GoldenDrafts golden = reference::read_golden_drafts(path);
    reference::Backend<float> backend = drafting.backend(static_cast<std::int64_t>(golden.ids.size()), options_);
    const reference::Assistant<float> drafter(drafting.drafter, backend);
    reference::DraftComparison result;
    reference::for_each_golden_position(backend, golden, options_.chunk, [&](std::size_t i) {
      reference::compare_draft(drafter, golden, i, backend.hidden(), result);
    });
    judge(path, "drafts",
          {.n_compared = result.n_compared, .n_same = result.n_same, .error = result.max_abs, .bound = options_.bound});
  }

  /// How often a drafter says what its target says, step by step and through: a row each, without a bound.
  void run_agreement(const Drafting& drafting) {
    constexpr std::int64_t kStep = 4;
    const std::int64_t n = options_.n_position;
    const std::vector<std::int32_t> ids = read_ids(options_.agreement, drafting.weights.config.vocab, n + kStep);
    reference::Backend<float> backend = drafting.backend(n + kStep, options_);
    Progress progress("golden", n + kStep, progress_options(options_, "tokens"));
    const reference::DraftAgreement agreement =
        reference::measure_agreement(reference::Assistant<float>(drafting.drafter, backend), backend, ids, n, kStep,
                                     [&](std::int64_t done) { progress.update(done); });
    progress.finish();
    for (std::size_t j = 0; j < static_cast<std::size_t>(kStep); ++j) {
      for (const bool through : {false, true}) {
        const std::string what = concat(through ? "agrees_through_" : "agrees_at_", j + 1);
        ResultTable::Row row = this->row(options_.agreement, what.c_str());
        row.set("n_compared", n).set("n_same", through ? agreement.through[j] : agreement.step[j]);
        row.commit();
      }
    }
  }

  [[nodiscard]] bool passed() const { return passed_; }

 private:
  struct Verdict {
    std::optional<std::int64_t> n_compared = {}, n_same = {};
    double error = 0, bound = 0;
  };

  [[nodiscard]] ResultTable::Row row(const std::filesystem::path& path, const char* what) {
    ResultTable::Row row = table_.row();
    row.set("golden_case", path.filename().string()).set("what", what).set("backend", options_.backend);
    if (!options_.model.empty()) {
      set_run_plan(row, options_.policy(), plan_);
      row.set("model", options_.model.filename().string())
          .set("cache", options_.caches.front())
          .set("chunk", options_.chunk);
    }
    return row;
  }

  void judge(const std::filesystem::path& path, const char* what, const Verdict& verdict) {
    ResultTable::Row row = this->row(path, what);
    row.set("n_compared", verdict.n_compared)
        .set("n_same", verdict.n_same)
        .set("max_err", verdict.error)
        .set("bound", verdict.bound);
    if (verdict.error <= verdict.bound) {
      row.commit();
    } else {
      row.fail("above the bound");
      passed_ = false;
    }
  }

  const Options& options_;
  ResultTable& table_;
  bool passed_ = true;
  std::string plan_;
};

int run(int argc, char** argv) {
  CLI::App app(
      "Holds golden containers against what we compute, a row a case; the exit code is 1 when one is above its bound. "
      "--model and --logits: a model's logits at given positions. --tq4: packing, decompression and attention of a "
      "compressed cache. --drafter: what a drafter drafts, and how often it is right.");
  Options options;
  options.caches = {"f32"};
  CLI::Option* model = add_model(app, options)->required(false);
  app.add_option("--logits", options.logits, "Container with ids, positions and logits; may be given more than once")
      ->check(CLI::ExistingFile)
      ->needs(model);
  app.add_option("--tq4", options.tq4, "Container with a TQ4 case; may be given more than once")
      ->check(CLI::ExistingFile);
  CLI::Option* const drafter =
      app.add_option("--drafter", options.drafter, "GGUF file of a drafter for the model, for --drafts and --agreement")
          ->check(CLI::ExistingFile)
          ->needs(model);
  app.add_option("--drafts", options.drafts,
                 "Container with ids, positions, hidden, draft and logits; may be given more than once")
      ->check(CLI::ExistingFile)
      ->needs(drafter);
  CLI::Option* const agreement =
      app.add_option("--agreement", options.agreement,
                     "Token ids (.u16, .i32): how often each of four steps of the drafter names the model's likeliest "
                     "token, fed the true ones")
          ->check(CLI::ExistingFile)
          ->needs(drafter);
  add_tokens(app, "--positions", options.n_position, "Positions of --agreement, from the first")->needs(agreement);
  add_policy(app, options);
  add_cache(app, options);
  add_backend(app, options);
  add_real(app, "--bound", options.bound,
           "Largest difference of a logit; the bounds of a TQ4 case follow from its data", {});
  add_tokens(app, "--chunk", options.chunk, "Tokens that go through the model at a time");
  add_out(app, options);
  add_quiet(app, options);
  parse(app, argc, argv);
  require(!options.logits.empty() || !options.tq4.empty() || !options.drafts.empty() || !options.agreement.empty(),
          "nothing to compare: give --logits with --model, --drafts or --agreement with --drafter, or --tq4");
  require(options.drafter.empty() || options.backend != "cuda",
          "--drafter: drafts are compared on the processor; leave out --backend cuda");

  const RunInfo info = backend_run_info(options, "golden", argc, argv);
  bool passed = true;
  run_table(
      options, info,
      {kParameters, kMeasures, {"golden_case", "what", "cache", "n_compared", "n_same", "max_err", "bound", "status"}},
      [&](ResultTable& table) {
        Golden golden(options, table);
        for (const std::filesystem::path& path : options.logits) golden.run_logits(path);
        for (const std::filesystem::path& path : options.tq4) golden.run_tq4(path);
        if (!options.drafter.empty()) {
          const Drafting drafting(options);
          for (const std::filesystem::path& path : options.drafts) golden.run_drafts(drafting, path);
          if (!options.agreement.empty()) golden.run_agreement(drafting);
        }
        passed = golden.passed();
      });
  return passed ? EXIT_SUCCESS : EXIT_FAILURE;
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
