// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iostream>
#include <span>
#include <string>
#include <vector>

#include "experiments/driver.hpp"
#include "experiments/support/notes.hpp"
#include "experiments/support/run_text.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/model/weights.hpp"
#include "reference/layer_statistics.hpp"

/// What goes on inside a model, layer by layer, and what does a cache format do there?
namespace {

using namespace gemma4;
using namespace gemma4::experiment;
using reference::LayerStatistics;

struct Options : DriverOptions {
  Options() { caches = {"tq4"}; }
  std::string base = "bf16";
  std::int64_t chunk = 512;
  std::vector<std::int64_t> depths = {1024};
  std::int64_t window = 32;
};

const std::vector<std::string> kParameters = {"model", "text", "cache", "base", "depth", "window", "layer", "kind"};
const std::vector<std::string> kMeasures = {
    "score_norm",           "score_deviation", "n_key",      "output_rms",      "attention_ratio", "mlp_ratio",
    "stream_rms",           "common_share",    "code_error", "attention_error", "attention_gain",  "stream_error",
    "attention_square_sum", "mlp_square_sum",  "k_norm_min", "k_norm_max",      "k_norm_ratio",    "k_norm_near_zero"};

class Statistics {
 public:
  Statistics(const Options& options, const ModelWeights& weights, ResultTable& table)
      : options_(options), weights_(weights), table_(table) {}

  void run_depth(std::int64_t depth, const std::string& cache) {
    const std::vector<std::int32_t> ids = text_ids(options_, weights_.config.vocab, depth);
    const CacheSpec test = with_seed(parse_cache_spec(cache), options_.seed);
    Progress progress("statistics " + cache, depth, progress_options(options_, "tokens"));
    const std::vector<LayerStatistics> layers = reference::layer_statistics(
        weights_, ids, options_.chunk, std::min(options_.window, depth), parse_cache_spec(options_.base), test,
        [&](std::int64_t done) { progress.update(done); });
    progress.finish();
    double error_before = 0;
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      const bool sliding = weights_.config.sliding_layer(static_cast<std::int64_t>(layer));
      ResultTable::Row line = row(depth, cache, std::to_string(layer), sliding ? "sliding" : "full");
      write_layer(line, layers[layer]);
      if (!sliding) {
        line.set("code_error", layers[layer].code_error);
        write_spread(line, reference::weight_spread(weights_.layers[layer].attn_k_norm));
      }
      if (sliding && error_before > 0) line.set("attention_gain", layers[layer].attention_error / error_before);
      error_before = layers[layer].stream_error;
      line.commit();
    }
    for (const char* kind : {"all", "full"}) write_summary(depth, cache, kind, layers);
  }

 private:
  ResultTable::Row row(std::int64_t depth, const std::string& cache, const std::string& layer, const char* kind) {
    ResultTable::Row row = table_.row();
    row.set("model", options_.model.filename().string())
        .set("text", text_name(options_))
        .set("cache", cache)
        .set("base", options_.base)
        .set("depth", depth)
        .set("window", std::min(options_.window, depth))
        .set("layer", layer)
        .set("kind", kind);
    return row;
  }

  static void write_layer(ResultTable::Row& line, const LayerStatistics& layer) {
    line.set("score_norm", layer.score_norm)
        .set("score_deviation", layer.score_deviation)
        .set("n_key", layer.n_key)
        .set("output_rms", layer.output_rms)
        .set("attention_ratio", layer.attention_ratio)
        .set("mlp_ratio", layer.mlp_ratio)
        .set("stream_rms", layer.stream_rms)
        .set("common_share", layer.common_share)
        .set("attention_error", layer.attention_error)
        .set("stream_error", layer.stream_error);
  }

  static void write_spread(ResultTable::Row& line, const reference::WeightSpread& spread) {
    line.set("k_norm_min", spread.min)
        .set("k_norm_max", spread.max)
        .set("k_norm_ratio", spread.ratio)
        .set("k_norm_near_zero", spread.near_zero);
  }

