// SPDX-License-Identifier: Apache-2.0
#include "cuda/layer_cache.cuh"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "cuda/device/device_arena.cuh"
#include "cuda/device/device_buffer.cuh"
#include "cuda/device/stream.cuh"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "reference/layer_cache.hpp"
#include "reference/rms_norm.hpp"
#include "reference/rope.hpp"
#include "tests/support/attention_case.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"

/// The caches of every format by themselves: what store(), attend() and commit() do to a few chunks of random q, k and
/// v, against the reference's cache of the same format.
namespace {

using namespace gemma4;

constexpr std::int64_t kContext = 96;

/// A name of every format in the list, and of what is built of its parts.
const std::vector<std::string> kFormats = {
    "bf16",     "tq4",          "tq4-k3v2", "tq4-haar",     "sim-int8",           "sim-q8_0",
    "sim-q4_0", "sim-k4v4-had", "sim-k6v3", "sim-t4l8-had", "sim-k4v4-had-tail8", "sim-int8-tail16-sink4",
    "kv5r4",    "kv4r4",        "kv6r5",    "kv3r3",        "kv5r4-haar",         "kv16r16"};

ModelConfig two_layers() {
  ModelConfig config = gemma4_tiny();
  config.is_sliding = {true, false};
  return config;
}

/// The caches on a device with memory of their own.
struct Caches {
  explicit Caches(const ModelConfig& config, const std::string& format, const ExecutionPolicy& policy = {},
                  const std::string& ring = "bf16")
      : config(config), policy(policy) {
    MemoryPlanOptions options{.context = kContext, .chunk = 64, .cache = parse_cache_spec(format)};
    options.sm_count = device.sm_count;
    const MemoryPlan plan = plan_memory(config, model_tensors(config), options);
    arena = cuda::DeviceArena(plan, [](const std::string& name) {
      return name.starts_with("cache_") || name == "scratch" || name == "attention_partials";
    });
    caches = std::make_unique<cuda::LayerCaches>(config, options.cache, kContext, device, arena, parse_ring_spec(ring));
    caches->fill_bytes(0xFF, stream);  // NaN: nothing that was not stored may be read
    mask = cuda::DeviceBuffer<std::uint8_t>(kContext);
    caches->set_mask(mask.data());
  }

  /// One chunk through a layer. @return [n_token, n_head * head_dim]
  /// @param as_rows each with the bits of a step of its own, at once
  template <class TIn>
  std::vector<float> attend(std::int64_t layer, const reference::Qkv<float>& raw, const cuda::QkNorms& norms,
                            std::int64_t position, bool as_rows = false) {
    const AttentionConfig& attention = config.attention(layer);
    const std::int64_t n = raw.q.rows(), head_dim = attention.head_dim;
    const auto upload = [&](const reference::Matrix<float>& m) {
      std::vector<TIn> values(static_cast<std::size_t>(m.size()));
      for (std::size_t i = 0; i < values.size(); ++i) values[i] = from_float<TIn>(m.data()[i]);
      return cuda::DeviceBuffer<TIn>(std::span<const TIn>(values));
    };
    const cuda::DeviceBuffer<TIn> q = upload(raw.q), k = upload(raw.k), v = upload(raw.v);
    cuda::DeviceBuffer<Bf16> q_out(raw.q.size()), k_out(raw.k.size()), v_out(raw.v.size());
    const auto heads = [&](auto* data, std::int64_t cols) { return make_view(data, n, cols / head_dim, head_dim); };
    cuda::ProjectedHeads<TIn> projected;
    projected.q = heads(const_cast<TIn*>(q.data()), raw.q.cols());
    projected.k = heads(const_cast<TIn*>(k.data()), raw.k.cols());
    projected.v = heads(const_cast<TIn*>(v.data()), raw.v.cols());
    projected.q_out = heads(q_out.data(), raw.q.cols());
    projected.k_out = heads(k_out.data(), raw.k.cols());
    projected.v_out = heads(v_out.data(), raw.v.cols());
    std::vector<std::int32_t> at(static_cast<std::size_t>(n));
    for (std::size_t i = 0; i < at.size(); ++i)
      at[i] = static_cast<std::int32_t>(position) + static_cast<std::int32_t>(i);
    const cuda::DeviceBuffer<std::int32_t> positions{std::span<const std::int32_t>(at)};
    const cuda::ChunkPlace chunk{.n_token = n,
                                 .position = cuda::DeviceCount::on_host(position),
                                 .kv_len = cuda::DeviceCount::on_host(position + n),
                                 .positions = positions.data()};
    if (as_rows) {
      store_and_attend_rows(layer, projected, norms, positions.data(), n);
      stream.synchronize();
      return as_floats(q_out.to_host(stream));
    }
    const cuda::LayerCachePlan plan = caches->plan(n, position + n, policy);
    if (plan.masks) {
      std::vector<std::uint8_t> shown(kContext, 0);
      std::fill_n(shown.begin(), position + n, std::uint8_t{1});
      cuda::check(cudaMemcpyAsync(mask.data(), shown.data(), shown.size(), cudaMemcpyHostToDevice, stream), "mask");
    }
    caches->store(layer, projected, norms, chunk, plan, stream);
    caches->attend(layer, projected, norms, chunk, plan, stream);
    if (caches->commits(layer, plan)) caches->commit(layer, projected, chunk, stream);
    stream.synchronize();
    return as_floats(q_out.to_host(stream));
  }

