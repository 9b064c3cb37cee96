// SPDX-License-Identifier: Apache-2.0
#include "cuda/model_weights.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda/device/allocation_count.cuh"
#include "tests/support/linear_case.hpp"
#include "tests/support/packed_types.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/retyped_model.hpp"
#include "tests/support/small_model.hpp"

/// Loading: every byte of the file arrives, however it is cut; what is wrong with a file is said, and no memory stays.
namespace {

using namespace gemma4;
using testkit::SmallModel;

const std::filesystem::path kData = GEMMA4_TEST_DATA;

/// The rows of a matrix on the device as the file has them.
std::vector<std::byte> file_rows(const cuda::PackedMatrix& matrix, std::int64_t first, std::int64_t step,
                                 std::int64_t n_row) {
  cuda::DeviceBuffer<std::byte> rows(n_row * row_bytes(matrix.type, matrix.cols));
  cuda::unpack_rows(matrix.type, n_row, matrix.cols, matrix.data + first * matrix.row_bytes(), rows.data(), step,
                    nullptr);
  return rows.to_host();
}

testing::AssertionResult same_bytes(const std::string& name, const std::vector<std::byte>& actual,
                                    std::span<const std::byte> expected) {
  if (actual.size() == expected.size() && std::equal(actual.begin(), actual.end(), expected.begin())) {
    return testing::AssertionSuccess();
  }
  return testing::AssertionFailure() << name << " differs";
}

testing::AssertionResult same_floats(const std::string& name, const float* device, std::span<const float> expected) {
  std::vector<float> actual(expected.size());
  cuda::check(cudaMemcpy(actual.data(), device, expected.size_bytes(), cudaMemcpyDeviceToHost), "copy of a norm");
  if (std::equal(actual.begin(), actual.end(), expected.begin())) return testing::AssertionSuccess();
  return testing::AssertionFailure() << name << " differs";
}

/// Every tensor on the device against the file.
testing::AssertionResult holds_file(const cuda::PackedModel& model, const ModelWeights& weights) {
  testing::AssertionResult result = testing::AssertionSuccess();
  const auto expect = [&](const testing::AssertionResult& next) {
    if (result && !next) result = next;
  };
  const auto matrix = [&](const std::string& name, const cuda::PackedMatrix& actual, const QuantizedMatrix& expected) {
    if (expected.empty()) return;
    expect(same_bytes(name, file_rows(actual, 0, 1, actual.rows), expected.data));
  };
  matrix("token_embd", model.token_embd(), weights.token_embd);
  expect(same_floats("output_norm", model.output_norm(), weights.output_norm));
  for (std::size_t i = 0; i < weights.layers.size(); ++i) {
    const LayerWeights& from = weights.layers[i];
    const cuda::PackedLayer& layer = model.layer(static_cast<std::int64_t>(i));
    const std::string prefix = "layer " + std::to_string(i) + " ";
    matrix(prefix + "attn_q", layer.attn_q, from.attn_q);
    matrix(prefix + "attn_k", layer.attn_k, from.attn_k);
    matrix(prefix + "attn_v", layer.attn_v, from.attn_v);
    matrix(prefix + "attn_output", layer.attn_output, from.attn_output);
    matrix(prefix + "ffn_down", layer.ffn_down, from.ffn_down);
    if (layer.gate_up.is_fused()) {
      const std::int64_t n_row = from.ffn_gate.rows;
      expect(same_bytes(prefix + "gate", file_rows(layer.gate_up.joined, 0, 2, n_row), from.ffn_gate.data));
      expect(same_bytes(prefix + "up", file_rows(layer.gate_up.joined, 1, 2, n_row), from.ffn_up.data));
    } else {
      matrix(prefix + "gate", layer.gate_up.gate, from.ffn_gate);
      matrix(prefix + "up", layer.gate_up.up, from.ffn_up);
    }
    expect(same_floats(prefix + "attn_norm", layer.attn_norm, from.attn_norm));
    expect(same_floats(prefix + "attn_q_norm", layer.attn_q_norm, from.attn_q_norm));
    expect(same_floats(prefix + "attn_k_norm", layer.attn_k_norm, from.attn_k_norm));
    expect(same_floats(prefix + "post_attention_norm", layer.post_attention_norm, from.post_attention_norm));
    expect(same_floats(prefix + "ffn_norm", layer.ffn_norm, from.ffn_norm));
    expect(same_floats(prefix + "post_ffw_norm", layer.post_ffw_norm, from.post_ffw_norm));
    if (layer.output_scale != from.output_scale) expect(testing::AssertionFailure() << prefix << "output_scale");
  }
  return result;
}

TEST(CudaModelWeights, EveryTensorOfTheFileArrives) {
  for (const char* name : {"tiny/tiny-a-Q4_K_M.gguf", "tiny/tiny-a-Q6_K.gguf", "nano/nano-Q4_K_M.gguf"}) {
    const GgufFile file = GgufFile::open(kData / name);
    const ModelWeights weights = weights_from_gguf(file);
    const cuda::PackedModel model = cuda::load_model(file);
    EXPECT_TRUE(holds_file(model, weights)) << name;
    EXPECT_TRUE(model.layer(0).gate_up.is_fused());
    EXPECT_EQ(model.bytes(), cuda::load_model(file, {.join_gate_up = false}).bytes());
    EXPECT_GT(model.load_seconds(), 0);
  }
}

TEST(CudaModelWeights, AnotherFileDoesNotCompareEqual) {  // the control
  const GgufFile file = GgufFile::open(kData / "tiny/tiny-a-Q4_K_M.gguf");
  const SmallModel other(gemma4_tiny(), 3);
  EXPECT_FALSE(holds_file(cuda::load_model(file), other.weights));
}

RC_GTEST_PROP(CudaModelWeights, SlotsAndThreadsOnlyCutTheWay, ()) {
  const auto type = *rc::gen::element(TensorType::kQ8_0, TensorType::kBf16, TensorType::kF16, TensorType::kF32,
                                      TensorType::kQ4K, TensorType::kQ6K, TensorType::kQ4_0);
  const SmallModel small(gemma4_tiny(), {.seed = 5, .only = type});
  cuda::LoadOptions options;
  options.join_gate_up = *rc::gen::arbitrary<bool>();
  options.upload.n_thread = *rc::gen::inRange(1, 6);
  options.upload.n_slot = *rc::gen::inRange(1, 10);
  options.upload.slot_bytes = *rc::gen::element<std::int64_t>(4096, 5000, 16384, 1 << 20);
  const cuda::PackedModel model = cuda::load_model(*small.file, options);
  testkit::rc_require(holds_file(model, small.weights));
}

/// Every weight type as the type of every matrix, and all of them in one model.
TEST(CudaModelWeights, MatricesOfEveryTypeArrive) {
  const GgufFile source = GgufFile::open(kData / "tiny/tiny-a-Q4_K_M.gguf");
  for (const TensorType type : kWeightTypes) {
    const testkit::RetypedModel retyped(source, testkit::all_matrices(type));
    const cuda::PackedModel model = cuda::load_model(retyped.file());
    EXPECT_TRUE(holds_file(model, retyped.weights())) << type_name(type);
    EXPECT_EQ(model.layer(0).gate_up.is_fused(), is_packed_type(type)) << type_name(type);
  }
  std::map<std::string, TensorType> types;  // of a matrix that is asked for twice
  const testkit::RetypedModel mixed(source, [&](const GgufTensor& tensor) {
    if (tensor.dims.size() < 2) return std::optional<TensorType>();
    const TensorType next = kWeightTypes[types.size() / 2 % kWeightTypes.size()];
    return std::optional(types.try_emplace(tensor.name, next).first->second);
  });
  EXPECT_TRUE(holds_file(cuda::load_model(mixed.file()), mixed.weights()));
}

/// Whether the upload of three rows refuses them, by name.
testing::AssertionResult upload_refuses(const testkit::OwnedMatrix& matrix) {
  cuda::DeviceBuffer<std::byte> packed(matrix.rows * cuda::packed_row_bytes(matrix.type, matrix.cols));
  try {
    cuda::upload({{"the matrix", matrix.view(), packed.data(), 1}}, {.slot_bytes = 4096});
  } catch (const FormatError& error) {
    if (std::string(error.what()).find("'the matrix'") != std::string::npos) return testing::AssertionSuccess();
    return testing::AssertionFailure() << "another message: " << error.what();
  }
  return testing::AssertionFailure() << "taken";
}

/// Steps, and the minima or offsets beside them, are looked at in every format, wherever the block has them.
TEST(CudaModelWeights, NoFormatHidesAStepThatIsNotFinite) {
  for (const TensorType type : testkit::kPackedTypes) {
    const testkit::OwnedMatrix clean = testkit::random_weights(type, 3, 512, 1);
    EXPECT_FALSE(upload_refuses(clean)) << type_name(type);
    std::vector<std::size_t> places = {testkit::place_of_step(type)};
    if (const auto minimum = testkit::place_of_minimum(type)) places.push_back(*minimum);
    for (const std::size_t place : places) {
      for (const std::uint16_t bits : {0x7C00, 0xFC00, 0x7E01}) {
        testkit::OwnedMatrix matrix = clean;
        const std::size_t last = matrix.bytes.size() - static_cast<std::size_t>(block_bytes(type));
        testkit::detail::put(std::span(matrix.bytes), last + place, bits);
        EXPECT_TRUE(upload_refuses(matrix)) << type_name(type) << ", " << bits << " at " << place;
      }
    }
  }
}

/// The model's file with one byte pair changed, somewhere in the data of a tensor.
std::filesystem::path damaged(const SmallModel& small, const std::string& tensor, std::int64_t offset,
                              std::uint16_t bits) {
  const std::filesystem::path source = small.directory.file("model.gguf"), path = small.directory.file("damaged.gguf");
  std::filesystem::copy_file(source, path, std::filesystem::copy_options::overwrite_existing);
  const std::byte* const begin = small.file->tensors().front().data.data();
  const auto data_at = static_cast<std::int64_t>(std::filesystem::file_size(source)) -
                       (small.file->tensors().back().data.data() + small.file->tensors().back().data.size() - begin);
  const std::int64_t at = data_at + (small.file->tensor(tensor).data.data() - begin) + offset;
  std::fstream stream(path, std::ios::in | std::ios::out | std::ios::binary);
  stream.seekp(at);
  stream.write(reinterpret_cast<const char*>(&bits), 2);
  return path;
}

/// What the room holds of the device and of page-locked memory.
std::int64_t held_bytes() {
  const cuda::AllocationCount count = cuda::allocation_count();
  return count.device_bytes + count.pinned_bytes;
}

TEST(CudaModelWeights, AFileThatIsCorruptInItsMiddleIsRefusedAndLeavesNoMemory) {
  const SmallModel small(gemma4_tiny(), 2);
  (void)cuda::load_model(*small.file);  // kernels are loaded
  const std::int64_t before = held_bytes();
  struct Damage {
    const char* tensor;
    std::int64_t offset;
    std::uint16_t bits;
  };
  const std::int64_t q6_row = row_bytes(TensorType::kQ6K, 256);
  for (const Damage& damage : {Damage{"blk.3.attn_q.weight", 144 * 17, 0x7C00},
                               {"blk.4.ffn_up.weight", 2, 0xFE01},
                               {"token_embd.weight", 300 * q6_row + 208, 0x7E00},
                               {"blk.5.attn_norm.weight", 4 * 7 + 2, 0x7F80}}) {
    const GgufFile file = GgufFile::open(damaged(small, damage.tensor, damage.offset, damage.bits));
    try {
      (void)cuda::load_model(file);
      ADD_FAILURE() << damage.tensor << " was taken";
    } catch (const FormatError& error) {
      EXPECT_NE(std::string(error.what()).find(damage.tensor), std::string::npos) << error.what();
    }
    EXPECT_EQ(held_bytes(), before) << damage.tensor;
  }
  EXPECT_TRUE(holds_file(cuda::load_model(*small.file), small.weights)) << "the next one loads";
}

TEST(CudaModelWeights, AnUploadThatEndsEarlyLeavesNoMemory) {
  const SmallModel small(gemma4_tiny(), 2);
  (void)cuda::load_model(*small.file);
  const std::int64_t before = held_bytes();
  cuda::LoadOptions options;
  options.upload.slot_bytes = 16384;
  int n_batch = 0;
  options.upload.on_progress = [&](std::int64_t) {
    if (++n_batch == 20) throw std::runtime_error("no more");
  };
  EXPECT_THROW((void)cuda::load_model(*small.file, options), std::runtime_error);
  EXPECT_EQ(n_batch, 20);
  EXPECT_EQ(held_bytes(), before);
  options.upload.slot_bytes = 16;
  EXPECT_TRUE(testkit::refuses([&] { (void)cuda::load_model(*small.file, options); }, {"a slot 16"}));
  EXPECT_EQ(held_bytes(), before);
}

TEST(CudaModelWeights, AMatrixOfAnotherShapeIsRefusedAndTakesNoMemory) {
  const SmallModel small(gemma4_tiny(), 2);
  ModelConfig other = gemma4_tiny();
  other.ffn_hidden = 256;
  const SmallModel narrow(other, 2);
  std::vector<ModelTensor> tensors = model_tensors(*narrow.file);  // a plan for fewer bytes than the weights have
  const std::int64_t before = held_bytes();
  EXPECT_TRUE(testkit::refuses([&] { const cuda::PackedModel model(small.weights, tensors); }, {"arena"}));
  EXPECT_EQ(held_bytes(), before);
}

}  // namespace