  /// Over all layers or over the full ones: RMS of what the scores have, geometric mean of the keys, means of the
  /// shares and errors, sums of the squared ratios.
  void write_summary(std::int64_t depth, const std::string& cache, const std::string& kind,
                     const std::vector<LayerStatistics>& layers) {
    double count = 0, n_full = 0;
    LayerStatistics sum;
    for (std::size_t i = 0; i < layers.size(); ++i) {
      const bool full = !weights_.config.sliding_layer(static_cast<std::int64_t>(i));
      if (kind == "full" && !full) continue;
      const LayerStatistics& layer = layers[i];
      ++count, n_full += full;
      sum.score_norm += layer.score_norm * layer.score_norm;
      sum.score_deviation += layer.score_deviation * layer.score_deviation;
      sum.n_key += std::log(layer.n_key);
      sum.output_rms += layer.output_rms;
      sum.attention_ratio += layer.attention_ratio * layer.attention_ratio;
      sum.mlp_ratio += layer.mlp_ratio * layer.mlp_ratio;
      sum.common_share += layer.common_share;
      sum.code_error += layer.code_error;
    }
    if (count == 0) return;
    ResultTable::Row line = row(depth, cache, "summary", kind.c_str());
    line.set("score_norm", std::sqrt(sum.score_norm / count))
        .set("score_deviation", std::sqrt(sum.score_deviation / count))
        .set("n_key", std::exp(sum.n_key / count))
        .set("output_rms", sum.output_rms / count)
        .set("common_share", sum.common_share / count)
        .set("attention_square_sum", sum.attention_ratio)
        .set("mlp_square_sum", sum.mlp_ratio);
    if (n_full > 0) line.set("code_error", sum.code_error / n_full);
    line.commit();
  }

  const Options& options_;
  const ModelWeights& weights_;
  ResultTable& table_;
};

int run(int argc, char** argv) {
  CLI::App app(
      "What goes on inside a model, by the reference: per layer the deviation of attention scores, the keys attended "
      "to, the weight of each branch in the residual stream, what the positions have in common, and the error that a "
      "cache format brings; of the full layers also how far the weights of k's norm are spread. By these figures "
      "synthesize makes its random models.");
  Options options;
  add_model(app, options);
  add_caches(app, options);
  app.add_option("--base", options.base, "Cache that the others are compared with")
      ->check(CLI::Validator(check_cache_name, "CACHE"))
      ->capture_default_str();
  add_ids(app, options)->description("Token ids: little-endian uint16 (*.u16) or int32 (*.i32); without: random ids");
  add_tokens(app, "--depths", options.depths, "Lengths of the text; the last --window positions of each are looked at")
      ->delimiter(',');
  add_tokens(app, "--window", options.window, "Positions before a depth");
  add_tokens(app, "--chunk", options.chunk, "Tokens that go through the model at a time");
  add_seed(app, options);
  add_out(app, options);
  add_quiet(app, options);
  parse(app, argc, argv);

  const GgufFile file = GgufFile::open(options.model);
  const ModelWeights weights = weights_from_gguf(file);
  show_notes(model_notes(file));
  const RunInfo info = run_info("statistics", argc, argv, options.seed, build_info());
  run_table(options, info,
            {kParameters, kMeasures, {"cache",           "depth",           "layer",        "kind",
                                      "score_norm",      "score_deviation", "n_key",        "output_rms",
                                      "attention_ratio", "mlp_ratio",       "stream_rms",   "common_share",
                                      "code_error",      "attention_gain",  "stream_error", "attention_square_sum",
                                      "mlp_square_sum",  "k_norm_min",      "k_norm_max",   "k_norm_ratio",
                                      "k_norm_near_zero"}},
            [&](ResultTable& table) {
              Statistics statistics(options, weights, table);
              for (const std::int64_t depth : options.depths) {
                for (const std::string& cache : options.caches) statistics.run_depth(depth, cache);
              }
            });
  return EXIT_SUCCESS;
}

}  // namespace

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, run);
}
