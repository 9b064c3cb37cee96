// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <iterator>
#include <string>
#include <vector>

#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "reference/backend.hpp"
#include "tests/support/model_logits.hpp"
#include "tests/support/retyped_model.hpp"

/// Which types the matrices of a model may have, and how the others are refused.
namespace {

using namespace gemma4;
using testkit::all_matrices;
using testkit::one_tensor;
using testkit::RetypedModel;

const std::filesystem::path kTiny = std::filesystem::path(GEMMA4_TEST_DATA) / "tiny/tiny-a-Q6_K.gguf";
constexpr const char* kName = "blk.0.ffn_up.weight";

std::vector<float> logits(const ModelWeights& weights, const std::vector<std::int32_t>& tokens) {
  reference::Backend<float> backend(weights, {.cache = {}, .context = 64, .max_chunk = 64});
  return testkit::logits_of(backend, tokens, {64});
}

std::vector<float> logits(const testkit::TypeOf& type_of) {
  return logits(RetypedModel(kTiny, type_of).weights(), {2, 17, 900, 5, 333});
}

bool all_finite(const std::vector<float>& values) {
  return std::ranges::all_of(values, [](float value) { return std::isfinite(value); });
}

TEST(WeightTypes, AModelRunsWithAMatrixOfAnyOfThem) {
  const std::vector<float> as_it_is = logits(one_tensor("none", TensorType::kF32));
  for (const TensorType type : kWeightTypes) {
    const std::vector<float> values = logits(one_tensor(kName, type));
    EXPECT_TRUE(all_finite(values)) << type_name(type);
    // Q6_K of what is Q6_K, F32, F16 and BF16 are the same weights or nearly; the control is that others are seen.
    const bool is_coarser = block_size(type) > 1 && type != TensorType::kQ6K;
    EXPECT_TRUE(!is_coarser || values != as_it_is) << type_name(type);
  }
  EXPECT_EQ(logits(one_tensor(kName, TensorType::kF32)), as_it_is);
}

TEST(WeightTypes, AModelRunsWithAllMatricesOfAnyOfThem) {
  for (const TensorType type : kWeightTypes) {
    const RetypedModel model(kTiny, all_matrices(type));
    const ModelWeights weights = model.weights();
    EXPECT_EQ(weights.token_embd.type, type);
    EXPECT_EQ(weights.layers[5].ffn_down.type, type);
    EXPECT_TRUE(all_finite(logits(weights, {2, 17, 900}))) << type_name(type);
  }
}

/// The message with which a model whose kName has this type is refused; empty when it is not.
std::string refusal(const GgufFile& file) {
  try {
    (void)weights_from_gguf(file);
  } catch (const FormatError& error) {
    return error.what();
  }
  return "";
}

TEST(WeightTypes, TheOthersAreRefusedByNameAfterTheFileWasRead) {
  const std::string supported =
      "which is not supported; supported are Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, "
      "IQ4_XS, BF16, F16 and F32";
  std::vector<TensorTypeInfo> others(kForeignTensorTypes.begin(), kForeignTensorTypes.end());
  std::ranges::copy_if(kTensorTypes, std::back_inserter(others),
                       [](const TensorTypeInfo& info) { return !is_weight_type(info.type); });
  EXPECT_EQ(others.size() + kWeightTypes.size(), kForeignTensorTypes.size() + kTensorTypes.size());
  for (const TensorTypeInfo& info : others) {
    const RetypedModel model(kTiny, one_tensor(kName, info.type));
    // What the file says of itself can still be told.
    const GgufTensor& tensor = model.file().tensor(kName);
    EXPECT_EQ(type_name(tensor.type), info.name);
    EXPECT_EQ(static_cast<std::int64_t>(tensor.data.size()), tensor.size() / info.block_size * info.block_bytes);
    EXPECT_GT(total_bytes(model_tensors(model.file())), 0);
    const std::string message = refusal(model.file());
    EXPECT_NE(message.find(concat("tensor '", kName, "' is ", info.name, ", ", supported)), std::string::npos)
        << message;
    EXPECT_EQ(message.find("number"), std::string::npos) << message;
  }
}

TEST(WeightTypes, APlanOfMemoryNamesTheMatrixThatNothingRuns) {
  const auto refusal = [](const std::string& name, TensorType type) -> std::string {
    std::vector<ModelTensor> tensors = model_tensors(gemma4_tiny());
    std::ranges::find(tensors, name, &ModelTensor::name)->type = type;
    try {
      (void)plan_memory(gemma4_tiny(), tensors, {});
    } catch (const std::invalid_argument& error) {
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(refusal(kName, TensorType::kIq4Xs), "") << "control";
  const std::string message = refusal(kName, TensorType{18});
  EXPECT_NE(message.find("memory plan: tensor 'blk.0.ffn_up.weight' is IQ3_XXS, which is not supported"),
            std::string::npos)
      << message;
}

TEST(WeightTypes, EveryNumberOfGgmlHasAName) {
  for (const char* name :
       {"IQ3_XXS", "IQ3_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"}) {
    EXPECT_EQ(std::ranges::count(kForeignTensorTypes, name, &TensorTypeInfo::name), 1) << name;
  }
  for (std::uint32_t number = 0; number < 43; ++number) {
    EXPECT_TRUE(find_tensor_type(TensorType{number}).has_value()) << number;
  }
  EXPECT_FALSE(find_tensor_type(TensorType{43}).has_value()) << "control";
}

}  // namespace
