// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <ostream>
#include <string>
#include <vector>

#include "gemma4/config_json.hpp"
#include "gemma4/gguf/assistant_tensors.hpp"
#include "gemma4/model/assistant_weights.hpp"
#include "gemma4/plan/drafter_plan.hpp"
#include "gemma4/text/tokenizer.hpp"
#include "tests/support/micro_drafter.hpp"
#include "tests/support/micro_file.hpp"
#include "tests/support/property.hpp"
#include "tests/support/refuses.hpp"
#include "tests/support/retyped_model.hpp"

/// Files of drafters: what is read, what is held against the target, and what is refused, by its name.
namespace gemma4 {
namespace {

using testkit::GgufEdit;
using testkit::micro_config;
using testkit::micro_drafter_config;
using testkit::MicroDrafter;

const std::filesystem::path kData = GEMMA4_TEST_DATA;
const std::string kPrefix = "gemma4-assistant.";

[[nodiscard]] std::string refusal(const GgufFile& file, const ModelConfig& target = micro_config()) {
  try {
    static_cast<void>(assistant_weights_from_gguf(file, target));
  } catch (const FormatError& error) {
    return error.what();
  }
  return "";
}

[[nodiscard]] bool holds(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

// ---- what is read

TEST(AssistantFile, TheTrainedDrafterIsReadAndFitsItsTarget) {
  const GgufFile file = GgufFile::open(kData / "nano-assistant/nano-assistant-Q8_0.gguf");
  EXPECT_EQ(assistant_config_from_gguf(file), gemma4_nano_assistant());
  const AssistantWeights weights = assistant_weights_from_gguf(file, gemma4_nano());
  EXPECT_EQ(weights.config, gemma4_nano_assistant());
  EXPECT_EQ(weights.token_embd.rows, 4096);
  EXPECT_EQ(weights.pre_projection.rows, 256);
  EXPECT_EQ(weights.pre_projection.cols, 1024);
  EXPECT_EQ(weights.post_projection.rows, 512);
  EXPECT_EQ(weights.post_projection.cols, 256);
  ASSERT_EQ(weights.layers.size(), 4u);
  EXPECT_TRUE(weights.layers[3].attn_k.empty());
  EXPECT_EQ(weights.layers[3].attn_q.rows, 2048);
  EXPECT_EQ(assistant_tensors(gemma4_nano_assistant()), model_tensors(file)) << "names, types, shapes and their order";
}

TEST(AssistantFile, ItIsNoTextModelAndATextModelIsNoDrafter) {
  const MicroDrafter drafter;
  const testkit::MicroFile model;
  const auto message = [](const auto& read) -> std::string {
    try {
      read();
    } catch (const FormatError& error) {
      return error.what();
    }
    return "";
  };
  const std::string expected = "this is a drafter (gemma4-assistant), not a text model";
  EXPECT_TRUE(holds(message([&] { static_cast<void>(weights_from_gguf(*drafter.file)); }), expected));
  EXPECT_TRUE(holds(message([&] { static_cast<void>(Tokenizer(*drafter.file)); }), expected));
  EXPECT_TRUE(holds(refusal(*model.file), "this is a text model, not a drafter"));
  const MicroDrafter clip([](GgufEdit& edit) { edit.set("general.type", std::string("mmproj")); });
  EXPECT_TRUE(holds(refusal(*clip.file), "this is a clip file, not a drafter"));
  const MicroDrafter llama([](GgufEdit& edit) { edit.set("general.architecture", std::string("llama")); });
  EXPECT_TRUE(holds(refusal(*llama.file), "'llama', expected 'gemma4-assistant'"));
}

TEST(AssistantFile, ASyntheticOneSaysWhatItsConfigSays) {
  const MicroDrafter micro;
  EXPECT_EQ(assistant_config_from_gguf(*micro.file), micro_drafter_config());
  EXPECT_EQ(model_tensors(*micro.file), assistant_tensors(micro_drafter_config()));
  EXPECT_EQ(refusal(*micro.file), "");
}

TEST(AssistantFile, TheShapeOfThe31BHasThePublishedSize) {
  const AssistantConfig config = gemma4_31b_assistant();
  std::int64_t n_parameter = 0;
  for (const ModelTensor& tensor : assistant_tensors(config)) n_parameter += tensor.size();
  EXPECT_NEAR(static_cast<double>(2 * n_parameter) / 1e6, 927, 0.02 * 927) << "MB in bf16";
  EXPECT_NO_THROW(require_assistant_fits("31b-assistant", config, gemma4_31b()));
  EXPECT_EQ(last_layer_of_kind(gemma4_31b(), true), 58);
  EXPECT_EQ(last_layer_of_kind(gemma4_31b(), false), 59);
}

TEST(AssistantFile, EveryTypeOfMatrixIsTaken) {
  const AssistantConfig config = [] {
    AssistantConfig wide = micro_drafter_config();
    wide.own.hidden = wide.own.ffn_hidden = 256;  // rows of whole blocks of any type
    return wide;
  }();
  const MicroDrafter source(config);
  for (const TensorType type : kWeightTypes) {
    const testkit::RetypedModel typed(*source.file, testkit::all_matrices(type));
    const AssistantWeights weights = assistant_weights_from_gguf(typed.file(), micro_config());
    EXPECT_EQ(weights.pre_projection.type, type);
    EXPECT_EQ(weights.layers[1].ffn_down.type, type);
    EXPECT_FALSE(drafter_buffers(config, model_tensors(typed.file()), PlanTarget::kCuda).empty());
  }
  const testkit::RetypedModel foreign(*source.file, testkit::one_tensor("nextn.pre_projection.weight", TensorType{18}));
  EXPECT_TRUE(
      holds(refusal(foreign.file()), "tensor 'nextn.pre_projection.weight' is IQ3_XXS, which is not supported"));
  EXPECT_TRUE(testkit::refuses(
      [&] { static_cast<void>(drafter_buffers(config, model_tensors(foreign.file()), PlanTarget::kCuda)); },
      {"'nextn.pre_projection.weight' of the drafter is IQ3_XXS"}));
}

TEST(AssistantFile, RowsThatPadTheEmbeddingAreNoTokens) {
  const auto pad = [](GgufEdit& edit) {
    GgufEdit::Tensor& embedding = edit.tensor("token_embd.weight");
    const std::size_t row = embedding.data.size() / static_cast<std::size_t>(embedding.dims[1]);
    embedding.dims[1] += 2;
    embedding.data.resize(embedding.data.size() + 2 * row);
  };
  const MicroDrafter padded(pad);
  const AssistantWeights weights = assistant_weights_from_gguf(*padded.file, micro_config());
  EXPECT_EQ(weights.token_embd.rows, micro_config().vocab);
}

// ---- what is held against the target

TEST(AssistantFile, AnotherTargetIsRefusedByWhatDiffers) {
  struct Case {
    std::function<void(ModelConfig&)> change;
    const char* message;
  };
  const Case cases[] = {
      {[](ModelConfig& c) { c.hidden = 512; }, "the drafter's embedding_length_out is 256, the target's is 512"},
      {[](ModelConfig& c) { c.vocab = 321; }, "the drafter's number of tokens is 320, the target's is 321"},
      {[](ModelConfig& c) { c.window = 64; }, "the drafter's window is 32, the target's is 64"},
      {[](ModelConfig& c) { c.sliding.head_dim = 128; }, "the drafter's sliding head size is 64, the target's is 128"},
      {[](ModelConfig& c) { c.full.head_dim = 256; }, "the drafter's full head size is 128, the target's is 256"},
      {[](ModelConfig& c) { c.sliding.n_head_kv = 2; },
       "the drafter's sliding number of KV heads is 1, the target's is 2"},
      {[](ModelConfig& c) { c.full.n_head_kv = 4; }, "the drafter's full number of KV heads is 1, the target's is 4"},
      {[](ModelConfig& c) { c.sliding.rope_theta = 2e4; }, "the drafter's sliding RoPE base is 10000"},
      {[](ModelConfig& c) { c.full.rope_theta = 2e6; }, "the drafter's full RoPE base is 1e+06"},
      {[](ModelConfig& c) { c.full.rope_pairs = 8; }, "the drafter's full number of rotated pairs is 16"},
      {[](ModelConfig& c) {
         c.is_sliding = {0, 0};
       },
       "the drafter has 2 sliding layers, the target has none"},
      {[](ModelConfig& c) {
         c.is_sliding = {1, 1};
       },
       "the drafter has 2 full layers, the target has none"},
  };
  const MicroDrafter micro;
  for (const auto& [change, message] : cases) {
    ModelConfig target = micro_config();
    change(target);
    const std::string text = refusal(*micro.file, target);
    EXPECT_TRUE(holds(text, message)) << "no '" << message << "' in: " << text;
  }
  ModelConfig other = micro_config();  // the control: what a drafter need not share
  other.n_head = 8, other.ffn_hidden = 512, other.context = 77, other.is_sliding = {1, 1, 0, 1}, other.softcap = 15;
  EXPECT_EQ(refusal(*micro.file, other), "");
}

TEST(AssistantFile, AWindowOfOneKeyIsRefused) {
  ModelConfig target = micro_config();
  target.window = 1;
  const MicroDrafter micro(micro_drafter_config(target));
  EXPECT_TRUE(holds(refusal(*micro.file, target), "window is 1, expected at least 2"));
}

// ---- what is refused

struct Malformed {
  const char* name;
  std::function<void(GgufEdit&)> change;
  std::vector<std::string> parts;  ///< of the message: the thing, what was expected, what was found
};

void PrintTo(const Malformed& malformed, std::ostream* stream) {
  *stream << malformed.name;
}

auto set_count(const char* key, std::uint32_t value) {
  return [=](GgufEdit& edit) { edit.set(kPrefix + key, value); };
}
auto drop_key(const char* key) {
  return [=](GgufEdit& edit) { edit.drop_key(kPrefix + key); };
}
auto add_vector(const char* name) {
  return [=](GgufEdit& edit) { edit.add(name, {64}, std::vector<float>(64, 1.0f)); };
}

std::vector<Malformed> key_cases() {
  return {
      {"NextnLayers",
       set_count("nextn_predict_layers", 3),
       {"nextn_predict_layers is 3", "expected gemma4-assistant.block_count = 4"}},
      {"SharedLayers",
       set_count("attention.shared_kv_layers", 0),
       {"shared_kv_layers is 0", "expected gemma4-assistant.block_count = 4"}},
      {"NoNextnLayers", drop_key("nextn_predict_layers"), {"nextn_predict_layers"}},
      {"NoHiddenOfTheTarget", drop_key("embedding_length_out"), {"embedding_length_out"}},
      {"HiddenOfTheTargetZero", set_count("embedding_length_out", 0), {"embedding_length_out is 0", "at least 1"}},
      {"HiddenOfTheTargetHuge", set_count("embedding_length_out", 1u << 31), {"embedding_length_out is 2147483648"}},
      {"NoLayers", set_count("block_count", 0), {"block_count is 0", "expected 1 to 4096"}},
      {"PatternOfAnotherLength", set_count("block_count", 3), {"sliding_window_pattern has 4 entries", "= 3"}},
      {"PerLayerEmbeddings", set_count("embedding_length_per_layer_input", 256), {"per-layer embeddings", "256"}},
      {"Experts", set_count("expert_count", 8), {"experts", "expert_count = 8"}},
      {"Softcap",
       [](GgufEdit& edit) { edit.set(kPrefix + "final_logit_softcapping", 30.0f); },
       {"a softcap of the drafter's logits", "= 30"}},
      {"HeadSizeNoPowerOfTwo",
       [](GgufEdit& edit) {
         for (const char* key : {"attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"})
           edit.set(kPrefix + key, std::uint32_t{65});
       },
       {"sliding head_dim is 65", "a power of two"}},
      {"ValuesOfAnotherSize", set_count("attention.value_length", 64), {"value_length is 64", "= 128"}},
      {"TokensMoreThanRows",
       [](GgufEdit& edit) { edit.set_array("tokenizer.ggml.tokens", std::vector<std::string>(400, "a")); },
       {"400 tokens", "320 rows"}},
  };
}

std::vector<Malformed> tensor_cases() {
  return {
      {"MaskedEmbeddings",
       add_vector("masked_embd_centroids.weight"),
       {"masked embeddings", "tensor 'masked_embd_centroids.weight'", "not implemented"}},
      {"MaskedOrdering", add_vector("masked_embd_ordering"), {"masked embeddings", "'masked_embd_ordering'"}},
      {"KeysOfItsOwn", add_vector("blk.0.attn_k.weight"), {"'blk.0.attn_k.weight' is not part of"}},
      {"ValuesOfItsOwn", add_vector("blk.2.attn_v.weight"), {"'blk.2.attn_v.weight' is not part of"}},
      {"NormOfKeys", add_vector("blk.1.attn_k_norm.weight"), {"'blk.1.attn_k_norm.weight' is not part of"}},
      {"OutputMatrix", add_vector("output.weight"), {"'output.weight' is not part of"}},
      {"LayerTooMany", add_vector("blk.4.attn_norm.weight"), {"'blk.4.attn_norm.weight' is not part of"}},
      {"Vision", add_vector("v.patch.weight"), {"'v.patch.weight' is not part of a drafter"}},
      {"ExpertTensor", add_vector("blk.0.ffn_gate_inp.weight"), {"experts", "'blk.0.ffn_gate_inp.weight'"}},
      {"PreProjectionNarrow",
       [](GgufEdit& edit) {
         GgufEdit::Tensor& tensor = edit.tensor("nextn.pre_projection.weight");
         tensor.dims[0] = 256, tensor.data.resize(tensor.data.size() / 2);
       },
       {"'nextn.pre_projection.weight' has dimensions [256, 64]", "expected [512, 64]"}},
      {"PostProjectionTurned",
       [](GgufEdit& edit) { std::ranges::reverse(edit.tensor("nextn.post_projection.weight").dims); },
       {"'nextn.post_projection.weight' has dimensions [256, 64]", "expected [64, 256]"}},
      {"QueriesShort",
       [](GgufEdit& edit) {
         GgufEdit::Tensor& tensor = edit.tensor("blk.3.attn_q.weight");
         tensor.dims[1] /= 2, tensor.data.resize(tensor.data.size() / 2);
       },
       {"'blk.3.attn_q.weight' has dimensions [64, 256]", "expected [64, 512]"}},
      {"NormOfIntegers",
       [](GgufEdit& edit) { edit.tensor("output_norm.weight").type = 26; },
       {"'output_norm.weight' has type I32", "expected F32, F16 or BF16"}},
      {"RopeOfAnotherModel",
       [](GgufEdit& edit) {
         GgufEdit::Tensor& tensor = edit.tensor("rope_freqs.weight");
         std::ranges::copy_n(tensor.data.begin(), 4, tensor.data.begin() + 4 * 16);
       },
       {"'rope_freqs.weight' rotates 17 of 64 pairs", "expected 16"}},
  };
}

std::vector<Malformed> all_cases() {
  std::vector<Malformed> all = key_cases();
  const std::vector<Malformed> more = tensor_cases();
  all.insert(all.end(), more.begin(), more.end());
  return all;
}

class AssistantMalformed : public testing::TestWithParam<Malformed> {};

TEST_P(AssistantMalformed, IsRefusedByName) {
  const MicroDrafter micro(GetParam().change);
  const std::string message = refusal(*micro.file);
  ASSERT_NE(message, "") << "accepted";
  for (const std::string& part : GetParam().parts) EXPECT_TRUE(holds(message, part)) << part << " in: " << message;
}

INSTANTIATE_TEST_SUITE_P(Kinds, AssistantMalformed, testing::ValuesIn(all_cases()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(AssistantFile, EveryTensorThatIsMissingIsNamed) {
  for (const ModelTensor& tensor : assistant_tensors(micro_drafter_config())) {
    const MicroDrafter micro([&](GgufEdit& edit) { edit.drop_tensor(tensor.name); });
    EXPECT_TRUE(holds(refusal(*micro.file), "'" + tensor.name + "'")) << tensor.name << ": " << refusal(*micro.file);
  }
}

TEST(AssistantFile, EveryTensorOfAnotherShapeIsNamed) {
  for (const ModelTensor& tensor : assistant_tensors(micro_drafter_config())) {
    const MicroDrafter micro([&](GgufEdit& edit) {
      GgufEdit::Tensor& changed = edit.tensor(tensor.name);
      changed.dims.push_back(1);
      if (changed.dims.size() == 2) changed.dims = {1, changed.dims[0]};
    });
    const std::string message = refusal(*micro.file);
    if (tensor.name == "rope_freqs.weight") continue;  // its values are looked at, in whatever shape
    EXPECT_TRUE(holds(message, "'" + tensor.name + "' has ")) << tensor.name << ": " << message;
  }
}

RC_GTEST_PROP(AssistantFile, AnyDamageIsReadOrRefused, ()) {
  static const std::vector<std::byte> good = [] {
    const MicroDrafter micro;
    return GgufEdit(*micro.file).drop_key("tokenizer.ggml.merges").image();
  }();
  std::vector<std::byte> bytes = good;
  const auto n_damage = *rc::gen::inRange<std::size_t>(1, 6);
  for (std::size_t damage = 0; damage < n_damage; ++damage) {
    bytes[*rc::gen::inRange<std::size_t>(0, 16384)] =
        static_cast<std::byte>(*rc::gen::element(0, 1, 2, 8, 9, 127, 255));
  }
  try {
    static_cast<void>(assistant_weights_from_gguf(GgufFile::parse(bytes, "damaged"), micro_config()));
    RC_TAG("accepted");
  } catch (const FormatError&) {
    RC_TAG("refused");
  }
}

// ---- what it takes

TEST(AssistantFile, ThePlanCountsItsWeightsAndOneTokensActivations) {
  const AssistantConfig config = gemma4_31b_assistant();
  const std::vector<PlannedBuffer> buffers = drafter_buffers(config, assistant_tensors(config), PlanTarget::kCuda);
  std::int64_t sum = 0;
  for (const PlannedBuffer& buffer : buffers) {
    EXPECT_EQ(buffer.bytes % kDeviceAlignment, 0) << buffer.name;
    sum += buffer.bytes;
  }
  EXPECT_LE(static_cast<double>(sum), 0.6 * 0x1p30) << "the most that the drafter of the 31B may take";
  std::int64_t weights = 0;
  for (const ModelTensor& tensor : assistant_tensors(config)) weights += device_bytes(tensor);
  ASSERT_EQ(buffers.size(), 3u);
  EXPECT_EQ(buffers[0].bytes, weights);
  EXPECT_EQ(buffers[1].bytes, 7 * 262144 * 4);
  MemoryPlanOptions options;
  const std::vector<ModelTensor> tensors = model_tensors(gemma4_31b());
  const std::int64_t plain = plan_memory(gemma4_31b(), tensors, options).total_bytes();
  options.drafter = buffers;
  EXPECT_EQ(plan_memory(gemma4_31b(), tensors, options).total_bytes(), plain + sum);
  EXPECT_LT(drafter_buffers(config, assistant_tensors(config), PlanTarget::kReference)[1].bytes, buffers[1].bytes);
}

}  // namespace
}  // namespace gemma4
