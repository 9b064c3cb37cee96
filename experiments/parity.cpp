// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <limits>
#include <memory>
#include <numeric>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/model_source.hpp"
#include "experiments/support/run_text.hpp"
#include "gemma4/report/accuracy_stats.hpp"
#include "gemma4/report/vector_compare.hpp"

/// Does the model on the device compute what the reference computes, layer by layer?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;

struct Options : DriverOptions {
  Options() { caches = {"tq4", "bf16"}; }
  std::int64_t n_prompt = 12;
  std::int64_t n_decode = 3;
};

const std::vector<std::string> kParameters = {"model", "model_desc", "text",    "cache", "phase",
                                              "what",  "layer",      "n_token", "off",   "plan"};
const std::vector<std::string> kMeasures = {"cosine_min", "max_rel_err", "kl_max", "same_top"};

/// Residual stream after each layer, and logits of every token.
struct Trace {
  std::vector<std::vector<float>> layers;  ///< [n_token, hidden]
  std::vector<std::vector<float>> logits;  ///< [vocab] a token
};

Trace forward(Model<AnyBackend>& model, std::span<const std::int32_t> tokens) {
  AnyBackend& backend = model.backend();
  const ModelConfig& config = backend.config();
  Trace trace;
  std::vector<std::int64_t> rows(tokens.size());
  std::iota(rows.begin(), rows.end(), 0);
  model.forward(tokens, rows, [&](std::int64_t) {
    trace.layers.emplace_back(tokens.size() * static_cast<std::size_t>(config.hidden));
    backend.copy_residual(trace.layers.back());
  });
  for (const std::int64_t row : rows) {
    trace.logits.emplace_back(static_cast<std::size_t>(config.vocab));
    backend.copy_logits(row, trace.logits.back());
  }
  return trace;
}

class Parity {
 public:
  Parity(const Options& options, ResultTable& table)
      : options_(options),
        table_(table),
        reference_(with_backend(options, "reference"), wish(options.caches.front())),
        device_(with_backend(options, "cuda"), wish(options.caches.front())),
        desc_(model_desc(options.model)) {}

  void run(const std::string& cache) {
    const auto expected = reference_.make(wish(cache)), actual = device_.make(wish(cache));
    show_plans(options_, cache, actual->step_plans());
    plan_ = digest(actual->step_plans());
    Model<AnyBackend> expected_model(*expected), actual_model(*actual);
    expected_model.reset(), actual_model.reset();
    const std::int64_t total = options_.n_prompt + options_.n_decode;
    const std::vector<std::int32_t> ids = text_ids(options_, reference_.config().vocab, total);
    Progress progress("parity " + cache, total, progress_options(options_, "tokens"));
    for (std::int64_t begin = 0; begin < total;) {
      const std::int64_t count = begin == 0 ? options_.n_prompt : 1;
      const auto tokens = std::span(ids).subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count));
      const Trace expected_trace = forward(expected_model, tokens), actual_trace = forward(actual_model, tokens);
      const auto so_far = std::span(ids).first(static_cast<std::size_t>(begin + count));
      const char* const phase = begin == 0 ? "prefill" : "decode";
      require_finite(expected_model, "reference", so_far, cache, phase);
      require_finite(actual_model, "cuda", so_far, cache, phase);
      write(cache, phase, tokens, expected_trace, actual_trace);
      progress.update(begin += count);
    }
    progress.finish();
  }

 private:
  [[nodiscard]] static DriverOptions with_backend(DriverOptions options, const char* backend) {
    options.backend = backend;
    return options;
  }

  [[nodiscard]] BackendWish wish(const std::string& cache) const {
    const CacheSpec spec = with_seed(parse_cache_spec(cache), options_.seed);
    return {.cache = spec,
            .context = options_.n_prompt + options_.n_decode,
            .max_chunk = options_.n_prompt,
            .n_logit_row = options_.n_prompt,
            .policy = options_.policy()};
  }

  ResultTable::Row row(const std::string& cache, const std::string& phase, const std::string& what,
                       std::size_t n_token) {
    ResultTable::Row row = table_.row();
    set_run_text(row, options_, desc_);
    set_run_plan(row, options_.policy(), plan_);
    row.set("cache", cache).set("phase", phase).set("what", what).set("n_token", static_cast<std::int64_t>(n_token));
    return row;
  }

  void require_finite(Model<AnyBackend>& model, const char* room, std::span<const std::int32_t> ids,
                      const std::string& cache, const char* phase) {
    try {
      model.require_finite(ids);
    } catch (const NotFiniteError& error) {
      const std::string reason = concat(room, ", cache ", cache, ": ", error.what());
      row(cache, phase, "logits", ids.size()).fail(reason);
      throw std::runtime_error(reason);
    }
  }

  void write(const std::string& cache, const std::string& phase, std::span<const std::int32_t> tokens,
             const Trace& expected, const Trace& actual) {
    const auto hidden = static_cast<std::size_t>(reference_.config().hidden);
    for (std::size_t layer = 0; layer < expected.layers.size(); ++layer) {
      VectorComparison worst;
      for (std::size_t t = 0; t < tokens.size(); ++t) {
        worst = worse(worst, compare_vectors(std::span(actual.layers[layer]).subspan(t * hidden, hidden),
                                             std::span(expected.layers[layer]).subspan(t * hidden, hidden)));
      }
      row(cache, phase, "layer", tokens.size())
          .set("layer", static_cast<std::int64_t>(layer))
          .set("cosine_min", worst.cosine)
          .set("max_rel_err", worst.relative_error)
          .commit();
    }
    VectorComparison worst;
    double kl = 0, same = 0;
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      worst = worse(worst, compare_vectors(actual.logits[t], expected.logits[t]));
      const PositionAccuracy accuracy = compare_logits(actual.logits[t], expected.logits[t], 0);
      kl = std::max(kl, accuracy.kl);
      same += accuracy.same_top;
    }
    row(cache, phase, "logits", tokens.size())
        .set("cosine_min", worst.cosine)
        .set("max_rel_err", worst.relative_error)
        .set("kl_max", kl)
        .set("same_top", same / static_cast<double>(tokens.size()))
        .commit();
  }

  const Options& options_;
  ResultTable& table_;
  ModelSource reference_, device_;
  std::string desc_, plan_;
};

void run(int argc, char** argv) {
  CLI::App app(
      "Runs a handful of tokens through the Eigen reference and the CUDA backend with the same cache format and "
      "compares "
      "the residual stream after every layer and the logits of every token. One row per layer, the worst token of a "
      "pass. Needs a CUDA device, and memory for the model on both sides.");
  Options options;
  add_model(app, options);
  add_caches(app, options);
  add_whole(app, "--prompt-tokens", options.n_prompt, "Tokens of the first pass: more than 8 take the path of prefill",
            {1, 4096});
  add_whole(app, "--decode-tokens", options.n_decode, "Tokens that follow one by one", {0, 4096});
  add_ids(app, options);
  add_policy(app, options);
  add_seed(app, options);
  add_out(app, options);
  add_quiet(app, options);
  parse(app, argc, argv);

  const RunInfo info = device_run_info("parity", argc, argv, options.seed);
  run_table(options, info,
            {kParameters,
             kMeasures,
             {"cache", "phase", "what", "layer", "n_token", "cosine_min", "max_rel_err", "kl_max", "same_top"}},
            [&](ResultTable& table) {
              Parity parity(options, table);
              for (const std::string& cache : options.caches) parity.run(cache);
            });
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
