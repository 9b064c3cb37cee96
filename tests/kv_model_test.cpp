// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "gemma4/gguf/gguf_writer.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/plan/step_bytes.hpp"
#include "reference/backend.hpp"
#include "tests/support/model_logits.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/small_model.hpp"

/// Models over a cache of one vector for K and V: which of them can have it, what it does to them, and that a spread of
/// the weights of k's norm does nothing more.
namespace {

using namespace gemma4;
using namespace gemma4::testkit;

std::vector<std::int32_t> text(const ModelConfig& config, std::int64_t n_token) {
  std::vector<std::int32_t> tokens;
  for (std::int64_t i = 0; i < n_token; ++i) {
    tokens.push_back(static_cast<std::int32_t>(mix_bits(static_cast<std::uint64_t>(i) + 77) %
                                               static_cast<std::uint64_t>(config.vocab)));
  }
  return tokens;
}

template <class Scalar = float>
std::vector<float> logits(const ModelWeights& weights, const std::string& cache,
                          const std::vector<std::int64_t>& chunks = {96}) {
  reference::Backend<Scalar> backend(weights, {.cache = parse_cache_spec(cache), .context = 96, .max_chunk = 96});
  return logits_of(backend, text(weights.config, 96), chunks);
}

/// |a - b| / |b| over all logits.
double relative(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, square = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    error += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
    square += std::pow(static_cast<double>(b[i]), 2);
  }
  return std::sqrt(error / square);
}

/// A small model, every layer full, in which k's norm has its weights times s and q's norm over s, a factor for each
/// pair of places that RoPE turns together: the same model.
class SpreadModel {
 public:
  template <class TFactor>
  SpreadModel(const SmallModel& small, const TFactor& factor) : weights(small.weights) {
    const auto n_layer = weights.layers.size();
    norms_.resize(2 * n_layer);
    for (std::size_t layer = 0; layer < n_layer; ++layer) {
      if (weights.config.sliding_layer(static_cast<std::int64_t>(layer))) continue;
      LayerWeights& of = weights.layers[layer];
      std::vector<float>&k = norms_[2 * layer], &q = norms_[2 * layer + 1];
      k.assign(of.attn_k_norm.begin(), of.attn_k_norm.end());
      q.assign(of.attn_q_norm.begin(), of.attn_q_norm.end());
      for (std::size_t i = 0; i < k.size(); ++i) {
        const float s = factor(layer, i % (k.size() / 2));
        k[i] *= s;
        q[i] /= s;
      }
      of.attn_k_norm = k;
      of.attn_q_norm = q;
    }
  }
  ModelWeights weights;

 private:
  std::vector<std::vector<float>> norms_;
};

class KvModel : public testing::Test {
 protected:
  static ModelConfig config() {
    ModelConfig config = gemma4_tiny();
    config.is_sliding = {1, 0, 0};
    return config;
  }
  const SmallModel small_{config(), 5};
};

/// Powers of two from 2^-3 to 2^4, a spread of 128 to 1.
float power_of_two(std::size_t layer, std::size_t pair) {
  return std::ldexp(1.0f, static_cast<int>(mix_bits(101 * layer + pair) % 8) - 3);
}

TEST_F(KvModel, ASpreadByPowersOfTwoChangesNoBit) {
  const SpreadModel spread(small_, power_of_two);
  for (const char* cache : {"f32", "kv16r16", "kv5r4", "kv3r3", "kv4r4-raw"}) {
    EXPECT_EQ(logits(spread.weights, cache), logits(small_.weights, cache)) << cache;
  }
  EXPECT_NE(logits(spread.weights, "tq4"), logits(small_.weights, "tq4")) << "the control: codes of K see the spread";
}

/// Any spread over 100 to 1. The scale of R is the weight up to a factor of 2, so that by Kantorovich's inequality the
/// squared error of R's part of a score grows by at most (2 + 1/2)^2 / 4 = 1.56 and its error by 1.25; V's part stays
/// as it is. With what the draw of the codes moves over 96 x 1024 logits, 1.5 is stated.
TEST_F(KvModel, ASpreadOfAHundredToOneKeepsTheAccuracy) {
  const SpreadModel spread(small_, [](std::size_t layer, std::size_t pair) {
    const double u = static_cast<double>(mix_bits(77 * layer + pair) >> 11) * 0x1p-53;
    return static_cast<float>(std::pow(100.0, u - 0.5));
  });
  const std::vector<float> exact = logits(small_.weights, "f32"), spread_exact = logits(spread.weights, "f32");
  ASSERT_LE(relative(spread_exact, exact), 1e-4) << "the same model";
  const auto growth = [&](const char* cache) {
    return relative(logits(spread.weights, cache), spread_exact) / relative(logits(small_.weights, cache), exact);
  };
  for (const char* cache : {"kv5r4", "kv4r4", "kv6r5", "kv3r3"}) {
    EXPECT_LE(growth(cache), 1.5) << cache;
    EXPECT_GE(growth(cache), 1 / 1.5) << cache;
  }
  EXPECT_GE(growth("tq4"), 2) << "the control: codes of K lose by it";
}

