// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "gemma4/plan/memory_plan.hpp"

/// The bytes of every buffer of a run, worked out from the model's shapes a second time: nothing below calls a function
/// of the plan. A buffer that is left out, counted twice or of another size is a difference of the two maps.
namespace {

using namespace gemma4;
using Bytes = std::map<std::string, std::int64_t>;

constexpr std::int64_t kMiB = 1048576;

std::int64_t up(std::int64_t value, std::int64_t multiple) {
  const std::int64_t rest = value % multiple;
  return rest == 0 ? value : value + multiple - rest;
}
/// On a device every buffer and every tensor begins at a multiple of 256 bytes.
std::int64_t up256(std::int64_t bytes) {
  return up(bytes, 256);
}

/// The widths of one layer's products.
struct LayerShape {
  std::int64_t q, kv;  ///< n_head * head_dim, n_head_kv * head_dim
  std::int64_t head_dim;
  bool sliding;
  bool wide_v, wide_down;  ///< attn_v, ffn_down in Q6_K
};

struct Shapes {
  std::string name;
  ModelConfig config;
  std::vector<LayerShape> layers;
  std::map<std::int64_t, std::int64_t> q6_row;  ///< bytes of a Q6_K row on a device, by its values

  [[nodiscard]] std::int64_t widest(std::int64_t LayerShape::*field) const {
    std::int64_t value = 0;
    for (const LayerShape& layer : layers) value = std::max(value, layer.*field);
    return value;
  }
  [[nodiscard]] std::int64_t widest_qkv() const {
    std::int64_t value = 0;
    for (const LayerShape& layer : layers) value = std::max(value, layer.q + 2 * layer.kv);
    return value;
  }
  [[nodiscard]] std::int64_t count(bool sliding) const {
    return std::count_if(layers.begin(), layers.end(), [&](const LayerShape& l) { return l.sliding == sliding; });
  }
};

/// A model whose matrices in Q6_K are the given ones: of attn_v (counted over sliding layers) and of ffn_down. The rows
/// of Q6_K on a device: 26 bytes for 32 values and half a byte of scale for 16, each chunk (5376
/// values at most, 5120 in rows of 15360) a multiple of 16 bytes.
Shapes shapes_of(std::string name, const ModelConfig& config, const std::vector<std::int64_t>& wide_v,
                 const std::vector<std::int64_t>& wide_down) {
  Shapes shapes{std::move(name),
                config,
                {},
                {{512, 432}, {768, 640}, {3840, 3152}, {5376, 4416}, {15360, 12624}, {21504, 17664}}};
  const auto has = [](const std::vector<std::int64_t>& all, std::int64_t value) {
    return std::find(all.begin(), all.end(), value) != all.end();
  };
  std::int64_t n_v = 0;
  for (std::int64_t layer = 0; layer < static_cast<std::int64_t>(config.is_sliding.size()); ++layer) {
    const bool sliding = config.is_sliding[static_cast<std::size_t>(layer)] != 0;
    const AttentionConfig& attention = sliding ? config.sliding : config.full;
    shapes.layers.push_back({.q = config.n_head * attention.head_dim,
                             .kv = attention.n_head_kv * attention.head_dim,
                             .head_dim = attention.head_dim,
                             .sliding = sliding,
                             .wide_v = sliding && has(wide_v, n_v),
                             .wide_down = has(wide_down, layer)});
    n_v += sliding;
  }
  return shapes;
}

/// The first and last eighth and every third between: llama.cpp's Q4_K_M, written out for 60 layers of which 50 slide.
Shapes shapes_31b() {
  std::vector<std::int64_t> v, down;
  for (std::int64_t i = 0; i < 50; ++i) {
    if (i < 6 || i >= 43 || i % 3 == 2) v.push_back(i);
  }
  for (std::int64_t i = 0; i < 60; ++i) {
    if (i < 7 || i >= 52 || i % 3 == 0) down.push_back(i);
  }
  return shapes_of("31b", gemma4_31b(), v, down);
}
Shapes shapes_12b() {
  std::vector<std::int64_t> v, down;
  for (std::int64_t i = 0; i < 40; ++i) {
    if (i < 5 || i >= 35 || i % 3 == 1) v.push_back(i);
  }
  for (std::int64_t i = 0; i < 48; ++i) {
    if (i < 6 || i >= 42 || i % 3 == 2) down.push_back(i);
  }
  return shapes_of("12b", gemma4_12b(), v, down);
}
Shapes shapes_nano() {
  return shapes_of("nano", gemma4_nano(), {0, 3, 6, 8, 9}, {0, 3, 6, 9, 10, 11});
}
/// nano with layers of one kind alone; every eighth of 4 is none.
Shapes shapes_one_kind(bool sliding) {
  ModelConfig config = gemma4_nano();
  config.is_sliding.assign(4, sliding ? 1 : 0);
  return shapes_of(sliding ? "sliding only" : "full only", config, {2, 3}, {2, 3});
}

struct Run {
  PlanTarget target;
  std::string cache;
  std::int64_t context, chunk, rows;
  std::int64_t max_draft = 0;
  /// A step of drafts has logits for each of them and for the token in front.
  [[nodiscard]] std::int64_t logit_rows() const { return std::max(rows, max_draft + 1); }
};

/// Bytes of a K or V vector in the flat cache: 4 bits a value and a bf16 norm with tq4.
std::int64_t vector_bytes(const std::string& cache, std::int64_t head_dim) {
  return cache == "f32" ? 4 * head_dim : cache == "bf16" ? 2 * head_dim : head_dim / 2 + 2;
}

void add_caches(const Shapes& s, const Run& run, std::int64_t context, std::int64_t n_slot, Bytes& bytes) {
  const AttentionConfig &full = s.config.full, &sliding = s.config.sliding;
  bytes["cache_full"] = s.count(false) * 2 * full.n_head_kv * context * vector_bytes(run.cache, full.head_dim);
  bytes["cache_sliding"] =
      s.count(true) * 2 * sliding.n_head_kv * n_slot * sliding.head_dim * (run.cache == "f32" ? 4 : 2);
}

void add_device_weights(const Shapes& s, Bytes& bytes) {
  const ModelConfig& c = s.config;
  const auto q4 = [](std::int64_t rows, std::int64_t cols) { return up256(rows * (cols / 256 * 144)); };
  const auto q6 = [&](std::int64_t rows, std::int64_t cols) { return up256(rows * s.q6_row.at(cols)); };
  std::int64_t &narrow = bytes["weights_Q4_K"], &wide = bytes["weights_Q6_K"], &vectors = bytes["weights_vectors"];
  bytes["weights_token_embd"] = q6(c.vocab, c.hidden);
  vectors = up256(4 * c.hidden);  // output_norm
  for (const LayerShape& layer : s.layers) {
    narrow += q4(layer.q, c.hidden) + q4(layer.kv, c.hidden) + q4(c.hidden, layer.q) + 2 * q4(c.ffn_hidden, c.hidden);
    if (layer.sliding)
      (layer.wide_v ? wide : narrow) += (layer.wide_v ? q6(layer.kv, c.hidden) : q4(layer.kv, c.hidden));
    (layer.wide_down ? wide : narrow) += (layer.wide_down ? q6(c.hidden, c.ffn_hidden) : q4(c.hidden, c.ffn_hidden));
    vectors += 4 * up256(4 * c.hidden) + 2 * up256(4 * layer.head_dim);  // the norms: 4 of the stream, q's and k's
  }
}

/// Of at most 8 tokens that take the path of decoding, each part at a multiple of 256.
std::int64_t decode_bytes(const Shapes& s, std::int64_t chunk) {
  const ModelConfig& c = s.config;
  const std::int64_t n = std::min<std::int64_t>(chunk, 8);
  return up256(n * c.hidden * 4)                         // pending, f32
         + up256(n * s.widest_qkv() * 4)                 // q, k and v as projected, f32
         + up256(n * s.widest(&LayerShape::q) * 2)       // q, then what attention gives, bf16
         + up256(n * 2 * s.widest(&LayerShape::kv) * 2)  // K and V of a sliding layer, bf16
         + up256(n * c.ffn_hidden * 2)                   // bf16
         + up256(n * 2 * c.ffn_hidden * 4);              // gate and up, f32
}

Bytes device_bytes_of(const Shapes& s, const Run& run) {
  const ModelConfig& c = s.config;
  const bool is_tq4 = run.cache.starts_with("tq4"), has_full = s.count(false) > 0;
  Bytes bytes;
  add_device_weights(s, bytes);
  const std::int64_t context = is_tq4 ? up(run.context, 16) : run.context;  // tq4: records of 16 tokens
  add_caches(s, run, context, up(c.window + 64, 64), bytes);                // rings: 64 tokens to go back, whole tiles
  bytes["residual"] = run.chunk * c.hidden * 4;
  bytes["normed"] = run.chunk * c.hidden * 2;
  bytes["pending"] = run.chunk * c.hidden * 2;
  bytes["activations"] = run.chunk * std::max(2 * c.ffn_hidden, s.widest_qkv()) * 2;
  std::int64_t largest = c.hidden * c.ffn_hidden;
  for (const LayerShape& layer : s.layers) largest = std::max(largest, c.hidden * layer.q);
  bytes["scratch"] = 2 * std::max(largest, is_tq4 && has_full ? 2 * context * c.full.head_dim : 0);
  bytes["logits"] = run.logit_rows() * c.vocab * 4;
  bytes["logit_rows"] = run.logit_rows() * c.hidden * 2;
  if (run.max_draft > 0) bytes["draft"] = 4096 + run.context * 4;  // the state of a step, and the text
  bytes["decode_activations"] = decode_bytes(s, run.chunk);
  bytes["tokens"] = 2 * up256(run.chunk * 4) + 256 + run.context;
  if (run.cache == "tq4-haar" && has_full) bytes["rotation"] = 2 * c.full.head_dim * c.full.head_dim * 4;
  // Two blocks on each of 132 multiprocessors leave 16 rows of head_dim sums, a maximum and a sum of weights, f32.
  bytes["attention_partials"] = 2 * 132 * 16 * (s.widest(&LayerShape::head_dim) + 2) * 4;
  // What no shape decides.
  bytes["linear_tickets"] = 256;
  bytes["sampler_workspace"] = kMiB;
  bytes["gemm_workspace"] = 32 * kMiB;
  bytes["cuda_context"] = 536 * kMiB;
  for (auto& [name, value] : bytes) value = up256(value);
  return bytes;
}

constexpr std::int64_t kThreads = 3;

Bytes reference_bytes_of(const Shapes& s, const Run& run) {
  const ModelConfig& c = s.config;
  Bytes bytes;
  std::int64_t& file = bytes["weights"];  // as they lie in the file: 144 or 210 bytes for 256 values, vectors in f32
  const auto q4 = [](std::int64_t size) { return size / 256 * 144; };
  const auto q6 = [](std::int64_t size) { return size / 256 * 210; };
  file = q6(c.vocab * c.hidden) + 4 * c.hidden + (s.count(false) > 0 ? 4 * c.full.head_dim / 2 : 0);
  std::int64_t widest = std::max(c.hidden, c.ffn_hidden);
  for (const LayerShape& layer : s.layers) {
    file += q4(2 * c.hidden * layer.q + c.hidden * layer.kv + 2 * c.hidden * c.ffn_hidden);
    if (layer.sliding) file += layer.wide_v ? q6(layer.kv * c.hidden) : q4(layer.kv * c.hidden);
    file += layer.wide_down ? q6(c.hidden * c.ffn_hidden) : q4(c.hidden * c.ffn_hidden);
    file += 4 * (4 * c.hidden + 2 * layer.head_dim + 1);
    widest = std::max(widest, layer.q);
  }
  add_caches(s, run, run.context, up(c.window + 64, 64), bytes);
  const std::int64_t q = s.widest(&LayerShape::q), kv = s.widest(&LayerShape::kv);
  bytes["residual"] = 3 * run.chunk * c.hidden * 4;      // the stream, normalised, pending
  bytes["qkv"] = 2 * run.chunk * (q + 2 * kv) * 4;       // old and new
  bytes["attended"] = 4 * run.chunk * q * 4;             // q rotated, its result, old and new
  bytes["mlp"] = 2 * run.chunk * c.ffn_hidden * 4;       // old and new
  bytes["logits"] = 2 * run.logit_rows() * c.vocab * 4;  // raw and capped
  bytes["weight_tiles"] = kThreads * 2 * 128 * (widest + run.chunk) * 4;
  const std::int64_t head_dim = std::max(c.sliding.head_dim, c.full.head_dim);  // whether there are such layers or not
  bytes["attention_tiles"] = kThreads * (5 * 256 * head_dim + 256 * 256) * 4;
  return bytes;
}

std::string text(const Bytes& bytes) {
  std::string all;
  for (const auto& [name, value] : bytes) all += "  " + name + " " + std::to_string(value) + "\n";
  return all;
}

void expect_every_buffer(const Shapes& s, const Run& run) {
  Bytes expected = run.target == PlanTarget::kCuda ? device_bytes_of(s, run) : reference_bytes_of(s, run);
  std::erase_if(expected, [](const auto& item) { return item.second == 0; });
  const MemoryPlan plan = plan_memory(s.config, model_tensors(s.config),
                                      {.target = run.target,
                                       .context = run.context,
                                       .chunk = run.chunk,
                                       .cache = parse_cache_spec(run.cache),
                                       .n_logit_row = run.rows,
                                       .max_draft = run.max_draft,
                                       .n_thread = kThreads});
  Bytes actual;
  std::int64_t sum = 0;
  for (const PlannedBuffer& buffer : plan.buffers) {
    EXPECT_FALSE(actual.contains(buffer.name)) << buffer.name << " is there twice";
    actual[buffer.name] = buffer.bytes;
  }
  for (const auto& [name, value] : expected) sum += value;
  const std::string what = s.name + ", " + run.cache + (run.target == PlanTarget::kCuda ? " on a device" : "") +
                           ", context " + std::to_string(run.context) + ", chunk " + std::to_string(run.chunk);
  EXPECT_EQ(actual, expected) << what << "\nplanned:\n" << text(actual) << "expected:\n" << text(expected);
  EXPECT_EQ(plan.total_bytes(), sum) << what;
  EXPECT_TRUE(plan.fits(sum)) << what;
  EXPECT_FALSE(plan.fits(sum - 1)) << what;
}

TEST(MemoryPlanBuffers, EveryOneIsOfItsShapes) {
  for (const Shapes& s : {shapes_31b(), shapes_12b(), shapes_nano(), shapes_one_kind(true), shapes_one_kind(false)}) {
    for (const char* cache : {"f32", "bf16", "tq4", "tq4-haar"}) {
      for (const auto target : {PlanTarget::kCuda, PlanTarget::kReference}) {
        for (const std::int64_t context : {1, 100, 131072}) {
          for (const std::int64_t chunk : {1, 7, 8, 9, 2048}) {
            for (const std::int64_t rows : {1, 5}) expect_every_buffer(s, {target, cache, context, chunk, rows});
            expect_every_buffer(s, {target, cache, context, chunk, 2, 3});
          }
        }
      }
    }
  }
}

TEST(MemoryPlanBuffers, BothWidthsOfTheActivationsOccur) {  // the control: either of the two can be the wider one
  EXPECT_GT(2 * shapes_31b().config.ffn_hidden, shapes_31b().widest_qkv());
  EXPECT_LT(2 * shapes_nano().config.ffn_hidden, shapes_nano().widest_qkv());
}

}  // namespace
