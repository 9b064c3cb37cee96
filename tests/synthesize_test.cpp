// SPDX-License-Identifier: Apache-2.0
#include "gemma4/synthetic/synthetic_model.hpp"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#if defined(_OPENMP)
#include <omp.h>
#else
inline int omp_get_max_threads() {
  return 1;
}
inline void omp_set_num_threads(int) {}
#endif

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>
#include <string>
#include <variant>
#include <vector>

#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/gguf/config_from_gguf.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/text/tokenizer.hpp"
#include "reference/backend.hpp"
#include "reference/layer_statistics.hpp"

namespace {

using gemma4::GgufFile;
using gemma4::ModelConfig;
using gemma4::SyntheticOptions;
using gemma4::TensorType;
using gemma4::reference::LayerStatistics;

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "synthesize_XXXXXX").string();
    if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
    path_ = name;
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  [[nodiscard]] std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  [[nodiscard]] bool empty() const { return std::filesystem::is_empty(path_); }

 private:
  std::filesystem::path path_;
};

/// Sets the number of threads for a scope. One is best for small models: they are done before the others wake.
class Threads {
 public:
  explicit Threads(int count) : before_(omp_get_max_threads()) { omp_set_num_threads(count); }
  ~Threads() { omp_set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

/// 60 layers, as deep as the largest model, but narrow.
ModelConfig deep_config() {
  ModelConfig config = gemma4::gemma4_tiny();
  config.is_sliding = gemma4::five_to_one_pattern(60);
  return config;
}

std::string file_bytes(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

std::vector<float> draw(TensorType type, std::uint64_t seed, const std::string& name, std::int64_t row, std::int64_t n,
                        double deviation, double common_share = 0) {
  std::vector<std::byte> bytes(static_cast<std::size_t>(gemma4::row_bytes(type, n)));
  gemma4::SyntheticRows(seed, common_share).fill(name, row, type, n, deviation, bytes);
  std::vector<float> values(static_cast<std::size_t>(n));
  gemma4::dequantise_row(type, bytes, values);
  return values;
}

double mean_square(std::span<const float> values) {
  double sum = 0;
  for (const float value : values) sum += static_cast<double>(value) * value;
  return sum / static_cast<double>(values.size());
}

/// Blocks of random bits with minima: 32 weights of a sub-block have an offset in common, n is that of the sub-blocks.
bool type_has_random_minima(TensorType type) {
  return type == TensorType::kQ2K || type == TensorType::kQ5K;
}

// Over n weights the mean is within 5 / sqrt(n) deviations of 0, the mean square within 5 sqrt(k / n) of 1, k = 2 for a
// normal distribution and less for one that is cut off: at n = 2^20 these are 0.5 % and 0.7 %. Steps of tiny weights
// are subnormal in 16 bits: a step of 1e-6 is rounded by up to 3 %, hence deviations down to 1 / sqrt(21504) only.
TEST(SyntheticWeights, HaveTheMeanAndDeviationAskedFor) {
  constexpr std::int64_t kCount = std::int64_t{1} << 20;
  for (const TensorType type : gemma4::kWeightTypes) {
    for (const double deviation : {1 / std::sqrt(21504.0), 1 / std::sqrt(512.0), 1.0}) {
      const std::vector<float> values = draw(type, 1, "w", 0, kCount, deviation);
      double sum = 0;
      for (const float value : values) sum += value;
      EXPECT_LE(std::abs(sum / kCount) / deviation, type_has_random_minima(type) ? 0.028 : 0.005)
          << type_name(type) << " " << deviation;
      EXPECT_LE(std::abs(mean_square(values) / (deviation * deviation) - 1), 0.01)
          << type_name(type) << " " << deviation;
    }
  }
}

// A standard normal number lies within one deviation with probability 0.683 and within two with 0.954; codes are
// coarse (Q4_K has 15 steps over 4.2 deviations), which moves these shares by a few percent.
TEST(SyntheticWeights, AreBellShaped) {
  for (const TensorType type : {TensorType::kQ4_0, TensorType::kQ4K, TensorType::kQ6K}) {
    const std::vector<float> values = draw(type, 1, "w", 0, 1 << 18, 1.0);
    int within_one = 0, within_two = 0;
    for (const float value : values) within_one += std::abs(value) < 1, within_two += std::abs(value) < 2;
    EXPECT_NEAR(within_one / static_cast<double>(values.size()), 0.683, 0.04) << type_name(type);
    EXPECT_NEAR(within_two / static_cast<double>(values.size()), 0.954, 0.03) << type_name(type);
  }
}

// The mean over n rows of N numbers has share^2 of their mean square, and by chance 1 / n of what is left, which is
// taken off; N = 512 columns leave it uncertain by a few percent. 0 is the control.
TEST(SyntheticWeights, RowsHaveTheShareInCommonThatIsAskedFor) {
  constexpr std::int64_t kRows = 500, kColumns = 512;
  for (const TensorType type : {TensorType::kQ4_0, TensorType::kQ4K, TensorType::kQ6K, TensorType::kF16}) {
    for (const double share : {0.0, 0.4, 0.8}) {
      gemma4::reference::Matrix<float> rows(kRows, kColumns);
      for (std::int64_t row = 0; row < kRows; ++row) {
        std::ranges::copy(draw(type, 1, "w", row, kColumns, 0.1, share), rows.row(row).begin());
      }
      EXPECT_NEAR(gemma4::reference::common_share(rows), share, 0.02) << type_name(type);
      EXPECT_NEAR(rows.squaredNorm() / static_cast<double>(rows.size()), 0.01, 0.0002) << type_name(type) << share;
    }
  }
  EXPECT_THROW(gemma4::SyntheticRows(1, 0.95), std::invalid_argument);
}

RC_GTEST_PROP(SyntheticWeights, RowsDependOnSeedNameAndRowAlone, (std::uint64_t seed, std::uint16_t row)) {
  for (const TensorType type : {TensorType::kQ4_0, TensorType::kQ4K, TensorType::kQ6K, TensorType::kBf16,
                                TensorType::kQ2K, TensorType::kIq4Xs}) {
    const auto base = draw(type, seed, "a", row, 256, 1.0);
    RC_ASSERT(draw(type, seed, "a", row, 256, 1.0) == base);
    RC_ASSERT(draw(type, seed + 1, "a", row, 256, 1.0) != base);
    RC_ASSERT(draw(type, seed, "b", row, 256, 1.0) != base);
    RC_ASSERT(draw(type, seed, "a", row + 1, 256, 1.0) != base);
  }
}

TEST(SyntheticVocabulary, AnySizeMakesATokenizerThatRoundTrips) {
  const TemporaryFolder folder;
  for (const std::int64_t size : {267, 300, 1024, 20000}) {
    gemma4::GgufWriter writer(folder / "v.gguf");
    writer.set("general.architecture", "gemma4");
    gemma4::set_vocabulary_keys(writer, size);
    writer.finish();
    const GgufFile file = GgufFile::open(folder / "v.gguf");
    const gemma4::Tokenizer tokenizer(file);
    for (const std::string text : {"hello brave new world", "x = f(1.5);\n\n\n  return é", ""}) {
      const std::vector<std::int32_t> ids = tokenizer.encode(text, {.add_bos = false});
      EXPECT_EQ(tokenizer.decode(ids), text) << "vocabulary of " << size;
      if (size == 20000 && text == "hello brave new world") {
        EXPECT_LT(ids.size(), text.size()) << "merges are used";
      }
    }
  }
  EXPECT_THROW((void)gemma4::make_synthetic_vocabulary(266), std::invalid_argument);
}

TEST(SyntheticVocabulary, Of262144TokensAreUnique) {
  const auto vocabulary = gemma4::make_synthetic_vocabulary(262144);
  EXPECT_EQ(vocabulary.tokens.size(), 262144u);
  EXPECT_EQ(vocabulary.types.size(), 262144u);
  EXPECT_EQ(std::set<std::string>(vocabulary.tokens.begin(), vocabulary.tokens.end()).size(), 262144u);
}

TEST(SyntheticModel, FileSaysWhatTheConfigSays) {
  const TemporaryFolder folder;
  ModelConfig config = gemma4::gemma4_tiny();
  config.full.head_dim = 256;
  config.full.rope_pairs = 32;  // an eighth of the head, as all files have it
  config.softcap = 25;
  gemma4::write_synthetic_model(folder / "m.gguf", config);
  const GgufFile file = GgufFile::open(folder / "m.gguf");
  EXPECT_EQ(gemma4::config_from_gguf(file), config);
  EXPECT_EQ(gemma4::model_tensors(file), gemma4::model_tensors(config));
  EXPECT_EQ(gemma4::weights_from_gguf(file).layers.size(), 6u);
}

TEST(SyntheticModel, HasTheKeysOfAPeersFile) {
  const TemporaryFolder folder;
  gemma4::write_synthetic_model(folder / "m.gguf", gemma4::gemma4_tiny());
  const GgufFile ours = GgufFile::open(folder / "m.gguf");
  const GgufFile peer = GgufFile::open(std::filesystem::path(GEMMA4_TEST_DATA) / "tiny/tiny-a-Q4_K_M.gguf");
  EXPECT_EQ(ours.values().size(), peer.values().size());
  for (const auto& [key, value] : peer.values()) {
    ASSERT_TRUE(ours.has(key)) << key;
    EXPECT_EQ(ours.value(key).type, value.type) << key;
    EXPECT_EQ(ours.value(key).element, value.element) << key;
    if (key.starts_with("gemma4.")) {
      EXPECT_TRUE(std::equal(value.bytes.begin(), value.bytes.end(), ours.value(key).bytes.begin(),
                             ours.value(key).bytes.end()))
          << key;
    }
  }
}

TEST(SyntheticModel, BytesDependOnTheSeedAndNotOnTheThreads) {
  const TemporaryFolder folder;
  ModelConfig config = gemma4::gemma4_tiny();
  config.vocab = 8192;  // 1.7 MB of embedding: enough for threads to share
  const auto write = [&](std::uint64_t seed, int n_thread) {
    const Threads threads(n_thread);
    gemma4::write_synthetic_model(folder / "m.gguf", config, {.seed = seed});
    return file_bytes(folder / "m.gguf");
  };
  const std::string one = write(3, 1), five = write(3, 5), other = write(4, 1);
  EXPECT_TRUE(one == five);
  EXPECT_FALSE(one == other) << "control";
}

TEST(SyntheticModel, ProgressEndsAtTheTotal) {
  const TemporaryFolder folder;
  std::int64_t last = 0;
  gemma4::write_synthetic_model(folder / "m.gguf", gemma4::gemma4_tiny(), {}, [&](std::int64_t done) {
    EXPECT_GT(done, last);
    last = done;
  });
  EXPECT_EQ(last, gemma4::total_bytes(gemma4::model_tensors(gemma4::gemma4_tiny())));
}

TEST(SyntheticModel, RefusesAndLeavesNothingBehind) {
  const TemporaryFolder folder;
  ModelConfig narrow = gemma4::gemma4_tiny();
  narrow.hidden = 300;
  EXPECT_THROW(gemma4::write_synthetic_model(folder / "m.gguf", narrow), std::invalid_argument);
  ModelConfig few = gemma4::gemma4_tiny();
  few.vocab = 100;
  EXPECT_THROW(gemma4::write_synthetic_model(folder / "m.gguf", few), std::invalid_argument);
  EXPECT_THROW(gemma4::write_synthetic_model(folder / "m.gguf", gemma4::gemma4_tiny(), {.only = TensorType::kQ5K}),
               std::invalid_argument);
  ModelConfig huge = gemma4::gemma4_31b();
  huge.is_sliding = gemma4::five_to_one_pattern(4096);
  huge.ffn_hidden = 256 * 40000;
  EXPECT_THROW(gemma4::write_synthetic_model(folder / "m.gguf", huge), std::invalid_argument) << "no such disk";
  EXPECT_THROW(gemma4::write_synthetic_model(folder / "m.gguf", gemma4::gemma4_tiny(), {},
                                             [](std::int64_t) { throw std::runtime_error("stop"); }),
               std::runtime_error);
  EXPECT_TRUE(folder.empty());
}

/// Statistics of the last 32 of `n_token` random ids, a layer an entry, with a bf16 and a TQ4 cache side by side.
std::vector<LayerStatistics> statistics_of(const ModelConfig& config, const SyntheticOptions& options,
                                           std::int64_t n_token) {
  const Threads threads(1);
  const TemporaryFolder folder;
  gemma4::write_synthetic_model(folder / "m.gguf", config, options);
  const GgufFile file = GgufFile::open(folder / "m.gguf");
  const gemma4::ModelWeights weights = gemma4::weights_from_gguf(file);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(n_token));
  gemma4::RowRandom random(9, "tokens", 0);
  for (std::int32_t& id : ids) {
    id = static_cast<std::int32_t>(random.next() % static_cast<std::uint64_t>(weights.config.vocab));
  }
  return gemma4::reference::layer_statistics(weights, ids, n_token, 32, gemma4::parse_cache_spec("bf16"),
                                             gemma4::parse_cache_spec("tq4"), [](std::int64_t) {});
}

double mean(const std::vector<LayerStatistics>& layers, double LayerStatistics::*figure) {
  double sum = 0;
  for (const LayerStatistics& layer : layers) sum += layer.*figure;
  return sum / static_cast<double>(layers.size());
}

double sum_of_squares(const std::vector<LayerStatistics>& layers, double LayerStatistics::*figure) {
  double sum = 0;
  for (const LayerStatistics& layer : layers) sum += layer.*figure * (layer.*figure);
  return sum;
}

// What the scaling promises. The stream's RMS would be exactly 1 and the sums exact if the branches were not correlated
// with the stream; the norm weights' own spread (10 %) adds 1 % to q and k each. The scores of a query have less than
// the deviation of unrelated keys, because of what the keys have in common, and sample it with few keys.
TEST(SyntheticModel, StatisticsAreThoseAskedForThrough60Layers) {
  for (const SyntheticOptions& options :
       {SyntheticOptions{},
        SyntheticOptions{.score_deviation = 1.5, .attention_share = 0.3, .mlp_share = 1.4, .common_share = 0.1}}) {
    const std::vector<LayerStatistics> layers = statistics_of(deep_config(), options, 96);
    for (std::size_t layer = 0; layer < layers.size(); ++layer) {
      ASSERT_NEAR(layers[layer].score_norm, options.score_deviation, 0.1 * options.score_deviation) << layer;
      ASSERT_GE(layers[layer].score_deviation, 0.6 * options.score_deviation) << layer;
      ASSERT_LE(layers[layer].score_deviation, 1.3 * options.score_deviation) << layer;
      ASSERT_NEAR(layers[layer].stream_rms, 1.0, 0.3) << layer;
    }
    EXPECT_NEAR(sum_of_squares(layers, &LayerStatistics::attention_ratio), options.attention_share,
                0.1 * options.attention_share);
    EXPECT_NEAR(sum_of_squares(layers, &LayerStatistics::mlp_ratio), options.mlp_share, 0.1 * options.mlp_share);
    EXPECT_NEAR(layers.front().common_share, options.common_share, 0.1);
  }
}

// The figures of the trained nano over 1024 random ids (0.56, 0.61 and 0.066), and what follows from them for a model
// of 60 layers; see synthetic_model.hpp. The control has what a random model has if nobody sees to it.
TEST(SyntheticModel, ACacheDisturbsTheDefaultsAsItDoesATrainedModel) {
  ModelConfig config = deep_config();
  config.window = 256;
  const std::vector<LayerStatistics> layers = statistics_of(config, {}, 384);
  const std::vector<LayerStatistics> unrelated =
      statistics_of(config, {.score_deviation = 2.5, .attention_share = 1, .mlp_share = 1, .common_share = 0}, 384);
  const auto code_error = [&](const std::vector<LayerStatistics>& all) {
    return static_cast<double>(all.size()) / static_cast<double>(config.n_full_layer()) *
           mean(all, &LayerStatistics::code_error);
  };
  EXPECT_NEAR(mean(layers, &LayerStatistics::common_share), 0.56, 0.08);
  EXPECT_NEAR(mean(layers, &LayerStatistics::output_rms), 0.61, 0.08);
  EXPECT_NEAR(code_error(layers), 0.066, 0.03);
  EXPECT_GE(code_error(unrelated), 0.12) << "control";
  EXPECT_LE(layers.back().stream_error, 0.05);
  EXPECT_GE(unrelated.back().stream_error, 0.15) << "control";
}

/// Logits of 48 tokens, each after those before it, and how often the likeliest next token is the token itself.
struct Logits {
  gemma4::reference::Matrix<float> values;
  int n_echo = 0;
  std::set<Eigen::Index> tops;
  [[nodiscard]] double spread() const { return std::sqrt(values.squaredNorm() / static_cast<double>(values.size())); }
};

Logits run_model(const gemma4::ModelWeights& weights) {
  gemma4::reference::Backend<float> backend(weights, {.cache = {}, .context = 64, .max_chunk = 64});
  gemma4::Model model(backend);
  std::vector<std::int32_t> tokens(48);
  std::vector<std::int64_t> rows(tokens.size());
  for (std::size_t t = 0; t < tokens.size(); ++t) {
    tokens[t] = static_cast<std::int32_t>((t * 37 + 11) % 1024);
    rows[t] = static_cast<std::int64_t>(t);
  }
  model.forward(tokens, rows);
  Logits logits;
  logits.values = backend.logits();
  for (Eigen::Index t = 0; t < logits.values.rows(); ++t) {
    Eigen::Index top = 0;
    logits.values.row(t).maxCoeff(&top);
    logits.tops.insert(top);
    logits.n_echo += top == tokens[static_cast<std::size_t>(t)];
  }
  return logits;
}

TEST(SyntheticModel, LogitsSpreadAsAskedAndDependOnTheTokens) {
  const Threads threads(1);
  const TemporaryFolder folder;
  for (const double deviation : {3.0, 1.0}) {
    gemma4::write_synthetic_model(folder / "m.gguf", deep_config(), {.logit_deviation = deviation});
    const GgufFile file = GgufFile::open(folder / "m.gguf");
    const Logits logits = run_model(gemma4::weights_from_gguf(file));
    ASSERT_TRUE(logits.values.allFinite());
    EXPECT_NEAR(logits.spread(), deviation, 0.3 * deviation);
    EXPECT_GE(logits.tops.size(), 24u) << "different contexts, different predictions";
    EXPECT_LE(logits.n_echo, 4) << "the tied embedding must not echo the input";
  }
}

TEST(SyntheticModel, SignsOfTheOutputNormAreWhatKeepsTheInputFromEchoing) {
  const Threads threads(1);
  const TemporaryFolder folder;
  gemma4::write_synthetic_model(folder / "m.gguf", deep_config());
  const GgufFile file = GgufFile::open(folder / "m.gguf");
  gemma4::ModelWeights weights = gemma4::weights_from_gguf(file);
  std::vector<float> positive(weights.output_norm.begin(), weights.output_norm.end());
  for (float& value : positive) value = std::abs(value);
  weights.output_norm = positive;
  EXPECT_GE(run_model(weights).n_echo, 24) << "control: without signs most predictions repeat the input";
}

}  // namespace
