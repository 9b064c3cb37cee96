// SPDX-License-Identifier: Apache-2.0
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/float16.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/plan/step_bytes.hpp"
#include "gemma4/synthetic/synthetic_model.hpp"
#include "gemma4/text/chat_template.hpp"
#include "gemma4/text/tokenizer.hpp"
#include "reference/backend.hpp"
#include "reference/sampler.hpp"
#include "tests/support/gguf_edit.hpp"
#include "tests/support/micro_file.hpp"
#include "tests/support/model_logits.hpp"
#include "tests/support/temp_dir.hpp"

/// Files as people have them, each the micro model with one thing changed: what is right for it, and the unchanged
/// model as the control.
namespace {

using namespace gemma4;
using testkit::Change;
using testkit::GgufEdit;
using testkit::with_end_at;
using testkit::with_norms;
using testkit::with_output;
using testkit::with_tokens;

struct Micro : testkit::MicroFile {
  using MicroFile::MicroFile;

  [[nodiscard]] std::vector<float> logits(const std::vector<std::int32_t>& ids) const {
    const ModelWeights weights = weights_from_gguf(*file);
    reference::Backend<float> backend(weights, {.cache = Bf16Format{}, .context = 64, .max_chunk = 32});
    return testkit::logits_of(backend, ids, {static_cast<std::int64_t>(ids.size())});
  }
  /// Tokens after a prompt, until an end or `limit`.
  [[nodiscard]] std::vector<std::int32_t> continuation(const SamplerSettings& settings, std::size_t limit) const {
    const Tokenizer tokenizer(*file);
    const ModelWeights weights = weights_from_gguf(*file);
    reference::Backend<float> backend(weights, {.cache = Bf16Format{}, .context = 64, .max_chunk = 32});
    Model<reference::Backend<float>> model(backend);
    model.prefill(tokenizer.encode("hello"), 32, [](std::int64_t) {});
    std::vector<float> row(static_cast<std::size_t>(weights.config.vocab));
    std::vector<std::int32_t> ids;
    while (ids.size() < limit) {
      backend.copy_logits(0, row);
      const std::int32_t id = reference::sample(row, settings, model.position() - 1);
      if (tokenizer.is_end(id)) break;
      ids.push_back(id);
      model.decode(id);
    }
    return ids;
  }
  [[nodiscard]] std::string refusal() const {
    try {
      static_cast<void>(weights_from_gguf(*file));
    } catch (const FormatError& error) {
      return error.what();
    }
    return "";
  }
};

const std::vector<std::int32_t> kIds = {2, 276, 273, 280, 280, 283, 299, 12, 200, 319};

/// How far two rows of logits may be apart that are sums of the same 256 products in another order, as a matrix product
/// of another size makes them: each by 2 * 256 * 2^-24 |x| |w|, |x| being 16 times the deviation of the logits where
/// the rows of the head have length 1.
constexpr double kSumRounding = 2 * 256 * 0x1p-24 * 16;

/// The ids that have rows in a model of `n_token` tokens.
std::vector<std::int32_t> ids_below(std::int32_t n_token) {
  std::vector<std::int32_t> ids;
  std::ranges::copy_if(kIds, std::back_inserter(ids), [&](std::int32_t id) { return id < n_token; });
  return ids;
}

bool holds(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

// ---- begin and end

TEST(PublishedFiles, PromptsAndChatsBeginWithBosWhateverTheFileSays) {
  const Micro silent([](GgufEdit& edit) { edit.set("tokenizer.ggml.add_bos_token", false); });
  const Tokenizer tokenizer(*silent.file), control(*Micro().file);
  EXPECT_EQ(tokenizer.encode("hello"), control.encode("hello"));
  EXPECT_EQ(tokenizer.encode("hello").front(), 2);
  EXPECT_EQ(encode_chat(tokenizer, std::vector<ChatMessage>{{"user", "hello"}}).front(), 2);
  EXPECT_EQ(tokenizer.vocabulary().notes().size(), 1u);
}

TEST(PublishedFiles, GenerationStopsAtEveryEndWhateverNamesAndTypesIt) {
  const std::vector<std::int32_t> greedy = Micro().continuation({}, 8);
  ASSERT_EQ(greedy.size(), 8u) << "the control: nothing ends it";
  const std::int32_t second = greedy[1];
  ASSERT_NE(second, greedy[0]);
  for (const char* end : {"<eos>", "<turn|>", "<|tool_response>"}) {
    for (const TokenType type : {TokenType::kNormal, TokenType::kControl, TokenType::kUserDefined}) {
      for (const std::optional<std::uint32_t> eos : {std::optional<std::uint32_t>(), std::optional(6u)}) {
        const Micro micro(with_end_at(second, end, type, eos));
        EXPECT_EQ(micro.continuation({}, 8), (std::vector{greedy[0]})) << end << " of type " << static_cast<int>(type);
      }
    }
  }
  const Micro tag(with_end_at(second, "</s>", TokenType::kControl, std::nullopt));
  EXPECT_EQ(tag.continuation({}, 8), greedy) << "</s> is text";
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"}) {
    const Micro named([&](GgufEdit& edit) { edit.set(key, static_cast<std::uint32_t>(second)); });
    EXPECT_EQ(named.continuation({}, 8).size(), 1u) << key;
  }
  const Micro listed([&](GgufEdit& edit) {
    edit.set_array("tokenizer.ggml.eos_token_ids", std::vector<std::int32_t>{1, 6, second});
  });
  EXPECT_EQ(listed.continuation({}, 8).size(), 1u);
}

// ---- more and less than a text model

TEST(PublishedFiles, APartOfAModelIsRefusedByTheFirstTensorThatIsMissing) {
  const Micro whole;
  EXPECT_EQ(whole.refusal(), "");
  for (const GgufTensor& tensor : whole.file->tensors()) {
    const Micro part([&](GgufEdit& edit) { edit.drop_tensor(tensor.name); });
    EXPECT_TRUE(holds(part.refusal(), concat("'", tensor.name, "' is missing among its 29 tensors"))) << part.refusal();
  }
  const Micro two([](GgufEdit& edit) {
    std::erase_if(edit.tensors(), [](const auto& tensor) {
      return tensor.name != "token_embd.weight" && tensor.name != "rope_freqs.weight";
    });
  });
  EXPECT_TRUE(holds(two.refusal(), "tensor 'output_norm.weight' is missing among its 2 tensors")) << two.refusal();
  EXPECT_THROW(require_no_part(*two.file), FormatError) << "whoever needs the tokenizer alone asks here";
  EXPECT_NO_THROW(require_no_part(*whole.file));
  const Micro vocabulary([](GgufEdit& edit) { edit.tensors().clear(); });
  EXPECT_NO_THROW(require_no_part(*vocabulary.file)) << "a vocabulary is whole";
}

TEST(PublishedFiles, OtherEncodersInTheFileAreLeftOutAndSaid) {
  const Micro plain, more([](GgufEdit&edit) {
    edit.add("v.blk.0.attn_k.weight", {4, 4}, std::vector<float>(16, 1.0f));
    edit.add("mm.input_projection.weight", {4, 4}, std::vector<float>(16, 1.0f));
    edit.add("a.conv.weight", {4}, std::vector<float>(4, 1.0f)).add("v.per_layer_x.scale", {1}, {1.0f});
  });
  EXPECT_TRUE(testkit::same_rows(more.logits(kIds), plain.logits(kIds)));
  EXPECT_EQ(model_tensors(*more.file), model_tensors(*plain.file));
  ASSERT_EQ(model_notes(*more.file).size(), 1u);
  EXPECT_TRUE(holds(model_notes(*more.file)[0],
                    "left out 4 tensors that are not the text model's: 2 of v.*, 1 of mm.*, 1 of a.*"))
      << model_notes(*more.file)[0];
  EXPECT_TRUE(model_notes(*plain.file).empty());
  const Micro strange([](GgufEdit& edit) { edit.add("vision.weight", {4}, std::vector<float>(4, 1.0f)); });
  EXPECT_TRUE(holds(strange.refusal(), "'vision.weight' is not part of the architecture")) << "the control";
}

TEST(PublishedFiles, WhatIsNoTextModelIsCalledByItsKindBeforeAnythingElse) {
  const auto only = [](std::vector<std::pair<const char*, const char*>> keys) {
    return [keys](GgufEdit& edit) {
      edit.drop_keys();
      for (const auto& [key, value] : keys) edit.set(key, std::string(value));
    };
  };
  struct Case {
    Change change;
    const char* message;
  };
  const Case cases[] = {
      {only({{"general.architecture", "clip"}, {"general.type", "mmproj"}}), "this is a clip file, not a text model"},
      {only({{"general.architecture", "clip"}}), "this is a clip file, not a text model"},
      {only({{"general.architecture", "gemma4"}, {"general.type", "mmproj"}}), "this is a clip file"},
      {only({{"general.architecture", "gemma4"}, {"general.type", "adapter"}}), "this is an adapter file"},
      {only({{"general.architecture", "gemma4"}, {"adapter.type", "lora"}}), "this is an adapter file"},
      {only({{"general.type", "imatrix"}}), "this is an imatrix file, not a text model"},
      {[](GgufEdit& edit) { edit.drop_keys().set_array("imatrix.datasets", std::vector<std::string>{"a"}); },
       "this is an imatrix file"},
      {only({{"general.architecture", "controlvector"}}), "this is a control vector file"},
      {only({{"general.architecture", "gemma4"}, {"general.type", "poem"}}), "this is a poem file"},
      {only({{"general.architecture", "llama"}, {"general.type", "model"}}), "'llama', expected 'gemma4'"},
      {only({{"general.type", "model"}}), "general.architecture"},
  };
  for (const auto& [change, message] : cases) {
    const Micro micro(change);
    EXPECT_TRUE(holds(micro.refusal(), message)) << micro.refusal();
    try {
      const Tokenizer tokenizer(*micro.file);
      ADD_FAILURE() << "its tokenizer was taken: " << message;
    } catch (const FormatError& error) {
      EXPECT_TRUE(holds(error.what(), message)) << error.what();
    }
  }
  const Micro said([](GgufEdit& edit) { edit.set("general.type", std::string("model")); });
  EXPECT_EQ(said.refusal(), "") << "the control";
}

// ---- an output matrix of its own

TEST(PublishedFiles, AnOutputMatrixOfItsOwnIsTheHead) {
  const Micro tied, copied(with_output(false)), other(with_output(true));
  const std::vector<float> expected = tied.logits(kIds);
  EXPECT_TRUE(testkit::same_rows(copied.logits(kIds), expected));
  std::vector<float> actual = other.logits(kIds);
  EXPECT_FALSE(testkit::rows_close(actual, expected, 320, kSumRounding))
      << "the control: the embedding is not the head";
  for (std::size_t row = 0; row < kIds.size(); ++row) std::reverse(&actual[320 * row], &actual[320 * row] + 320);
  EXPECT_TRUE(testkit::rows_close(actual, expected, 320, kSumRounding)) << "but for the order of its rows";
  EXPECT_TRUE(weights_from_gguf(*tied.file).is_tied());
  EXPECT_FALSE(weights_from_gguf(*copied.file).is_tied());
}

TEST(PublishedFiles, AnOutputMatrixIsPlannedAndRead) {
  const Micro tied, untied(with_output(true));
  const ModelConfig config = weights_from_gguf(*tied.file).config;
  const auto plan = [&](const Micro& micro) {
    return plan_memory(config, model_tensors(*micro.file), {.context = 64});
  };
  const MemoryPlan without = plan(tied), with = plan(untied);
  EXPECT_EQ(with.bytes("weights_output"), with.bytes("weights_token_embd"));
  EXPECT_EQ(with.bytes("weights_token_embd"), without.bytes("weights_token_embd"));
  EXPECT_EQ(with.total_bytes(), without.total_bytes() + with.bytes("weights_output"));
  EXPECT_THROW(static_cast<void>(without.bytes("weights_output")), std::invalid_argument);
  const auto read = [&](const Micro& micro) {
    return step_read_bytes(config, model_tensors(*micro.file), Tq4Format{}, 10).weights;
  };
  EXPECT_EQ(read(untied), read(tied) + packed_row_bytes(TensorType::kQ6K, 256)) << "one row of the embedding more";
}

TEST(PublishedFiles, AnOutputMatrixOfAnotherShapeIsRefused) {
  const Micro shorter([](GgufEdit& edit) {
    with_output(false)(edit);
    GgufEdit::Tensor& output = edit.tensor("output.weight");
    output.dims[1] = 300;
    output.data.resize(output.data.size() / 320 * 300);
  });
  EXPECT_TRUE(holds(shorter.refusal(), "'output.weight' has dimensions [256, 300], expected [256, 320]"))
      << shorter.refusal();
}

// ---- a model in parts

/// `synthesize --split-max-size`: each tensor in a part of its own, several, one of all; prefill in chunks, then
/// decode.
TEST(PublishedFiles, LogitsOfAModelInPartsAreThoseOfTheWholeBitForBit) {
  const testkit::TempDir folder;
  const auto logits = [](const std::filesystem::path& path) {
    const GgufFile file = GgufFile::open(path);
    const ModelWeights weights = weights_from_gguf(file);
    reference::Backend<float> backend(weights, {.cache = Tq4Format{}, .context = 64, .max_chunk = 32});
    return testkit::logits_of(backend, kIds, {5, 3, 1});
  };
  for (const WeightMixInfo& info : kWeightMixes) {
    SyntheticOptions options{.seed = 3, .mix = info.mix};
    write_synthetic_model(folder.file("one.gguf"), testkit::micro_config(), options);
    const std::vector<float> whole = logits(folder.file("one.gguf"));
    for (const std::int64_t limit : {std::int64_t{1}, std::int64_t{100'000}, std::int64_t{1} << 40}) {
      options.split_max_bytes = limit;
      const auto files = write_synthetic_model(folder.file("m.gguf"), testkit::micro_config(), options);
      EXPECT_EQ(files.size() == 1, limit > 1'000'000) << limit;
      EXPECT_TRUE(testkit::same_rows(logits(files.front()), whole)) << info.name << ", parts of " << limit << " B";
      // Control: a byte of the last tensor.
      std::fstream last(files.back(), std::ios::binary | std::ios::in | std::ios::out);
      last.seekg(-40, std::ios::end);
      const char byte = static_cast<char>(last.get() ^ 0x15);
      last.seekp(-40, std::ios::end);
      last.put(byte);
      last.close();
      EXPECT_FALSE(testkit::same_rows(logits(files.front()), whole))
          << info.name << ", parts of " << limit << " B, spoiled";
    }
  }
}

// ---- a tokenizer shorter than the embedding

TEST(PublishedFiles, RowsBeyondTheTokenizerHaveNoLogits) {
  const Micro full;
  for (const std::int64_t n_token : {300, 299, 317}) {
    const Micro shorter(with_tokens(static_cast<std::size_t>(n_token)));
    const std::vector<std::int32_t> ids = ids_below(static_cast<std::int32_t>(n_token));
    const std::vector<float> all = full.logits(ids), some = shorter.logits(ids);
    const auto n = static_cast<std::size_t>(n_token);
    ASSERT_EQ(some.size(), ids.size() * n);
    std::vector<float> first, next;  // of the whole rows; the control is off by one
    for (std::size_t row = 0; row < ids.size(); ++row) {
      first.insert(first.end(), &all[320 * row], &all[320 * row] + n);
      next.insert(next.end(), &all[320 * row] + 1, &all[320 * row] + 1 + n);
    }
    EXPECT_TRUE(testkit::rows_close(some, first, n_token, kSumRounding));
    EXPECT_FALSE(testkit::rows_close(some, next, n_token, kSumRounding));
    ASSERT_EQ(model_notes(*shorter.file).size(), 1u);
    EXPECT_TRUE(holds(model_notes(*shorter.file)[0],
                      concat("the tokenizer has ", n_token, " tokens, the embedding 320 rows; the last ", 320 - n_token,
                             " are never sampled")))
        << model_notes(*shorter.file)[0];
  }
}

TEST(PublishedFiles, RowsBeyondTheTokenizerAreNeverSampled) {
  const Micro full, shorter(with_tokens(300));
  const SamplerSettings hot{.temperature = 50, .seed = 1};
  const auto beyond = [](const std::vector<std::int32_t>& ids) {
    return std::ranges::count_if(ids, [](std::int32_t id) { return id >= 300; });
  };
  EXPECT_GT(beyond(full.continuation(hot, 40)) + beyond(full.continuation({}, 40)), 0) << "the control: it would";
  EXPECT_EQ(beyond(shorter.continuation(hot, 40)), 0);
  EXPECT_EQ(beyond(shorter.continuation({}, 40)), 0);
}

TEST(PublishedFiles, PlansHoldTheRowsThatThereAre) {
  const Micro shorter(with_tokens(300));
  const std::vector<ModelTensor> tensors = model_tensors(*shorter.file);
  const auto embedding =
      std::ranges::find_if(tensors, [](const ModelTensor& tensor) { return tensor.name == "token_embd.weight"; });
  EXPECT_EQ(embedding->dims, (std::vector<std::int64_t>{256, 300}));
  const MemoryPlan plan = plan_memory(weights_from_gguf(*shorter.file).config, tensors, {.context = 64});
  EXPECT_EQ(plan.bytes("weights_token_embd"), (300 * packed_row_bytes(TensorType::kQ6K, 256) + 255) / 256 * 256);
}

TEST(PublishedFiles, ATokenizerLongerThanTheEmbeddingIsRefused) {
  const Micro longer(with_tokens(321));
  EXPECT_TRUE(holds(longer.refusal(), "tokenizer.ggml.tokens has 321 tokens, tensor 'token_embd.weight' 320 rows"))
      << longer.refusal();
}

// ---- norms in half the bits

TEST(PublishedFiles, NormsOfHalfTheBitsAreTheirValues) {
  const std::vector<float> plain = Micro().logits(kIds);
  const std::vector<float> f16 = Micro(with_norms<F16>(true)).logits(kIds);
  const std::vector<float> bf16 = Micro(with_norms<Bf16>(true)).logits(kIds);
  EXPECT_TRUE(testkit::same_rows(f16, Micro(with_norms<F16>(false)).logits(kIds)));
  EXPECT_TRUE(testkit::same_rows(bf16, Micro(with_norms<Bf16>(false)).logits(kIds)));
  EXPECT_FALSE(testkit::same_rows(f16, plain)) << "the control: rounding shows";
  EXPECT_FALSE(testkit::same_rows(f16, bf16)) << "the control: the types are two";
  const Micro integers([](GgufEdit& edit) { edit.tensor("output_norm.weight").type = 26; });
  EXPECT_TRUE(holds(integers.refusal(), "'output_norm.weight' has type I32, expected F32, F16 or BF16"))
      << integers.refusal();
}

}  // namespace