/// More bits, less error; V and R both count; unquantised storage is next to nothing.
TEST_F(KvModel, ErrorsAreOrderedByTheirBits) {
  const std::vector<float> exact = logits(small_.weights, "f32");
  const auto error = [&](const char* cache) { return relative(logits(small_.weights, cache), exact); };
  EXPECT_LT(error("kv6r5"), 0.8 * error("kv5r4"));
  EXPECT_LT(error("kv5r4"), 0.8 * error("kv4r4"));
  EXPECT_LT(error("kv4r4"), 0.8 * error("kv3r3"));
  EXPECT_LT(error("kv6r6"), error("kv6r3"));
  EXPECT_LT(error("kv16r16"), 0.5 * error("kv6r6"));
  EXPECT_LT(error("kv5r4"), 0.8 * error("tq4"));
}

/// In double, so that no code flips with the order of a sum.
TEST_F(KvModel, AnyChunksGiveTheSame) {
  for (const char* cache : {"kv5r4", "kv16r16"}) {
    const std::vector<float> whole = logits<double>(small_.weights, cache);
    for (const std::vector<std::int64_t>& chunks : {std::vector<std::int64_t>{7}, {1, 1, 30, 2, 50}}) {
      EXPECT_LE(relative(logits<double>(small_.weights, cache, chunks), whole), 1e-6) << cache;
    }
    EXPECT_GT(relative(logits<double>(small_.weights, "kv4r4"), whole), 1e-3) << "the control: another format";
  }
}

// ---- which models can have it

TEST_F(KvModel, LayersWithValuesOfTheirOwnAreRefusedByName) {
  ModelWeights own = small_.weights;
  const std::int64_t kv_dim = own.layers[2].attn_k.rows;
  own.layers[2].attn_v = own.layers[2].attn_k;
  const auto backend = [](const ModelWeights& weights, const char* cache) {
    return [&weights, cache] {
      reference::Backend<float>(weights, {.cache = parse_cache_spec(cache), .context = 16, .max_chunk = 8});
    };
  };
  EXPECT_TRUE(refuses(backend(own, "kv5r4"), {"cache kv5r4", "full layer 2", "blk.2.attn_v.weight", "choose tq4"}));
  EXPECT_TRUE(refuses(backend(own, "kv16r16"), {"cache kv16r16", "full layer 2"}));
  EXPECT_NO_THROW(backend(small_.weights, "kv5r4")()) << "the control";

  // Other formats take the layer's own values. K's projection once more is what the layer had anyway.
  for (const char* cache : {"f32", "tq4"}) {
    EXPECT_EQ(logits(own, cache), logits(small_.weights, cache)) << cache;
    ModelWeights other = own;
    other.layers[2].attn_v = {own.layers[1].attn_k.type, kv_dim, own.layers[1].attn_k.cols, own.layers[1].attn_k.data};
    EXPECT_GT(relative(logits(other, cache), logits(own, cache)), 1e-2) << cache << ", the control: other values";
  }

  std::vector<ModelTensor> tensors = model_tensors(*small_.file);
  MemoryPlanOptions options{.context = 64, .chunk = 16, .cache = parse_cache_spec("kv4r4")};
  EXPECT_NO_THROW((void)plan_memory(own.config, tensors, options));
  tensors.push_back({"blk.2.attn_v.weight", TensorType::kQ4K, {own.config.hidden, kv_dim}});
  for (const PlanTarget target : {PlanTarget::kCuda, PlanTarget::kReference}) {
    options.target = target;
    EXPECT_TRUE(refuses([&] { (void)plan_memory(own.config, tensors, options); }, {"cache kv4r4", "full layer 2"}));
  }
  options.cache = parse_cache_spec("tq4");
  EXPECT_NO_THROW((void)plan_memory(own.config, tensors, options));
}

