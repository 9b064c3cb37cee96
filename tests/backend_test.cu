// SPDX-License-Identifier: Apache-2.0
#include "cuda/backend.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <iostream>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "cuda/device/allocation_count.cuh"
#include "gemma4/model/golden.hpp"
#include "reference/backend.hpp"
#include "tests/support/backend_case.cuh"
#include "tests/support/close.hpp"
#include "tests/support/layer_streams.hpp"
#include "tests/support/model_logits.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/small_model.hpp"

/// The whole model on the device against the reference on small random models, and what must not depend on how a
/// sequence is cut, on what was there before, or on a switch.
namespace {

using namespace gemma4;
using testkit::any_config;
using testkit::any_tokens;
using testkit::BothRooms;
using testkit::kRounding;
using testkit::layer_by_layer;
using testkit::Layers;
using testkit::logits_close;
using testkit::logits_of;
using testkit::rounding_of;
using testkit::rows_close;
using testkit::SmallModel;
using testkit::stream_of;

const std::filesystem::path kData = GEMMA4_TEST_DATA;

cuda::BackendOptions small_options(const std::string& cache, std::int64_t context = 128) {
  return {.cache = parse_cache_spec(cache), .context = context, .max_chunk = 100, .n_logit_row = 100};
}

std::string any_cache() {
  return *rc::gen::element<std::string>("tq4", "bf16", "tq4-k3v2", "tq4-haar", "kv5r4", "kv4r4", "kv6r5");
}

/// The same and simulated ones, for what must hold to the bit. (How near they come is layer_cache_test's.)
std::string any_format() {
  return *rc::gen::element<std::string>("tq4", "bf16", "tq4-haar", "sim-int8", "sim-q4_0", "sim-k4v4-had", "kv5r4",
                                        "kv3r6", "kv16r16", "sim-t4l8-had", "sim-int8-tail8-sink2");
}

RC_GTEST_PROP(CudaBackend, LogitsAreThoseOfTheReference, ()) {
  const SmallModel small(any_config(), *rc::gen::inRange<std::uint64_t>(0, 1000));
  const auto tokens = any_tokens(small.weights.config, *rc::gen::inRange(1, 90));
  const std::string cache = any_cache();
  BothRooms both(small.weights, *small.file, small_options(cache));
  const std::vector<float> expected = logits_of(both.reference, tokens, {100});
  testkit::rc_require(logits_close(both, logits_of(both.device, tokens, {100}), expected, tokens, cache), "one chunk");
  testkit::rc_require(logits_close(both, logits_of(both.device, tokens, {1}), expected, tokens, cache),
                      "token by token");
}

RC_GTEST_PROP(CudaBackend, ChunkLengthsDoNotChangeTheResult, ()) {
  const SmallModel small(any_config(), 7);
  const auto tokens = any_tokens(small.weights.config, *rc::gen::inRange(1, 100));
  const auto chunks =
      *rc::gen::nonEmpty(rc::gen::container<std::vector<std::int64_t>>(rc::gen::inRange<std::int64_t>(1, 60)));
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const std::string cache = any_cache();
  cuda::Backend backend(packed, small_options(cache));
  const std::vector<float> whole = logits_of(backend, tokens, {100});
  testkit::rc_require(
      rows_close(logits_of(backend, tokens, chunks), whole, small.weights.config.vocab, rounding_of(cache)));
  RC_ASSERT(logits_of(backend, tokens, chunks) == logits_of(backend, tokens, chunks));
}

TEST(CudaBackend, AWindowShortByOneKeyExceedsTheRounding) {  // the control of the properties above
  ModelConfig config = gemma4_tiny();
  config.window = 5;
  SmallModel small(config, 3);
  std::vector<std::int32_t> tokens(30);
  std::iota(tokens.begin(), tokens.end(), 100);
  reference::Backend<float> right(small.weights, {.cache = parse_cache_spec("bf16"), .context = 30, .max_chunk = 30});
  const std::vector<float> expected = logits_of(right, tokens, {30});
  const cuda::PackedModel packed(small.weights, model_tensors(*small.file));
  cuda::Backend same(packed, small_options("bf16"));
  EXPECT_TRUE(rows_close(logits_of(same, tokens, {30}), expected, config.vocab, kRounding));
  small.weights.config.window = 4;
  const cuda::PackedModel shorter(small.weights, model_tensors(*small.file));
  cuda::Backend wrong(shorter, small_options("bf16"));
  EXPECT_FALSE(rows_close(logits_of(wrong, tokens, {30}), expected, config.vocab, 2 * kRounding));
}

RC_GTEST_PROP(CudaBackend, EveryLayersOutputIsThatOfTheReference, ()) {
  const SmallModel small(any_config(), 11);
  const ModelConfig& config = small.weights.config;
  const auto tokens = any_tokens(config, *rc::gen::element(1, 5, 40));
  BothRooms both(small.weights, *small.file, small_options("bf16"));
  const auto residuals = [&](auto& backend) {
    Model model(backend);
    std::vector<std::vector<float>> all;
    model.forward(tokens, {}, [&](std::int64_t) {
      backend.copy_residual(all.emplace_back(tokens.size() * static_cast<std::size_t>(config.hidden)));
    });
    return all;
  };
  const auto actual = residuals(both.device), expected = residuals(both.reference);
  RC_ASSERT(actual.size() == expected.size());
  for (std::size_t layer = 0; layer < actual.size(); ++layer) {
    testkit::rc_require(rows_close(actual[layer], expected[layer], config.hidden, kRounding),
                        "layer " + std::to_string(layer));
  }
  // Looking leaves no trace.
  const std::vector<float> logits = logits_of(both.device, tokens, {100});
  Model<cuda::Backend> model(both.device);
  std::vector<std::int64_t> rows(tokens.size());
  std::iota(rows.begin(), rows.end(), 0);
  std::vector<float> residual(tokens.size() * static_cast<std::size_t>(config.hidden));
  model.forward(tokens, rows, [&](std::int64_t) { both.device.copy_residual(residual); });
  std::vector<float> row(static_cast<std::size_t>(config.vocab));
  both.device.copy_logits(0, row);
  RC_ASSERT(std::equal(row.begin(), row.end(), logits.begin()));
}

/// How far a layer may be off that begins with the numbers of the other side: a branch by 1.1 % of itself (see
/// kRounding), the attended value by 3.5 % at most where q and k are off by 1 %, and a branch is no more than the
/// stream: 3 %. Where a TQ4 cache makes more of it, how much is asked of the reference: twice what noise of 1 % does to
/// the layer, in the worst of all rows of two draws; three times where rows are few: a boundary is crossed or not.
double layer_bound(reference::Backend<float>& backend, std::span<const std::int32_t> tokens, const Layers& before,
                   const Layers& after, std::size_t layer, bool is_tq4) {
  double bound = 0.03;
  for (const std::uint32_t seed : {1u, 2u}) {
    if (!is_tq4) break;
    const Layers noisy = layer_by_layer(backend, tokens, before, 0.01, seed);
    const double moved = testkit::row_error(noisy[layer], after[layer], backend.config().hidden).worst;
    bound = std::max(bound, (tokens.size() < 10 ? 3 : 2) * moved);
  }
  return bound;
}

RC_GTEST_PROP(CudaBackend, EveryLayerByItselfIsThatOfTheReference, ()) {
  const SmallModel small(any_config(), 12);
  const ModelConfig& config = small.weights.config;
  const auto tokens = any_tokens(config, *rc::gen::element(6, 40));
  const std::string cache = any_cache();
  BothRooms both(small.weights, *small.file, small_options(cache));
  const Layers device = stream_of(both.device, tokens);
  const Layers expected = layer_by_layer(both.reference, tokens, device, 0, 0);
  for (std::size_t layer = 0; layer < expected.size(); ++layer) {
    const bool is_tq4 = cache != "bf16" && !config.sliding_layer(static_cast<std::int64_t>(layer));
    const double bound = layer_bound(both.reference, tokens, device, expected, layer, is_tq4);
    const std::string where = cache + ", layer " + std::to_string(layer);
    testkit::rc_require(rows_close(device[layer + 1], expected[layer], config.hidden, bound), where);
    // An error without direction leans on the stream by 1 / sqrt(n) of its length, n being 6 rows of 256 values at
    // least: a quarter of it is ten deviations.
    testkit::rc_require(testkit::scale_close(device[layer + 1], expected[layer], bound / 4), where);
  }
}

/// The control of the property above: keys in fewer bits, or another rotation, is another cache.
TEST(CudaBackend, ALayerWithAnotherCacheExceedsItsBound) {
  const SmallModel small(gemma4_tiny(), 12);
  const ModelConfig& config = small.weights.config;
  std::vector<std::int32_t> tokens(40);
  std::iota(tokens.begin(), tokens.end(), 100);
  BothRooms both(small.weights, *small.file, small_options("tq4"));
  const Layers device = stream_of(both.device, tokens);
  const Layers expected = layer_by_layer(both.reference, tokens, device, 0, 0);
  std::size_t full = 0;
  while (config.sliding_layer(static_cast<std::int64_t>(full))) ++full;
  const double bound = layer_bound(both.reference, tokens, device, expected, full, true);
  EXPECT_TRUE(rows_close(device[full + 1], expected[full], config.hidden, bound));
  for (const char* other : {"tq4-k3v4", "tq4-haar"}) {
    reference::Backend<float> wrong(small.weights,
                                    {.cache = parse_cache_spec(other), .context = 128, .max_chunk = 100});
    const Layers layers = layer_by_layer(wrong, tokens, device, 0, 0);
    EXPECT_FALSE(rows_close(device[full + 1], layers[full], config.hidden, bound)) << other;
  }
}

RC_GTEST_PROP(CudaBackend, ASecondSequenceSeesNothingOfTheFirst, ()) {
  const SmallModel small(any_config(), 9);
  const auto first = any_tokens(small.weights.config, 100), second = any_tokens(small.weights.config, 70);
  const std::vector<std::int64_t> chunks = {*rc::gen::inRange<std::int64_t>(1, 70), 1};
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const cuda::BackendOptions options = small_options(any_format());
  cuda::Backend used(packed, options), fresh(packed, options);
  (void)logits_of(used, first, {100});
  used.poison(*rc::gen::element(0xFF, 0x7F, 0x5A));  // 0xFFFF is a NaN in bf16 and f16, 0x7F7F a huge number
  RC_ASSERT(logits_of(used, second, chunks) == logits_of(fresh, second, chunks));
}

TEST(CudaBackend, PoisonWouldShowWhereItIsRead) {  // the control of the property above
  const SmallModel small(gemma4_tiny(), 9);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  cuda::Backend clean(packed, small_options("bf16")), poisoned(packed, small_options("bf16"));
  const std::vector<std::int32_t> tokens(20, 5);
  const auto after = [&](cuda::Backend& backend, bool poison) {
    Model<cuda::Backend> model(backend);
    model.reset();
    (void)logits_of(model, tokens, {20});
    if (poison) backend.poison(0x3F);
    return logits_of(model, std::span(tokens).first(1), {1});
  };
  EXPECT_NE(after(clean, false), after(poisoned, true)) << "what the sequence itself left is read";
}

/// Logits of another implementation in float32 arithmetic; here activations are 8 or 16 bits.
double mean_kl(const std::string& name, const std::string& cache, std::int64_t chunk, std::int64_t& n_same) {
  const GgufFile file = GgufFile::open(kData / (name + ".gguf"));
  const GoldenLogits golden = read_golden_logits(kData / (name + "-logits.gguf"));
  const cuda::PackedModel packed = cuda::load_model(file);
  cuda::Backend backend(packed, {.cache = parse_cache_spec(cache),
                                 .context = static_cast<std::int64_t>(golden.ids.size()),
                                 .max_chunk = chunk,
                                 .n_logit_row = chunk});
  const auto vocab = static_cast<std::size_t>(golden.vocab);
  double sum = 0;
  n_same = 0;
  const std::vector<float> logits = logits_of(backend, golden.ids, {chunk});
  for (std::size_t i = 0; i < golden.positions.size(); ++i) {
    const auto row = std::span(logits).subspan(static_cast<std::size_t>(golden.positions[i]) * vocab, vocab);
    const PositionAccuracy accuracy = compare_logits(row, golden.row(i), 0);
    sum += accuracy.kl;
    n_same += accuracy.same_top;
  }
  std::cout << name << " " << cache << " chunk " << chunk << ": mean KL "
            << sum / static_cast<double>(golden.positions.size()) << ", same top " << n_same << " of "
            << golden.positions.size() << "\n";
  return sum / static_cast<double>(golden.positions.size());
}

/// Acceptance figures, not derived: what a cache and 8-bit activations may do to the logits of a small model that
/// another implementation computed in float32. The reference has a mean KL of 8e-5 and 1.2e-3 on tiny with bf16 and tq4
/// and the golden's top token at 32 and 33, and 32 and 30, of the 33 positions of its two files; the device has in
/// addition 8-bit activations in chunks of one, and bf16 in longer ones. Of top tokens it may lose one more than the
/// reference with bf16 and two with tq4, 31 and 28: those of the golden whose two first logits are nearly equal, which
/// a rounding puts in another order.
struct Acceptance {
  const char* cache;
  double mean_kl;
  std::int64_t n_same;
};

void expect_golden(const std::string& name, std::int64_t chunk, std::initializer_list<Acceptance> figures) {
  for (const Acceptance& figure : figures) {
    std::int64_t n_same = 0;
    EXPECT_LE(mean_kl(name, figure.cache, chunk, n_same), figure.mean_kl)
        << name << ", " << figure.cache << ", in chunks of " << chunk;
    EXPECT_GE(n_same, figure.n_same) << name << ", " << figure.cache << ", in chunks of " << chunk;
  }
}

TEST(CudaBackend, GoldenLogitsOfTiny) {
  for (const char* name : {"tiny/tiny-a-Q4_K_M", "tiny/tiny-a-Q6_K"}) {
    for (const std::int64_t chunk : {256, 1}) expect_golden(name, chunk, {{"bf16", 5e-3, 31}, {"tq4", 2e-2, 28}});
  }
}

TEST(CudaBackend, GoldenLogitsOfNano) {
  for (const std::int64_t chunk : {2048, 1}) {
    expect_golden("nano/nano-Q4_K_M", chunk, {{"bf16", 5e-3, 15}, {"tq4", 1e-2, 15}});
  }
}

RC_GTEST_PROP(CudaBackend, EverySwitchIsASlowerPathToTheSameResult, ()) {
  const SmallModel small(any_config(), 13);
  const auto tokens = any_tokens(small.weights.config, 60);
  const cuda::PackedModel packed = cuda::load_model(*small.file);
  const std::string cache = any_cache();
  const cuda::BackendOptions options = small_options(cache);
  cuda::Backend plain(packed, options);
  const std::vector<std::int64_t> chunks = {40, 3, 1};
  const std::vector<float> expected = logits_of(plain, tokens, chunks);
  for (const ExecutionSwitch& entry : kExecutionSwitches) {
    if (entry.scope != SwitchScope::kStep) continue;
    cuda::BackendOptions other = options;
    other.policy.*entry.field = false;
    cuda::Backend backend(packed, other);
    const std::vector<float> actual = logits_of(backend, tokens, chunks);
    testkit::rc_require(rows_close(actual, expected, small.weights.config.vocab, rounding_of(cache)));
    const bool has_same_bits = entry.field == &ExecutionPolicy::launch_overlap ||
                               entry.field == &ExecutionPolicy::causal_skip ||
                               entry.field == &ExecutionPolicy::dynamic_rows;
    RC_ASSERT(!has_same_bits || actual == expected);
  }
  const cuda::PackedModel apart = cuda::load_model(*small.file, {.join_gate_up = false});
  cuda::Backend unfused(apart, options);
  RC_ASSERT(logits_of(unfused, tokens, chunks) == expected);
}

class CudaBackendRefuses : public testing::Test {
 protected:
  void SetUp() override { packed_.emplace(cuda::load_model(*small_.file)); }  // not reached where there is no GPU