  [[nodiscard]] cuda::LayerCachePlan plan_rows(std::int64_t n_row) const {
    ExecutionPolicy of_one = policy;
    of_one.launch_overlap = false;
    return caches->plan_rows(n_row, of_one, policy);
  }
  [[nodiscard]] std::vector<std::byte> full_bytes() {
    const std::span<std::byte> bytes = arena.buffer("cache_full");
    std::vector<std::byte> copy(bytes.size());
    cuda::check(cudaMemcpyAsync(copy.data(), bytes.data(), bytes.size(), cudaMemcpyDeviceToHost, stream), "copy");
    stream.synchronize();
    return copy;
  }
  [[nodiscard]] static std::vector<float> as_floats(const std::vector<Bf16>& from) {
    std::vector<float> values;
    for (const Bf16 value : from) values.push_back(to_float(value));
    return values;
  }
  template <class TIn>
  void store_and_attend_rows(std::int64_t layer, const cuda::ProjectedHeads<TIn>& projected, const cuda::QkNorms& norms,
                             const std::int32_t* positions, std::int64_t n) {
    std::vector<std::int32_t> lens(static_cast<std::size_t>(n));
    cuda::check(cudaMemcpy(lens.data(), positions, lens.size() * sizeof(lens[0]), cudaMemcpyDeviceToHost), "copy");
    for (std::int32_t& len : lens) ++len;
    const cuda::DeviceBuffer<std::int32_t> kv_lens{std::span<const std::int32_t>(lens)};
    const cuda::ChunkPlace chunk{.n_token = n,
                                 .position = cuda::DeviceCount::on_device(positions),
                                 .kv_len = cuda::DeviceCount::on_device(kv_lens.data() + n - 1),
                                 .positions = positions};
    const cuda::LayerCachePlan plan = plan_rows(n);
    ASSERT_TRUE(caches->attends_rows(layer, plan)) << caches->rows(plan).back().why;
    caches->store_rows(layer, projected, norms, chunk, plan, stream);
    caches->attend_rows(layer, projected, norms, chunk, kv_lens.data(), plan, stream);
  }

