// SPDX-License-Identifier: Apache-2.0
// How fast is attention over a long cache, and how far from the memory and from the matrix units?
#include <algorithm>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "experiments/benchmark.cuh"
#include "experiments/driver.hpp"
#include "experiments/gpu_run_info.cuh"
#include "experiments/support/attention_caches.cuh"
#include "experiments/support/attention_measure.cuh"
#include "experiments/support/attention_rows.cuh"
#include "experiments/support/sliding_measure.cuh"
#include "gemma4/config.hpp"
#include "gemma4/plan/memory_plan.hpp"

namespace gemma4::experiment {
namespace {

struct Options {
  DriverOptions driver;
  std::vector<std::string> one_vector = {"kv5r4", "kv4r4"};
  int tile = -1;  ///< of kKvDecodeTiles, where it takes the format; -1: as planned
  std::vector<std::int64_t> n_queries = {1, 4, 8, 2048};
  std::vector<std::int64_t> rows = {};  ///< drafted rows of a step
  std::int64_t buffer_len = 131072;
  std::int64_t n_head = 32, n_head_kv = 4, head_dim = 512;
};

/// A sliding layer of the 31B model with the ring that its steps of so many tokens have.
AttentionShape ring_of_steps(std::int64_t n_token) {
  return {.batch = 1,
          .n_query = n_token,
          .n_head = 32,
          .n_head_kv = 16,
          .head_dim = 256,
          .buffer_len = ring_slots(gemma4_31b().window)};
}

/// A full layer's.
AttentionShape full_shape(const Options& options, std::int64_t n_query) {
  return {.batch = 1,
          .n_query = n_query,
          .n_head = options.n_head,
          .n_head_kv = options.n_head_kv,
          .head_dim = options.head_dim,
          .buffer_len = options.buffer_len};
}

/// Drafted rows, which must have the bits of a call each: at once, and in a call each.
void add_rows(const Options& options, std::vector<Case>& cases) {
  for (const std::int64_t n_row : options.rows) {
    const AttentionShape shape = full_shape(options, n_row);
    for (const std::int64_t context : options.driver.contexts) {
      if (context < n_row || context > options.buffer_len) continue;
      for (const char* const phase : {"rows", "rows_apart"}) {
        cases.push_back({"tq4", phase, shape, context});
        for (const std::string& kind : options.one_vector) cases.push_back({kind, phase, shape, context});
        cases.push_back({"bf16", phase, shape, context});
      }
    }
  }
}

std::vector<Case> cases_of(const Options& options) {
  std::vector<Case> cases;
  add_rows(options, cases);
  for (const std::int64_t n_query : options.n_queries) {
    AttentionShape shape = full_shape(options, n_query);
    for (const std::int64_t context : options.driver.contexts) {
      if (context < n_query || context > options.buffer_len) continue;
      const std::string phase = n_query <= cuda::kTq4DecodeQueries ? "decode" : "prefill";
      cases.push_back({"tq4", phase, shape, context});
      for (const std::string& kind : options.one_vector) {
        cases.push_back({kind, n_query <= cuda::kKvDecodeQueries ? "decode" : "prefill", shape, context});
      }
      cases.push_back({"bf16", phase, shape, context});
    }
    const std::int64_t update_end = std::min(options.buffer_len, std::int64_t{60000} + n_query);
    cases.push_back({"tq4", "update", shape, update_end});
    for (const std::string& kind : options.one_vector) cases.push_back({kind, "update", shape, update_end});
    // A sliding layer of the 31B model; its context is beyond the first window.
    const AttentionShape ring{
        .batch = 1, .n_query = n_query, .n_head = 32, .n_head_kv = 16, .head_dim = 256, .buffer_len = 1024};
    cases.push_back({"sliding", n_query <= cuda::kTq4DecodeQueries ? "decode" : "prefill", ring, 5000 + n_query});
    if (n_query == 1) cases.push_back({"sliding", "step", ring_of_steps(1), 5001});
  }
  for (const std::int64_t n_row : options.rows) {
    if (n_row < 2) continue;
    for (const char* const phase : {"rows", "rows_apart"}) {
      cases.push_back({"sliding", phase, ring_of_steps(n_row), 5000 + n_row});
    }
  }
  return cases;
}

void write_row(ResultTable& table, const Case& c, const Measurement& m, double copy_rate, double gemm_rate) {
  const double gb_per_s = 1e-3 * m.bytes / m.timing.median_us, tflops = 1e-6 * m.flop / m.timing.median_us;
  auto row = table.row();
  row.set("kind", c.kind).set("phase", c.phase).set("n_query", c.shape.n_query).set("context", c.context);
  row.set("n_head", c.shape.n_head).set("n_head_kv", c.shape.n_head_kv).set("head_dim", c.shape.head_dim);
  row.set("buffer_len", c.shape.buffer_len).set("median_us", m.timing.median_us).set("p10_us", m.timing.p10_us);
  row.set("p90_us", m.timing.p90_us).set("n_repeat", m.timing.n_repeat).set("bytes", m.bytes);
  row.set("gb_per_s", gb_per_s).set("ratio_to_copy", gb_per_s / copy_rate).set("copy_gb_per_s", copy_rate);
  row.set("gemm_tflop_per_s", gemm_rate);
  if (m.flop > 0) {
    row.set("tflop_per_s", tflops).set("ratio_to_gemm", tflops / gemm_rate).set("cosine", m.cosine);
  }
  if (!(m.cosine >= 0.9999)) {
    row.fail(concat("cosine ", m.cosine, " with the reference is below 0.9999"));
  } else {
    row.commit();
  }
}

const TableShape kShape = {{"kind", "phase", "n_query", "context", "n_head", "n_head_kv", "head_dim", "buffer_len"},
                           {"median_us", "p10_us", "p90_us", "n_repeat", "bytes", "gb_per_s", "tflop_per_s",
                            "ratio_to_copy", "ratio_to_gemm", "copy_gb_per_s", "gemm_tflop_per_s", "cosine"},
                           {"kind", "phase", "n_query", "context", "median_us", "p10_us", "p90_us", "gb_per_s",
                            "ratio_to_copy", "tflop_per_s", "cosine", "status"}};

/// An attention over a cache of a full layer.
template <class TCaches>
Measurement measure_attended(const Case& c, TCaches& caches, std::uint32_t seed, cudaStream_t stream) {
  if (c.phase != "rows" && c.phase != "rows_apart") return measure_attention(c, caches, seed, stream);
  DraftedRows<TCaches> rows(caches, c.phase == "rows");
  return measure_attention(c, rows, seed, stream);
}

/// Or an update.
template <class TCaches>
Measurement measure_full(const Case& c, TCaches& caches, std::uint32_t seed, cudaStream_t stream) {
  return c.phase == "update" ? measure_update(c, caches, seed, stream) : measure_attended(c, caches, seed, stream);
}

Measurement measure_sliding(const Case& c, std::uint32_t seed, cudaStream_t stream) {
  if (c.phase == "step") return measure_sliding_step(c, seed, stream);
  if (c.phase == "rows" || c.phase == "rows_apart") return measure_sliding_rows(c, c.phase == "rows", seed, stream);
  return measure_sliding_attention(c, seed, stream);
}

void measure(const Options& options, ResultTable& table) {
  const cuda::Stream stream;
  const auto seed = static_cast<std::uint32_t>(options.driver.seed);
  const double copy_rate = copy_gb_per_s(stream), gemm_rate = gemm_tflops(stream);
  const std::vector<Case> cases = cases_of(options);
  Tq4Caches tq4(cases.front().shape, seed, stream);
  std::map<std::string, KvCaches> one_vector;
  for (const std::string& name : options.one_vector) {
    const std::optional<KvFormat> format = KvFormat::parse(name);
    require(format && format->options.has_codes(), "--one-vector: '", name, "' is no format of codes; the grammar is ",
            KvFormat::grammar());
    one_vector.try_emplace(name, *format, options.tile, cases.front().shape, seed, stream);
  }
  Progress bar("attention", static_cast<std::int64_t>(cases.size()), progress_options(options.driver, "case"));
  const auto measure_case = [&](const Case& c) {
    if (c.kind == "sliding") return measure_sliding(c, seed, stream);
    if (c.kind == "tq4") return measure_full(c, tq4, seed, stream);
    if (c.kind != "bf16") return measure_full(c, one_vector.at(c.kind), seed, stream);
    Bf16Caches bf16(c.shape, seed, stream);
    return measure_attended(c, bf16, seed, stream);
  };
  for (const Case& c : cases) {
    const Measurement m = measure_case(c);
    write_row(table, c, m, copy_rate, gemm_rate);
    bar.advance();
  }
}

void run(int argc, char** argv) {
  CLI::App app("How fast attention and the cache update are, against the memory's and the matrix units' rates.");
  Options options;
  options.driver.contexts = {512, 2048, 8192, 32768, 131072};
  add_contexts(app, options.driver);
  add_whole(app, "--n-query", options.n_queries, "Queries of a call, and new tokens of an update, comma-separated",
            {1, 4096})
      ->delimiter(',');
  add_whole(app, "--rows", options.rows,
            "Drafted rows, at once and in a call each, over each cache and over a ring, comma-separated",
            {1, cuda::kMostRows})
      ->delimiter(',');
  app.add_option("--one-vector", options.one_vector, "Formats of one vector for K and V, comma-separated")
      ->delimiter(',')
      ->capture_default_str();
  add_whole(app, "--one-vector-tile", options.tile, "Compiled configuration of their decode, by number; -1: as planned",
            {-1, static_cast<std::int64_t>(cuda::kKvDecodeTiles.size()) - 1});
  add_whole(app, "--buffer", options.buffer_len, "Tokens that a cache holds", {4096, std::int64_t{1} << 20});
  add_seed(app, options.driver);
  add_out(app, options.driver);
  add_quiet(app, options.driver);
  parse(app, argc, argv);

  const RunInfo info = gpu_run_info("attention", argc, argv, options.driver.seed);
  run_table(options.driver, info, kShape, [&](ResultTable& table) { measure(options, table); });
}

}  // namespace
}  // namespace gemma4::experiment

int main(int argc, char** argv) {
  return gemma4::experiment::run_main(argc, argv, gemma4::experiment::run);
}
