// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cuda/backend.cuh"
#include "cuda/session.cuh"
#include "gemma4/cache_formats.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/model/weights.hpp"
#include "reference/backend.hpp"
#include "tests/support/micro_file.hpp"
#include "tests/support/model_logits.hpp"
#include "tests/support/small_model.hpp"

/// Files as people have them on the device: loaded as the reference binds them, and the same logits as of the file that
/// they stand for, to the bit. How near the two rooms are is backend_test's.
namespace {

using namespace gemma4;
using testkit::Change;
using testkit::GgufEdit;
using testkit::MicroFile;
using testkit::rows_close;
using testkit::same_rows;
using testkit::with_norms;
using testkit::with_output;
using testkit::with_tokens;

const std::vector<std::int32_t> kIds = {2, 276, 273, 280, 280, 283, 298, 12, 200, 295};  // below every vocabulary here

/// The rounding of a bf16 cache as backend_test.cu derives it: some 4 % of a logit row's length, the worst row 10 %.
constexpr double kRounding = 0.10;

cuda::BackendOptions options() {
  return {.cache = Bf16Format{}, .context = 128, .max_chunk = 32, .n_logit_row = 32};
}

/// Logits of kIds on the device: in one chunk, or token by token, which takes the path of decoding.
std::vector<float> device_logits(const GgufFile& file, std::int64_t chunk = 32) {
  const cuda::PackedModel packed = cuda::load_model(file);
  cuda::Backend backend(packed, options());
  return testkit::logits_of(backend, kIds, {chunk});
}

std::vector<float> reference_logits(const GgufFile& file) {
  const ModelWeights weights = weights_from_gguf(file);
  reference::Backend<float> backend(weights, {.cache = Bf16Format{}, .context = 128, .max_chunk = 32});
  return testkit::logits_of(backend, kIds, {32});
}

/// What decode() of the device chooses after kIds.
std::vector<std::int32_t> sampled(const GgufFile& file, const SamplerSettings& settings, std::int64_t n_token) {
  const cuda::PackedModel packed = cuda::load_model(file);
  cuda::Backend backend(packed, options());
  cuda::Session session(backend, {});
  session.prefill(kIds, 32, [](std::int64_t) {});
  std::vector<std::int32_t> ids;
  session.decode(n_token, settings, [&](std::int32_t id) {
    ids.push_back(id);
    return true;
  });
  return ids;
}

TEST(PublishedFilesGpu, AnOutputMatrixOfItsOwnIsTheHead) {
  const MicroFile tied, copied(with_output(false)), other(with_output(true));
  for (const std::int64_t chunk : {std::int64_t{32}, std::int64_t{1}}) {
    const std::vector<float> expected = device_logits(*tied.file, chunk), actual = device_logits(*other.file, chunk);
    EXPECT_TRUE(same_rows(device_logits(*copied.file, chunk), expected)) << "chunk " << chunk;
    EXPECT_FALSE(same_rows(actual, expected)) << "the control: the embedding is not the head";
    std::vector<float> turned = actual;
    for (std::size_t row = 0; row < kIds.size(); ++row) std::reverse(&turned[320 * row], &turned[320 * row] + 320);
    EXPECT_TRUE(same_rows(turned, expected)) << "but for the order of its rows, chunk " << chunk;
    EXPECT_TRUE(rows_close(actual, reference_logits(*other.file), 320, kRounding));
  }
}

TEST(PublishedFilesGpu, AnOutputMatrixIsInThePlanThatIsAllocated) {
  const MicroFile other(with_output(true));
  const cuda::PackedModel packed = cuda::load_model(*other.file);
  const MemoryPlan plan = plan_memory(packed.config(), model_tensors(*other.file), {.context = 1, .chunk = 1});
  std::int64_t planned = 0;
  for (const PlannedBuffer& buffer : plan.buffers) {
    if (cuda::PackedModel::is_weight_buffer(buffer.name)) planned += buffer.bytes;
  }
  EXPECT_EQ(packed.bytes(), planned);
  EXPECT_GT(plan.bytes("weights_output"), 0);
}

TEST(PublishedFilesGpu, RowsBeyondTheTokenizerAreNeverSampled) {
  const MicroFile full;
  const std::vector<float> all = device_logits(*full.file);
  const SamplerSettings settings[] = {{},
                                      {.temperature = 50, .seed = 1},
                                      {.temperature = 50, .top_k = 310, .seed = 2},
                                      {.temperature = 50, .top_p = 0.99f, .seed = 3}};
  std::int64_t n_beyond = 0;
  for (const SamplerSettings& s : settings) {
    for (const std::int32_t id : sampled(*full.file, s, 60)) n_beyond += id >= 299;
  }
  EXPECT_GT(n_beyond, 0) << "the control: with the whole vocabulary they are";
  for (const std::int64_t n_token : {299, 300, 317}) {  // with rows of logits that do and do not begin at 16 bytes
    const MicroFile shorter(with_tokens(static_cast<std::size_t>(n_token)));
    const std::vector<float> some = device_logits(*shorter.file);
    const auto n = static_cast<std::size_t>(n_token);
    ASSERT_EQ(some.size(), kIds.size() * n);
    for (std::size_t row = 0; row < kIds.size(); ++row) {
      EXPECT_TRUE(same_rows(std::span(some).subspan(n * row, n), std::span(all).subspan(320 * row, n)))
          << n_token << " tokens, row " << row;
    }
    EXPECT_TRUE(rows_close(some, reference_logits(*shorter.file), n_token, kRounding));
    for (const SamplerSettings& s : settings) {
      for (const std::int32_t id : sampled(*shorter.file, s, 60)) {
        EXPECT_TRUE(id >= 0 && id < n_token) << "id " << id << " of " << n_token << ", temperature " << s.temperature;
      }
    }
  }
}

TEST(PublishedFilesGpu, NormsOfHalfTheBitsAreTheirValues) {
  const std::vector<float> plain = device_logits(*MicroFile().file);
  const std::vector<float> f16 = device_logits(*MicroFile(with_norms<F16>(true)).file);
  const std::vector<float> bf16 = device_logits(*MicroFile(with_norms<Bf16>(true)).file);
  EXPECT_TRUE(same_rows(f16, device_logits(*MicroFile(with_norms<F16>(false)).file)));
  EXPECT_TRUE(same_rows(bf16, device_logits(*MicroFile(with_norms<Bf16>(false)).file)));
  EXPECT_FALSE(same_rows(bf16, plain)) << "the control: rounding shows";
}

/// Norms long enough for whole pages, which an upload must not give back to the system: they are memory, not a file's.
TEST(PublishedFilesGpu, ConvertedNormsOutliveTheirUpload) {
  const testkit::TempDir folder;
  ModelConfig config = testkit::micro_config();
  config.hidden = 8192;  // 32 KiB of float32
  config.is_sliding = {1};
  write_synthetic_model(folder.file("m.gguf"), config, {});
  GgufEdit edit(GgufFile::open(folder.file("m.gguf")));
  with_norms<F16>(true)(edit);
  edit.write(folder.file("f16.gguf"));
  const GgufFile file = GgufFile::open(folder.file("f16.gguf"));
  const ModelWeights weights = weights_from_gguf(file);
  const std::vector<float> before(weights.output_norm.begin(), weights.output_norm.end());
  const cuda::PackedModel packed(weights, model_tensors(file));
  EXPECT_TRUE(same_rows(weights.output_norm, before));
  std::vector<float> on_device(before.size());
  cuda::check(cudaMemcpy(on_device.data(), packed.output_norm(), 4 * before.size(), cudaMemcpyDeviceToHost), "copy");
  EXPECT_TRUE(same_rows(on_device, before));
}

TEST(PublishedFilesGpu, OtherEncodersInTheFileAreLeftOut) {
  const MicroFile plain, more([](GgufEdit&edit) {
    edit.add("v.blk.0.attn_k.weight", {64, 64}, std::vector<float>(4096, 1.0f));
    edit.add("mm.input_projection.weight", {64, 64}, std::vector<float>(4096, 1.0f));
  });
  EXPECT_TRUE(same_rows(device_logits(*more.file), device_logits(*plain.file)));
  EXPECT_EQ(cuda::load_model(*more.file).bytes(), cuda::load_model(*plain.file).bytes());
}

/// The attention of the 12B in a narrow model: sixteen heads of queries on one of keys at head_dim 512, K = V, and two
/// on one in the sliding layers; by chunks and token by token, in every kind of cache.
TEST(PublishedFilesGpu, TheAttentionOfThe12BIsThatOfTheReference) {
  ModelConfig config = gemma4_12b();
  config.vocab = 300, config.hidden = config.ffn_hidden = 256;
  config.window = 32;
  config.is_sliding = {1, 0, 0};
  const testkit::SmallModel small(config, 12);
  std::vector<std::int32_t> ids;
  for (std::int32_t i = 0; i < 90; ++i) ids.push_back((i * 37 + 5) % 300);
  for (const char* cache : {"bf16", "tq4", "tq4-haar"}) {
    // What a TQ4 cache makes of the same roundings: backend_test.cu derives three and a half times as much.
    const double bound = std::string(cache) == "bf16" ? kRounding : 3.5 * kRounding;
    const cuda::PackedModel packed(small.weights, model_tensors(*small.file));
    cuda::Backend device(packed,
                         {.cache = parse_cache_spec(cache), .context = 128, .max_chunk = 90, .n_logit_row = 90});
    reference::Backend<float> host(small.weights, {.cache = parse_cache_spec(cache), .context = 128, .max_chunk = 90});
    const std::vector<float> expected = testkit::logits_of(host, ids, {90});
    for (const std::int64_t chunk : {90, 40, 5, 1}) {
      EXPECT_TRUE(rows_close(testkit::logits_of(device, ids, {chunk}), expected, 300, bound))
          << cache << ", chunks of " << chunk;
    }
    std::vector<std::int32_t> other = ids;
    other[0] = 77;
    EXPECT_FALSE(rows_close(testkit::logits_of(device, other, {90}), expected, 300, bound)) << "the control, " << cache;
  }
}

/// Parts are mappings of their own: nothing of the model may depend on where they lie.
TEST(PublishedFilesGpu, AModelInPartsIsTheSameModel) {
  const testkit::TempDir folder;
  const ModelConfig config = testkit::micro_config();
  write_synthetic_model(folder.file("one.gguf"), config, {.seed = 3});
  const GgufFile one = GgufFile::open(folder.file("one.gguf"));
  const std::vector<float> expected = device_logits(one);
  for (const std::int64_t limit : {std::int64_t{1}, std::int64_t{120'000}}) {
    const auto files = write_synthetic_model(folder.file("m.gguf"), config, {.seed = 3, .split_max_bytes = limit});
    const GgufFile parts = GgufFile::open(files.front());
    ASSERT_GT(parts.n_part(), 4);
    EXPECT_TRUE(same_rows(device_logits(parts), expected)) << parts.n_part() << " parts";
  }
  write_synthetic_model(folder.file("other.gguf"), config, {.seed = 4});
  EXPECT_FALSE(same_rows(device_logits(GgufFile::open(folder.file("other.gguf"))), expected)) << "the control";
}

}  // namespace