  testing::AssertionResult refuses(const cuda::BackendOptions& options, const std::vector<std::string>& parts) {
    const std::int64_t before = cuda::allocation_count().device_bytes;
    const testing::AssertionResult result =
        testkit::refuses([&] { const cuda::Backend backend(*packed_, options); }, parts);
    EXPECT_EQ(cuda::allocation_count().device_bytes, before) << "memory was kept";
    return result;
  }

  SmallModel small_{gemma4_tiny(), 1};
  std::optional<cuda::PackedModel> packed_;
};

TEST_F(CudaBackendRefuses, WhatItHasNotAndKeepsNoMemory) {
  EXPECT_TRUE(refuses({.context = 131073}, {"context 131073", "131072"}));
  EXPECT_TRUE(refuses({.context = 0}, {"context 0"}));
  EXPECT_TRUE(refuses({.context = 64, .max_chunk = 0}, {"max_chunk 0"}));
  EXPECT_TRUE(refuses({.context = 64, .n_logit_row = 0}, {"n_logit_row 0"}));
  EXPECT_TRUE(refuses({.cache = parse_cache_spec("f32"), .context = 64}, {"f32", "bf16 or tq4"}));
}

TEST_F(CudaBackendRefuses, MoreMemoryThanThereIsAndSaysWhatWouldFit) {
  const cuda::BackendOptions wanted{.context = 131072, .max_chunk = 2048};
  const std::int64_t sm_count = cuda::current_device().sm_count;
  const std::int64_t need =
      plan_memory(packed_->config(), packed_->tensors(), memory_plan_options(wanted, sm_count)).total_bytes();
  cuda::BackendOptions limited = wanted;
  limited.memory_limit_bytes = need - 1;
  EXPECT_TRUE(refuses(limited, {"a context of 131072", "a chunk of"}));
  // What it says fits does.
  const MemoryPlanOptions plan = memory_plan_options(wanted, sm_count);
  limited.context = *largest_context(packed_->config(), packed_->tensors(), plan, need - 1);
  EXPECT_LT(limited.context, 131072);
  EXPECT_NO_THROW({ const cuda::Backend backend(*packed_, limited); });
  limited.memory_limit_bytes = 1 << 20;
  EXPECT_TRUE(refuses(limited, {"no context and no chunk"}));
  limited.memory_limit_bytes = 0;
  limited.context = 64;
  cuda::Backend works(*packed_, limited);
  EXPECT_EQ(logits_of(works, std::vector<std::int32_t>{1, 2, 3}, {1}).size(), 3u * 1024);
}

TEST_F(CudaBackendRefuses, AFullContextAndTooManyLogits) {
  cuda::Backend backend(*packed_, {.context = 10, .max_chunk = 8, .n_logit_row = 2});
  Model<cuda::Backend> model(backend);
  const std::vector<std::int32_t> tokens(11, 7);
  EXPECT_TRUE(testkit::refuses([&] { model.prefill(tokens, 4, [](std::int64_t) {}); }, {"position 0 + 11 tokens"}));
  EXPECT_EQ(model.position(), 0);
  model.prefill(std::span(tokens).first(10), 4, [](std::int64_t) {});
  EXPECT_TRUE(testkit::refuses([&] { model.decode(7); }, {"the caches hold 10"}));
  model.reset();
  const std::vector<std::int64_t> rows = {0, 1, 2};
  EXPECT_TRUE(testkit::refuses([&] { model.forward(std::span(tokens).first(4), rows); }, {"n_logit_row"}));
  const std::vector<std::int32_t> bad = {1, 2, 1024};
  model.reset();
  EXPECT_TRUE(testkit::refuses([&] { model.forward(bad, {}); }, {"token 1024 at position 2"}));
  std::vector<float> logits(1024);
  EXPECT_TRUE(testkit::refuses([&] { backend.copy_logits(0, logits); }, {"logits of row 0, there are 0"}));
}

TEST(CudaBackendMemory, PlannedIsAllocatedAndGivenBack) {
  const SmallModel small(gemma4_tiny(), 1);
  {
    const cuda::PackedModel warm = cuda::load_model(*small.file);
    cuda::Backend backend(warm, small_options("tq4"));
  }
  const std::int64_t before = cuda::device_bytes_in_use(), own_before = cuda::allocation_count().device_bytes;
  for (const char* cache : {"tq4", "bf16", "tq4-haar", "kv5r4", "kv5r4-haar", "kv16r16"}) {
    const cuda::PackedModel packed = cuda::load_model(*small.file);
    const cuda::BackendOptions options{.cache = parse_cache_spec(cache), .context = 65536, .max_chunk = 512};
    cuda::Backend backend(packed, options);
    std::int64_t planned = 0, weights = 0;
    for (const PlannedBuffer& buffer : backend.plan().buffers) {
      if (buffer.name == "cuda_context") continue;
      planned += buffer.bytes;
      weights += buffer.name.starts_with("weights_") ? buffer.bytes : 0;
    }
    EXPECT_EQ(packed.bytes(), weights);
    const std::int64_t rotation = std::string(cache).ends_with("-haar") ? backend.plan().bytes("rotation") : 0;
    EXPECT_EQ(packed.bytes() + backend.device_bytes() + rotation, planned);
    std::vector<std::int32_t> tokens(1000, 3);
    Model<cuda::Backend> model(backend);
    model.prefill(tokens, 512, [](std::int64_t) {});
    model.decode(5);
    EXPECT_EQ(cuda::allocation_count().device_bytes - own_before, planned) << cache;
    // The driver rounds each allocation up to 2 MiB; kernels that are loaded late take some, once.
    EXPECT_NEAR(static_cast<double>(cuda::device_bytes_in_use() - before), static_cast<double>(planned),
                3.0 * (2 << 20))
        << cache;
  }
  EXPECT_EQ(cuda::allocation_count().device_bytes, own_before);
  EXPECT_LE(cuda::device_bytes_in_use() - before, 2 << 20);
}

}  // namespace
