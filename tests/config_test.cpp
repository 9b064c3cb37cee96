// SPDX-License-Identifier: Apache-2.0
#include "gemma4/config.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "gemma4/config_json.hpp"
#include "gemma4/gguf/config_from_gguf.hpp"
#include "gemma4/gguf/gguf_writer.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/synthetic/synthetic_model.hpp"
#include "tests/support/temp_dir.hpp"

namespace {

using namespace gemma4;

const std::filesystem::path kData = GEMMA4_TEST_DATA;

std::int64_t matrix_weights(const ModelConfig& config) {
  std::int64_t weights = config.vocab * config.hidden;
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    const AttentionConfig& attention = config.attention(layer);
    const std::int64_t q = config.n_head * attention.head_dim, kv = attention.n_head_kv * attention.head_dim;
    weights += config.hidden * (2 * q + (config.sliding_layer(layer) ? 2 : 1) * kv + 3 * config.ffn_hidden);
  }
  return weights;
}

TEST(Config, Gemma4Of31BHasItsParameters) {
  const ModelConfig config = gemma4_31b();
  require_config(config);
  EXPECT_EQ(config.n_layer(), 60);
  EXPECT_EQ(config.n_full_layer(), 10);
  EXPECT_EQ(matrix_weights(config), 30'696'013'824) << "29.287 G in the layers and 1.409 G in the embedding";
  EXPECT_FALSE(config.sliding_layer(5)) << "every sixth layer is full";
  EXPECT_FALSE(config.sliding_layer(59));
  EXPECT_TRUE(config.sliding_layer(0));
}

TEST(Config, Gemma4Of12BHasItsParameters) {
  const ModelConfig config = gemma4_12b();
  require_config(config);
  EXPECT_EQ(config.n_layer(), 48);
  EXPECT_EQ(config.n_full_layer(), 8);
  EXPECT_EQ(config.n_head / config.full.n_head_kv, 16);
  EXPECT_EQ(matrix_weights(config), 11'906'580'480) << "10.900 G in the layers and 1.007 G in the embedding";
  EXPECT_EQ(config_from_name("12b"), config);
}

TEST(Config, TheAttentionOfThe12BComesBackFromMetadata) {
  const testkit::TempDir folder;
  ModelConfig config = gemma4_12b();
  config.vocab = 300, config.hidden = config.ffn_hidden = 256;
  config.is_sliding = {1, 0};
  write_synthetic_model(folder.file("m.gguf"), config);
  EXPECT_EQ(weights_from_gguf(GgufFile::open(folder.file("m.gguf"))).config, config);
}

TEST(Config, GgufMetadataGivesTheSameShapes) {
  EXPECT_EQ(config_from_gguf(GgufFile::open(kData / "nano/nano-Q4_K_M.gguf")), gemma4_nano());
  EXPECT_EQ(config_from_gguf(GgufFile::open(kData / "tiny/tiny-a-Q4_K_M.gguf")), gemma4_tiny());
  EXPECT_EQ(config_from_gguf(GgufFile::open(kData / "tiny/tiny-a-Q6_K.gguf")), gemma4_tiny());
}

TEST(Config, EveryFieldOutOfRangeIsRefusedByName) {
  struct Case {
    const char* field;
    std::function<void(ModelConfig&)> spoil;
  };
  const Case cases[] = {
      {"vocab", [](ModelConfig& c) { c.vocab = 0; }},
      {"hidden", [](ModelConfig& c) { c.hidden = -1; }},
      {"ffn_hidden", [](ModelConfig& c) { c.ffn_hidden = 0; }},
      {"n_head", [](ModelConfig& c) { c.n_head = 0; }},
      {"context", [](ModelConfig& c) { c.context = 0; }},
      {"n_layer", [](ModelConfig& c) { c.is_sliding.clear(); }},
      {"rms_epsilon", [](ModelConfig& c) { c.rms_epsilon = 0; }},
      {"softcap", [](ModelConfig& c) { c.softcap = -30; }},
      {"window", [](ModelConfig& c) { c.window = 0; }},
      {"sliding head_dim", [](ModelConfig& c) { c.sliding.head_dim = 96; }},
      {"full head_dim", [](ModelConfig& c) { c.full.head_dim = 1024; }},
      {"full n_head_kv", [](ModelConfig& c) { c.full.n_head_kv = 5; }},
      {"sliding rope_theta", [](ModelConfig& c) { c.sliding.rope_theta = 0; }},
      {"full rope_pairs", [](ModelConfig& c) { c.full.rope_pairs = 300; }},
  };
  for (const Case& c : cases) {
    ModelConfig config = gemma4_31b();
    c.spoil(config);
    try {
      require_config(config);
      FAIL() << c.field;
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find(c.field), std::string::npos) << error.what();
    }
  }
}

/// What else than keys is changed in a file.
struct Tensors {
  std::string dropped = {};
  std::string added = {};              ///< F32 with 4 zeros
  std::vector<float> rope_freqs = {};  ///< what rope_freqs.weight holds instead; empty: what it held
};

/// The tiny model written anew, with single keys and tensors changed, dropped or added.
class ConfigFromGguf : public testing::Test {
 protected:
  using Keys = std::map<std::string, std::function<void(GgufWriter&, const std::string&)>>;

  template <class T>
  static auto value(T value) {
    return [value](GgufWriter& writer, const std::string& key) { writer.set(key, value); };
  }
  template <class T>
  static auto array(std::vector<T> items) {
    return [items](GgufWriter& writer, const std::string& key) { writer.set_array(key, items); };
  }
  static auto u32(std::uint32_t number) { return value(number); }

  static Keys tiny_keys() {
    return {{"general.architecture", value(std::string("gemma4"))},
            {"gemma4.block_count", u32(6)},
            {"gemma4.embedding_length", u32(256)},
            {"gemma4.feed_forward_length", u32(512)},
            {"gemma4.attention.head_count", u32(4)},
            {"gemma4.attention.head_count_kv", array(std::vector<std::uint32_t>{2, 2, 2, 2, 2, 1})},
            {"gemma4.attention.layer_norm_rms_epsilon", value(1e-6f)},
            {"gemma4.rope.freq_base", value(1e6f)},
            {"gemma4.rope.freq_base_swa", value(1e4f)},
            {"gemma4.attention.sliding_window", u32(32)},
            {"gemma4.attention.sliding_window_pattern", array(std::vector<bool>{true, true, true, true, true, false})},
            {"gemma4.attention.key_length", u32(128)},
            {"gemma4.attention.value_length", u32(128)},
            {"gemma4.attention.key_length_swa", u32(64)},
            {"gemma4.attention.value_length_swa", u32(64)},
            {"gemma4.final_logit_softcapping", value(30.0f)},
            {"gemma4.context_length", u32(131072)}};
  }

  /// Writes the file, and opens it.
  [[nodiscard]] GgufFile changed(const Keys& keys, const Tensors& tensors = {}) const {
    const GgufFile source = GgufFile::open(kData / "tiny/tiny-a-Q4_K_M.gguf");
    GgufWriter writer(directory_.file("changed.gguf"));
    for (const auto& [key, set] : keys) set(writer, key);
    for (const GgufTensor& tensor : source.tensors()) {
      if (tensor.name != tensors.dropped) writer.add_tensor(tensor.name, tensor.type, tensor.dims);
    }
    if (!tensors.added.empty()) writer.add_tensor(tensors.added, TensorType::kF32, {4});
    for (const GgufTensor& tensor : source.tensors()) {
      if (tensor.name == tensors.dropped) continue;
      const bool is_replaced = tensor.name == "rope_freqs.weight" && !tensors.rope_freqs.empty();
      writer.append(tensor.name, is_replaced ? std::as_bytes(std::span(tensors.rope_freqs)) : tensor.data);
    }
    const std::vector<std::byte> zeros(16);
    if (!tensors.added.empty()) writer.append(tensors.added, zeros);
    writer.finish();
    return GgufFile::open(directory_.file("changed.gguf"));
  }

  /// The message with which the file is refused; empty when it is not.
  [[nodiscard]] std::string refusal(const Keys& keys, const Tensors& tensors = {}) const {
    const GgufFile file = changed(keys, tensors);
    try {
      (void)weights_from_gguf(file);
    } catch (const FormatError& error) {
      return error.what();
    }
    return "";
  }

  [[nodiscard]] std::string refusal_with(const std::string& key,
                                         std::function<void(GgufWriter&, const std::string&)> set) const {
    Keys keys = tiny_keys();
    keys[key] = std::move(set);
    return refusal(keys);
  }

  [[nodiscard]] ModelConfig config_with(const std::string& key,
                                        std::function<void(GgufWriter&, const std::string&)> set) const {
    Keys keys = tiny_keys();
    keys[key] = std::move(set);
    return config_from_gguf(changed(keys));
  }

  testkit::TempDir directory_;
};

TEST_F(ConfigFromGguf, TheUnchangedCopyLoads) {
  EXPECT_EQ(refusal(tiny_keys()), "");
}

TEST_F(ConfigFromGguf, EveryKeyIsNeededAndItsAbsenceNamed) {
  for (const auto& [key, set] : tiny_keys()) {
    if (key == "gemma4.attention.sliding_window") continue;  // a model without sliding layers has none
    Keys keys = tiny_keys();
    keys.erase(key);
    EXPECT_NE(refusal(keys).find(key), std::string::npos) << key;
  }
}

TEST_F(ConfigFromGguf, AScalarHeadCountServesAllLayers) {
  const std::string message = refusal_with("gemma4.attention.head_count_kv", u32(2));
  EXPECT_NE(message.find("blk.5.attn_k.weight"), std::string::npos) << "the full layer has one head: " << message;
}

TEST_F(ConfigFromGguf, FeaturesThatAreNotImplementedAreRefusedByName) {
  EXPECT_NE(refusal_with("gemma4.embedding_length_per_layer_input", u32(256)).find("per-layer embeddings"),
            std::string::npos);
  EXPECT_NE(refusal_with("gemma4.attention.shared_kv_layers", u32(2)).find("shared KV layers"), std::string::npos);
  EXPECT_NE(refusal_with("gemma4.expert_count", u32(8)).find("experts"), std::string::npos);
  const auto with_tensor = [&](const char* name) { return refusal(tiny_keys(), {.added = name}); };
  EXPECT_NE(with_tensor("blk.0.ffn_gate_exps.weight").find("experts"), std::string::npos);
  EXPECT_NE(with_tensor("per_layer_token_embd.weight").find("per-layer embeddings"), std::string::npos);
  EXPECT_NE(with_tensor("blk.0.attn_q.scale").find("NVFP4"), std::string::npos);
  EXPECT_NE(with_tensor("blk.0.attn_q.input_scale").find("NVFP4"), std::string::npos);
  EXPECT_NE(with_tensor("output.weight").find("'output.weight' has dimensions [4], expected [256, 1024]"),
            std::string::npos);
  EXPECT_NE(with_tensor("blk.0.mystery.weight").find("blk.0.mystery.weight"), std::string::npos);
}

TEST_F(ConfigFromGguf, ValuesThatContradictAreRefusedWithBothOfThem) {
  EXPECT_NE(refusal_with("general.architecture", value(std::string("llama"))).find("'llama', expected 'gemma4'"),
            std::string::npos);
  EXPECT_NE(refusal_with("gemma4.attention.value_length", u32(64)).find("value_length is 64"), std::string::npos);
  EXPECT_NE(refusal_with("gemma4.block_count", u32(7)).find("has 6 entries"), std::string::npos);
  EXPECT_NE(refusal_with("gemma4.attention.head_count_kv", array(std::vector<std::uint32_t>{2, 2, 1, 2, 2, 1}))
                .find("of layer 2 is 1, expected 2"),
            std::string::npos);
  EXPECT_NE(refusal_with("gemma4.feed_forward_length", u32(768)).find("[256, 768]"), std::string::npos);
  EXPECT_NE(refusal_with("gemma4.attention.head_count", u32(3)).find("n_head 3"), std::string::npos);
  for (const char* key : {"gemma4.embedding_length", "gemma4.feed_forward_length", "gemma4.attention.head_count",
                          "gemma4.attention.key_length", "gemma4.attention.sliding_window", "gemma4.context_length"}) {
    const std::string message = refusal_with(key, value(std::uint64_t{1} << 60));
    EXPECT_NE(message.find(concat(key, " is 1152921504606846976, expected at most 16777216")), std::string::npos)
        << message;
  }
}

TEST_F(ConfigFromGguf, EveryNumberIsTheFilesAndNoOtherChanges) {
  const ModelConfig tiny = gemma4_tiny();
  const auto changes = [&](const char* key, std::function<void(GgufWriter&, const std::string&)> set,
                           const std::function<void(ModelConfig&)>& expect) {
    ModelConfig expected = tiny;
    expect(expected);
    EXPECT_FALSE(expected == tiny) << key << ": nothing to see";
    EXPECT_EQ(config_with(key, std::move(set)), expected) << key;
  };
  changes("gemma4.attention.layer_norm_rms_epsilon", value(3e-5f), [](ModelConfig& c) { c.rms_epsilon = 3e-5f; });
  changes("gemma4.final_logit_softcapping", value(17.5f), [](ModelConfig& c) { c.softcap = 17.5f; });
  changes("gemma4.rope.freq_base", value(2e6f), [](ModelConfig& c) { c.full.rope_theta = 2e6; });
  changes("gemma4.rope.freq_base_swa", value(3e4f), [](ModelConfig& c) { c.sliding.rope_theta = 3e4; });
  changes("gemma4.attention.sliding_window", u32(48), [](ModelConfig& c) { c.window = 48; });
  changes("gemma4.context_length", u32(4096), [](ModelConfig& c) { c.context = 4096; });
  changes("gemma4.embedding_length", u32(320), [](ModelConfig& c) { c.hidden = 320; });
  changes("gemma4.feed_forward_length", u32(768), [](ModelConfig& c) { c.ffn_hidden = 768; });
  changes("gemma4.attention.head_count", u32(8), [](ModelConfig& c) { c.n_head = 8; });
  changes("gemma4.attention.head_count_kv", array(std::vector<std::uint32_t>{1, 1, 1, 1, 1, 2}), [](ModelConfig& c) {
    c.sliding.n_head_kv = 1;
    c.full.n_head_kv = 2;
  });
}

TEST_F(ConfigFromGguf, RopeFactorsAreOnesAndThenHugeOnes) {
  constexpr std::size_t kPairs = 64, kRotated = 16;  // of the full layers of tiny
  const auto factors = [&](std::size_t n_one) {
    std::vector<float> values(kPairs, 1e30f);
    std::fill_n(values.begin(), n_one, 1.0f);
    return values;
  };
  const auto with = [&](const std::vector<float>& values) { return refusal(tiny_keys(), {.rope_freqs = values}); };
  const GgufFile file = changed(tiny_keys(), {.rope_freqs = factors(kRotated)});
  EXPECT_EQ(config_from_gguf(file).full.rope_pairs, static_cast<std::int64_t>(kRotated));
  for (const std::size_t n_one : {std::size_t{0}, std::size_t{1}, kRotated - 1, kRotated + 1, kPairs}) {
    const std::string message = with(factors(n_one));  // the factors of another model
    EXPECT_NE(message.find(concat("rotates ", n_one, " of 64 pairs, expected 16")), std::string::npos) << message;
  }
  // A factor that is neither, or a 1 behind the huge ones, wherever it stands.
  for (const float bad : {1.0f, 0.5f, 0.0f, 8.0f, 1e19f, -1e30f, std::numeric_limits<float>::quiet_NaN()}) {
    for (const std::size_t at : {kRotated + 1, kPairs / 2, kPairs - 1}) {
      std::vector<float> values = factors(kRotated);
      values[at] = bad;
      EXPECT_NE(with(values).find(concat("'rope_freqs.weight' has ", bad, " at ", at)), std::string::npos)
          << bad << " at " << at << ": " << with(values);
    }
  }
  std::vector<float> early = factors(kRotated);
  early[3] = 0.5f;
  EXPECT_NE(with(early).find("has 0.5 at 3"), std::string::npos) << with(early);
}

TEST_F(ConfigFromGguf, AMissingTensorIsNamed) {
  for (const char* name : {"blk.3.ffn_up.weight", "token_embd.weight", "rope_freqs.weight", "output_norm.weight"}) {
    EXPECT_NE(refusal(tiny_keys(), {.dropped = name}).find(name), std::string::npos) << name;
  }
}

}  // namespace