/// An attn_v in the file of a full layer is bound; one that no layer has is a stranger still.
TEST_F(KvModel, AFileMayBringValuesOfAFullLayer) {
  const auto with = [&](const std::string& name) {
    const std::filesystem::path path = small_.directory.file("own-" + name + ".gguf");
    GgufWriter writer(path);
    gemma4::detail::set_model_keys(writer, small_.weights.config, 15);
    set_vocabulary_keys(writer, small_.weights.config.vocab);
    const GgufTensor& k = small_.file->tensor("blk.2.attn_k.weight");
    for (const GgufTensor& tensor : small_.file->tensors()) writer.add_tensor(tensor.name, tensor.type, tensor.dims);
    writer.add_tensor(name, k.type, k.dims);
    for (const GgufTensor& tensor : small_.file->tensors()) writer.append(tensor.name, tensor.data);
    writer.append(name, k.data);
    writer.finish();
    return path;
  };
  const GgufFile file = GgufFile::open(with("blk.2.attn_v.weight"));
  const ModelWeights own = weights_from_gguf(file);
  EXPECT_TRUE(own.layers[1].attn_v.empty());
  ASSERT_FALSE(own.layers[2].attn_v.empty());
  EXPECT_EQ(logits(own, "bf16"), logits(small_.weights, "bf16"));
  EXPECT_TRUE(refuses([&] { (void)logits(own, "kv5r4"); }, {"full layer 2"}));
  const GgufFile strange = GgufFile::open(with("blk.3.attn_v.weight"));
  EXPECT_THROW((void)weights_from_gguf(strange), FormatError);
}

TEST_F(KvModel, MoreRotatedPlacesThanTheFormatKeepsAreRefused) {
  ModelWeights turned = small_.weights;
  const auto run = [&](const char* cache) { return [&, cache] { (void)logits(turned, cache); }; };
  turned.config.full.rope_pairs = 17;
  EXPECT_TRUE(refuses(run("kv5r4"), {"cache kv5r4", "turns 17 pairs of head_dim 128", "head_dim / 8 = 16", "tq4"}));
  EXPECT_NO_THROW(run("tq4")());
  const MemoryPlanOptions options{.context = 64, .chunk = 16, .cache = parse_cache_spec("kv5r4")};
  EXPECT_TRUE(refuses([&] { (void)plan_memory(turned.config, model_tensors(*small_.file), options); }, {"17 pairs"}));
  turned.config.full.rope_pairs = 9;  // R then holds some values that nothing turns: exact all the same
  const std::vector<float> exact = logits(turned, "f32");
  EXPECT_LE(relative(logits(turned, "kv16r16"), exact), 1e-2);
}

// ---- what it takes

TEST(KvPlan, CacheOf31BAndWhatAStepReads) {
  const ModelConfig config = gemma4_31b();
  const std::vector<ModelTensor> tensors = model_tensors(config);
  for (const auto& [name, bytes] : {std::pair{"kv5r4", 388}, {"kv4r4", 324}, {"kv6r5", 468}, {"kv16r16", 1280}}) {
    MemoryPlanOptions options{.cache = parse_cache_spec(name)};
    EXPECT_EQ(plan_memory(config, tensors, options).bytes("cache_full"), 10LL * 4 * 131072 * bytes) << name;
    const auto read = [&](const char* cache) {
      return step_read_bytes(config, tensors, parse_cache_spec(cache), 130048).cache;
    };
    EXPECT_EQ(read(name) - read("tq4"), 10LL * 4 * 130048 * (bytes - 516)) << name;
    for (const std::int64_t context : {1, 16, 17}) {  // records of 16 tokens on a device
      options.context = context;
      options.target = PlanTarget::kCuda;
      EXPECT_EQ(plan_memory(config, tensors, options).bytes("cache_full"),
                (10LL * 4 * ((context + 15) / 16 * 16) * bytes + 255) / 256 * 256);
      options.target = PlanTarget::kReference;
      EXPECT_EQ(plan_memory(config, tensors, options).bytes("cache_full"), 10LL * 4 * context * bytes);
    }
  }
  const auto rotation = [&](const char* name) {
    for (const PlannedBuffer& buffer : plan_memory(config, tensors, {.cache = parse_cache_spec(name)}).buffers) {
      if (buffer.name == "rotation") return buffer.bytes;
    }
    return std::int64_t{0};
  };
  EXPECT_EQ(rotation("kv5r4"), 0);
  EXPECT_EQ(rotation("kv5r4-haar"), 2 * 4 * (512 * 512 + 128 * 128));
}

}  // namespace