  ModelConfig config;
  ExecutionPolicy policy;
  cuda::DeviceInfo device = cuda::current_device();
  cuda::Stream stream;
  cuda::DeviceArena arena;
  cuda::DeviceBuffer<std::uint8_t> mask;
  std::unique_ptr<cuda::LayerCaches> caches;
};

/// Random projections of a chunk, in bf16 so that both sides begin with the same numbers.
reference::Qkv<float> random_projection(const ModelConfig& config, std::int64_t layer, std::int64_t n,
                                        std::uint64_t seed) {
  const AttentionConfig& attention = config.attention(layer);
  const auto matrix = [&](std::uint64_t stream, std::int64_t n_head) {
    const std::vector<float> values = testkit::draw(16 * seed + stream, n * n_head * attention.head_dim, 1.0f);
    reference::Matrix<float> m(n, n_head * attention.head_dim);
    for (Eigen::Index i = 0; i < m.size(); ++i) m.data()[i] = to_float(to_bf16(values[static_cast<std::size_t>(i)]));
    return m;
  };
  reference::Qkv<float> out{matrix(1, config.n_head), matrix(2, attention.n_head_kv), {}};
  out.v = config.sliding_layer(layer) ? matrix(3, attention.n_head_kv) : out.k;
  return out;
}

/// What the graph of the reference does to them before its cache.
reference::Qkv<float> normalised(const ModelConfig& config, std::int64_t layer, reference::Qkv<float> qkv,
                                 std::span<const float> q_norm, std::span<const float> k_norm, std::int64_t position) {
  const AttentionConfig& attention = config.attention(layer);
  const auto norm = [&](reference::Matrix<float>& m, std::span<const float> weight) {
    reference::MatrixMap<float> heads = reference::as_heads(m, attention.head_dim);
    reference::rms_norm<float>(heads, weight, config.rms_epsilon, heads);
  };
  norm(qkv.q, q_norm), norm(qkv.k, k_norm), norm(qkv.v, {});
  reference::rope<float>(qkv.q, position, attention);
  reference::rope<float>(qkv.k, position, attention);
  if (!config.sliding_layer(layer)) qkv.k_norm = k_norm;
  return qkv;
}

double relative_error(const std::vector<float>& actual, const reference::Matrix<float>& expected) {
  double difference = 0, length = 0;
  for (Eigen::Index i = 0; i < expected.size(); ++i) {
    const double e = static_cast<double>(expected.data()[i]);
    const double d = static_cast<double>(actual[static_cast<std::size_t>(i)]) - e;
    difference += d * d, length += e * e;
  }
  return std::sqrt(difference / length);
}

struct Weights {
  std::vector<float> q, k;
  cuda::DeviceBuffer<float> q_device, k_device;
  explicit Weights(std::int64_t head_dim)
      : q(static_cast<std::size_t>(head_dim), 0.35f),
        k(testkit::draw(5, head_dim, 0.25f)),
        q_device(std::span<const float>(q)),
        k_device(std::span<const float>(k)) {
    for (float& value : k) value += 0.35f;  // all different: a cache that reads K from V must know them
    k_device = cuda::DeviceBuffer<float>(std::span<const float>(k));
  }
};

/// Chunks of every path: a flash prefill, a few tokens, one token, and one token again.
const std::vector<std::int64_t> kChunks = {40, 3, 1, 7, 1};

/// The largest relative error over the chunks; `off` moves the positions that the reference is told.
double worst_error(const std::string& format, std::int64_t layer, const ExecutionPolicy& policy, std::int64_t off = 0,
                   const std::string& ring = "bf16", const std::string& expected_ring = "") {
  const ModelConfig config = two_layers();
  Caches device(config, format, policy, ring);
  auto expected = reference::make_layer_caches<float>(config, parse_cache_spec(format), kContext,
                                                      parse_ring_spec(expected_ring.empty() ? ring : expected_ring));
  const Weights weights(config.attention(layer).head_dim);
  const cuda::QkNorms norms{weights.q_device.data(), weights.k_device.data(), config.rms_epsilon};
  double worst = 0;
  std::int64_t position = 0;
  for (std::size_t i = 0; i < kChunks.size(); ++i) {
    const reference::Qkv<float> raw = random_projection(config, layer, kChunks[i], 7 * i + 1);
    const std::vector<float> actual = kChunks[i] > kDecodeChunk ? device.attend<Bf16>(layer, raw, norms, position)
                                                                : device.attend<float>(layer, raw, norms, position);
    reference::Qkv<float> turned = normalised(config, layer, raw, weights.q, weights.k, position);
    if (off != 0) turned.k = normalised(config, layer, raw, weights.q, weights.k, position + off).k;
    const reference::Matrix<float> right = std::visit([&](auto& cache) { return cache.attend(turned, position); },
                                                      expected[static_cast<std::size_t>(layer)]);
    worst = std::max(worst, relative_error(actual, right));
    position += kChunks[i];
  }
  return worst;
}

/// q, K, V, the weights and the result are rounded to bf16 or better (2^-9 of each, five of them, and scores of
/// deviation below 4 that feel two of them as an absolute error): 5 * 2^-9 + 4 * 2 * 2^-9 = 2.6 %. Where codes are cut
/// a value near a boundary may get its neighbour: with 4 bits at most one in fifty does (2^-8 of a step of 0.3), which
/// moves 2 % of the values by a step, sqrt(0.02) * 0.3 = 4 %; 2 bits have steps of 1 and a third of the boundaries.
double bound_of(const std::string& format) {
  const double rounding = 0.026;
  if (format == "bf16" || format == "kv16r16") return rounding;
  if (format.starts_with("kv3")) return rounding + 0.08;
  if (format.ends_with("v2") || format.ends_with("v3")) return rounding + 0.08;
  return rounding + 0.04;
}

TEST(LayerCache, EveryFormatAttendsAsItsReference) {
  for (const std::string& format : kFormats) {
    EXPECT_LE(worst_error(format, 1, {}), bound_of(format)) << format;
    EXPECT_GT(worst_error(format, 1, {}, 1), bound_of(format)) << format << ": the control, K one position off";
  }
  EXPECT_LE(worst_error("bf16", 0, {}), bound_of("bf16")) << "a ring";
  EXPECT_GT(worst_error("bf16", 0, {}, 1), bound_of("bf16")) << "the control, K one position off";
}

/// A ring of few bits on both sides agrees within the bound of its format, a plain one beside it does not: 2 bits are
/// an error of a third.
TEST(LayerCache, ASimulatedRingIsThatOfTheReferenceInEveryPath) {
  for (const char* ring : {"sim-int8", "sim-k4v4-had", "sim-k6v6-had", "sim-t4l8-had"}) {
    EXPECT_LE(worst_error("bf16", 0, {}, 0, ring), bound_of("tq4")) << ring;
    EXPECT_GT(worst_error("bf16", 0, {}, 1, ring), bound_of("tq4")) << ring << ": the control, K one position off";
    for (const ExecutionSwitch& entry : kExecutionSwitches) {
      if (entry.scope != SwitchScope::kStep) continue;
      ExecutionPolicy policy;
      policy.*entry.field = false;
      EXPECT_LE(worst_error("bf16", 0, policy, 0, ring), bound_of("tq4")) << ring << " without " << entry.name;
    }
  }
  EXPECT_GT(worst_error("bf16", 0, {}, 0, "sim-k2v2-had", "bf16"), bound_of("tq4")) << "the control, a plain ring";
  EXPECT_LE(worst_error("bf16", 1, {}, 0, "sim-k2v2-had", "bf16"), bound_of("bf16")) << "a full layer has none of it";
}

TEST(LayerCache, EverySwitchLeavesWhatAnyFormatSays) {
  for (const ExecutionSwitch& entry : kExecutionSwitches) {
    if (entry.scope != SwitchScope::kStep) continue;
    ExecutionPolicy policy;
    policy.*entry.field = false;
    for (const char* format : {"bf16", "tq4", "sim-k4v4-had", "sim-k4v4-had-tail8", "kv5r4", "kv16r16"}) {
      EXPECT_LE(worst_error(format, 1, policy), bound_of(format)) << format << " without " << entry.name;
    }
    EXPECT_LE(worst_error("bf16", 0, policy), bound_of("bf16")) << "a ring without " << entry.name;
  }
}

TEST(LayerCache, TheSameCallsTwiceHaveTheSameBits) {
  const ModelConfig config = two_layers();
  for (const std::string& format : kFormats) {
    const auto run = [&] {
      Caches device(config, format);
      const Weights weights(config.full.head_dim);
      const cuda::QkNorms norms{weights.q_device.data(), weights.k_device.data(), config.rms_epsilon};
      std::vector<float> all = device.attend<Bf16>(1, random_projection(config, 1, 40, 3), norms, 0);
      const std::vector<float> more = device.attend<float>(1, random_projection(config, 1, 2, 4), norms, 40);
      all.insert(all.end(), more.begin(), more.end());
      return all;
    };
    EXPECT_EQ(run(), run()) << format;
  }
}

/// Results and records. Control: rows one position on differ.
TEST(LayerCache, RowsAtOnceAreThoseOfAStepEach) {
  const ModelConfig config = two_layers();
  const Weights weights(config.full.head_dim);
  const cuda::QkNorms norms{weights.q_device.data(), weights.k_device.data(), config.rms_epsilon};
  for (const char* format : {"kv5r4", "kv4r4", "kv3r6", "kv5r4-haar", "tq4", "tq4-haar", "bf16"}) {
    for (const auto& [position, n_row] : {std::pair<std::int64_t, std::int64_t>{20, 4}, {29, 8}, {46, 3}}) {
      Caches at_once(config, format), one_by_one(config, format), control(config, format);
      const reference::Qkv<float> before = random_projection(config, 1, 50, 3);
      for (Caches* device : {&at_once, &one_by_one, &control}) device->attend<Bf16>(1, before, norms, 0);
      const reference::Qkv<float> raw = random_projection(config, 1, n_row, 4);
      const std::vector<float> found = at_once.attend<float>(1, raw, norms, position, true);
      std::vector<float> expected;
      for (std::int64_t row = 0; row < n_row; ++row) {
        const reference::Qkv<float> one{raw.q.row(row), raw.k.row(row), raw.v.row(row)};
        const std::vector<float> out = one_by_one.attend<float>(1, one, norms, position + row);
        expected.insert(expected.end(), out.begin(), out.end());
      }
      EXPECT_EQ(found, expected) << format << ", " << n_row << " rows from position " << position << " on";
      EXPECT_EQ(at_once.full_bytes(), one_by_one.full_bytes()) << format << ", the records";
      EXPECT_NE(control.attend<float>(1, raw, norms, position + 1, true), expected) << format << ", the control";
    }
  }
}

TEST(LayerCache, PlansOfRowsSayWhetherTheyGoAtOnceAndWhyNot) {
  const ModelConfig config = two_layers();
  const auto row = [&](const char* format, const ExecutionPolicy& policy, std::int64_t n_row) {
    Caches device(config, format, policy);
    return device.caches->rows(device.plan_rows(n_row)).at(2);
  };
  EXPECT_EQ(row("kv5r4", {}, 4).path, "kv5r4 decode, 4 rows at once");
  EXPECT_EQ(row("kv5r4", {}, 4).why, "");
  EXPECT_NE(row("kv5r4", {}, 2).why.find("two rows take less time one by one"), std::string::npos);
  EXPECT_EQ(row("tq4", {}, 2).path, "tq4 decode, 2 rows in one launch");
  EXPECT_EQ(row("tq4", {}, 4).why, "");
  EXPECT_NE(row("bf16", {}, 4).path.find(", 4 rows in one launch"), std::string::npos);
  for (const char* format : {"tq4-k3v3", "sim-k4v4-had", "kv16r16"}) {
    const StepPlanRow found = row(format, {}, 4);
    EXPECT_EQ(found.path.find("4 rows one by one: "), 0u) << found.path;
    EXPECT_NE(found.why.find("not at once: "), std::string::npos) << format << ": " << found.why;
  }
  ExecutionPolicy policy;
  policy.qkv_prologue_fusion = false;
  EXPECT_NE(row("kv5r4", policy, 4).why.find("a launch each"), std::string::npos);
}

TEST(LayerCache, PlansSayWhichPathAndWhyNot) {
  const ModelConfig config = two_layers();
  Caches device(config, "tq4");
  const auto row = [&](std::int64_t n_token, const ExecutionPolicy& policy, std::size_t i) {
    return device.caches->rows(device.caches->plan(n_token, kContext, policy)).at(i);
  };
  EXPECT_EQ(row(1, {}, 0).component, "qkv_prologue");
  EXPECT_NE(row(1, {}, 2).path.find("tq4 decode"), std::string::npos);
  EXPECT_NE(row(40, {}, 2).path.find("unpack"), std::string::npos);
  ExecutionPolicy policy;
  policy.split_k = false;
  EXPECT_EQ(row(1, policy, 2).n_split, 1);
  policy = {};
  policy.kv_len_clamp = false;
  EXPECT_NE(row(1, policy, 2).why.find("mask"), std::string::npos);
  EXPECT_EQ(row(40, policy, 2), row(40, {}, 2)) << "it acts in a step alone";
  Caches simulated(config, "sim-int8-tail8", {}, "sim-int8");
  const StepPlanRow ring = simulated.caches->rows(simulated.caches->plan(1, kContext, {})).at(1);
  EXPECT_NE(ring.path.find("over sim-int8"), std::string::npos) << ring.path;
  EXPECT_NE(ring.why.find("the ring is simulated"), std::string::npos) << ring.why;
}

TEST(LayerCache, PlansOfOneVectorSayWhichKernel) {
  const ModelConfig config = two_layers();
  const auto row = [&](const char* format, std::int64_t n_token) {
    Caches device(config, format);
    return device.caches->rows(device.caches->plan(n_token, kContext, {})).at(2);
  };
  EXPECT_EQ(row("kv5r4", 1).path, "kv5r4 decode");
  EXPECT_EQ(row("kv5r4", kDecodeChunk).path, "kv5r4 decode");
  EXPECT_NE(row("kv5r4", kDecodeChunk + 1).path.find("kv5r4 unpack"), std::string::npos);
  EXPECT_NE(row("kv16r16", 1).path.find("kv16r16 unpack"), std::string::npos);
  EXPECT_NE(row("kv16r16", 1).why, "");
}

TEST(LayerCache, RefusesTheFormatThatNoDeviceHas) {
  EXPECT_TRUE(testkit::refuses([] { const Caches caches(two_layers(), "f32"); }, {"f32", "bf16 or tq4"}));
  EXPECT_TRUE(testkit::refuses([] { const Caches caches(two_layers(), "sim-kvarn-k4v2"); },
                               {"sim-kvarn-k4v2", "reference alone"}));
}

}  // namespace
