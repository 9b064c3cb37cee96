// SPDX-License-Identifier: Apache-2.0
// libFuzzer target: a small good model, in one to three parts, is changed in keys, tensors and bytes; whatever comes of
// it is either refused with FormatError or a model whose every tensor can be read and a tokenizer whose ends are
// tokens.
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gemma4/gguf/block_dequantise.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/model/weights.hpp"
#include "gemma4/plan/memory_plan.hpp"
#include "gemma4/plan/step_bytes.hpp"
#include "gemma4/text/sampling_defaults.hpp"
#include "gemma4/text/tokenizer.hpp"
#include "tests/support/gguf_edit.hpp"

namespace {

using namespace gemma4;
using testkit::GgufEdit;

constexpr std::array kKeys = {"split.no",
                              "split.count",
                              "split.tensors.count",
                              "general.alignment",
                              "general.type",
                              "general.architecture",
                              "tokenizer.ggml.model",
                              "tokenizer.ggml.pre",
                              "tokenizer.ggml.eos_token_id",
                              "tokenizer.ggml.eot_token_id",
                              "tokenizer.ggml.eom_token_id",
                              "tokenizer.ggml.eos_token_ids",
                              "tokenizer.ggml.bos_token_id",
                              "tokenizer.ggml.add_bos_token",
                              "tokenizer.ggml.tokens",
                              "tokenizer.ggml.token_type",
                              "tokenizer.ggml.merges",
                              "general.sampling.temp",
                              "general.sampling.top_k",
                              "general.sampling.top_p",
                              "general.sampling.min_p",
                              "gemma4.block_count",
                              "gemma4.embedding_length",
                              "gemma4.feed_forward_length",
                              "gemma4.context_length",
                              "gemma4.attention.head_count",
                              "gemma4.attention.head_count_kv",
                              "gemma4.attention.key_length",
                              "gemma4.attention.value_length_swa",
                              "gemma4.attention.sliding_window",
                              "gemma4.attention.sliding_window_pattern",
                              "gemma4.attention.layer_norm_rms_epsilon",
                              "gemma4.attention.shared_kv_layers",
                              "gemma4.final_logit_softcapping",
                              "gemma4.rope.freq_base"};
constexpr std::array kNames = {"output.weight",     "v.blk.0.attn_k.weight", "mm.0.weight",
                               "a.conv.weight",     "blk.0.attn_q.scale",    "rope_freqs.weight",
                               "token_embd.weight", "output_norm.weight"};

/// Takes an input apart; zeros once it is used up.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size) : data_(data), size_(size) {}
  std::uint8_t byte() { return at_ < size_ ? data_[at_++] : std::uint8_t{0}; }
  std::size_t word() { return std::size_t{byte()} << 8 | byte(); }
  std::size_t below(std::size_t count) { return count == 0 ? 0 : word() % count; }
  std::vector<std::byte> bytes(std::size_t count) {
    std::vector<std::byte> out(count);
    for (std::byte& b : out) b = static_cast<std::byte>(byte());
    return out;
  }

 private:
  const std::uint8_t* data_;
  std::size_t size_, at_ = 0;
};

void expect(bool holds) {
  if (!holds) __builtin_trap();
}

/// Two layers and a tensor for everything, in some 100 KB.
const GgufEdit& base() {
  static const GgufEdit made = [] {
    ModelConfig config = testkit::micro_config();
    config.vocab = 280;
    config.hidden = config.ffn_hidden = 32;
    config.n_head = 1;
    const testkit::TempDir folder;
    write_synthetic_model(folder.file("m.gguf"), config, {.only = TensorType::kQ8_0});
    return GgufEdit(GgufFile::open(folder.file("m.gguf")));
  }();
  return made;
}

GgufEdit::Key any_value(Input& input) {
  GgufEdit::Key key;
  const bool is_array = input.byte() % 3 == 0;
  key.element = input.byte() % 13;
  if (key.element == 9) key.element = 8;
  key.type = is_array ? 9 : key.element;
  key.count = is_array ? input.byte() % 8 : 1;
  for (std::uint64_t i = 0; i < key.count; ++i) {
    const std::size_t length = key.element == 8 ? input.byte() % 12 : 0;
    const auto item = input.bytes(key.element == 8 ? length : scalar_bytes(static_cast<GgufType>(key.element)));
    if (key.element == 8) {
      for (std::size_t b = 0; b < 8; ++b) key.bytes.push_back(static_cast<std::byte>(b == 0 ? length : 0));
    }
    key.bytes.insert(key.bytes.end(), item.begin(), item.end());
  }
  return key;
}

void change(GgufEdit& part, Input& input) {
  std::vector<GgufEdit::Tensor>& tensors = part.tensors();
  const std::uint8_t what = input.byte() % 9;
  const std::string key = kKeys[input.below(kKeys.size())];
  if (what == 0) part.set_raw(key, any_value(input));
  if (what == 1 && part.has_key(key)) part.drop_key(key);
  if (what == 2) part.set(key, static_cast<std::uint32_t>(input.byte()));
  if (tensors.empty()) return;
  const std::size_t at = input.below(tensors.size());
  GgufEdit::Tensor& tensor = tensors[at];
  switch (what) {
    case 3:
      tensors.erase(tensors.begin() + static_cast<std::ptrdiff_t>(at));
      break;
    case 4:
      tensor.type = input.byte() % 48;
      break;
    case 5:
      tensor.dims[input.below(tensor.dims.size())] = static_cast<std::int64_t>(input.word());
      break;
    case 6:
      tensor.name = kNames[input.below(kNames.size())];
      break;
    case 7: {
      GgufEdit::Tensor again = tensor;
      if (input.byte() % 2 == 0) again.name = kNames[input.below(kNames.size())];
      tensors.push_back(std::move(again));
      break;
    }
    case 8:
      tensor.data.resize(input.word() % (tensor.data.size() + 1));
      break;
    default:
      break;
  }
}

std::vector<GgufEdit> parts_of(Input& input) {
  const std::size_t n_part = 1 + input.byte() % 3;
  static GgufEdit whole = base();
  static const GgufEdit keys = [] {
    GgufEdit without = base();
    without.tensors().clear();
    return without;
  }();
  const std::size_t n = whole.tensors().size();
  std::vector<GgufEdit> parts(n_part);
  std::size_t next = 0;
  for (std::size_t no = 0; no < n_part; ++no) {
    if (no == 0) parts[0] = keys;
    const std::size_t end = no + 1 == n_part ? n : std::min(n, next + input.below(n));
    parts[no].tensors().assign(whole.tensors().begin() + static_cast<std::ptrdiff_t>(next),
                               whole.tensors().begin() + static_cast<std::ptrdiff_t>(end));
    next = end;
    if (n_part == 1) break;
    parts[no].set("split.no", static_cast<std::uint16_t>(no)).set("split.count", static_cast<std::uint16_t>(n_part));
    parts[no].set("split.tensors.count", static_cast<std::int32_t>(n));
  }
  for (int edits = input.byte() % 6; edits > 0; --edits) change(parts[input.below(n_part)], input);
  return parts;
}

void use_weights(const GgufFile& file) {
  const ModelWeights weights = weights_from_gguf(file);
  const ModelConfig& config = weights.config;
  expect(weights.token_embd.rows == config.vocab && weights.output.rows == config.vocab);
  const auto read = [](const QuantizedMatrix& matrix) {
    if (matrix.empty()) return;
    expect(static_cast<std::int64_t>(matrix.data.size()) == matrix.rows * row_bytes(matrix.type, matrix.cols));
    std::vector<float> row(static_cast<std::size_t>(matrix.cols));
    dequantise_row(matrix.type, matrix.row(matrix.rows - 1), row);
  };
  read(weights.token_embd), read(weights.output);
  expect(static_cast<std::int64_t>(weights.output_norm.size()) == config.hidden);
  for (const LayerWeights& layer : weights.layers) {
    for (const QuantizedMatrix* matrix : {&layer.attn_q, &layer.attn_k, &layer.attn_v, &layer.attn_output,
                                          &layer.ffn_gate, &layer.ffn_up, &layer.ffn_down}) {
      read(*matrix);
    }
    expect(static_cast<std::int64_t>(layer.attn_norm.size()) == config.hidden);
  }
  const std::vector<ModelTensor> tensors = model_tensors(file);
  expect(plan_memory(config, tensors, {.context = 16, .chunk = 4}).total_bytes() > 0);
  expect(step_read_bytes(config, tensors, Tq4Format{}, 3).total() > 0);
}

void use_vocabulary(const GgufFile& file) {
  const Tokenizer tokenizer(file);
  const Vocabulary& vocabulary = tokenizer.vocabulary();
  expect(vocabulary.add_bos() && vocabulary.bos_id() >= 0 && vocabulary.bos_id() < vocabulary.size());
  expect(std::ranges::is_sorted(end_tokens(vocabulary)));
  for (const std::int32_t id : end_tokens(vocabulary)) {
    expect(id >= 0 && id < vocabulary.size() && tokenizer.is_end(id) && vocabulary.text(id) != kNoEndText);
    expect(tokenizer.decode_piece(id, {.skip_control = true}).empty());
  }
  for (const std::string_view text : kEndTexts) {
    const auto id = vocabulary.find(text);
    expect(!id || tokenizer.is_end(*id));
  }
}

/// Calls `body`, which may refuse the file and do nothing else.
template <class TBody>
void guarded(const TBody& body) {
  try {
    body();
  } catch (const FormatError&) {
  }
}

void use(const GgufFile& file) {
  for (const GgufTensor& tensor : file.tensors()) expect(file.find_tensor(tensor.name) == &tensor);
  guarded([&] { use_weights(file); });
  guarded([&] { use_vocabulary(file); });
  guarded([&] { static_cast<void>(sampling_defaults(file)); });
  guarded([&] { static_cast<void>(model_notes(file)); });
  guarded([&] { require_no_part(file); });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Input input(data, size);
  std::vector<std::vector<std::byte>> images;
  for (const GgufEdit& part : parts_of(input)) images.push_back(part.image());
  for (int flips = input.byte() % 4; flips > 0; --flips) {
    std::vector<std::byte>& image = images[input.below(images.size())];
    image[(input.word() * 256 + input.byte()) % image.size()] ^= static_cast<std::byte>(input.byte());
  }
  guarded([&] {
    std::vector<GgufFile> parts;
    for (std::size_t no = 0; no < images.size(); ++no) {
      parts.push_back(GgufFile::parse(
          images[no], split_name("fuzz", {static_cast<std::int64_t>(no), static_cast<std::int64_t>(images.size())})));
    }
    use(parts.size() == 1 ? std::move(parts.front()) : GgufFile::join(std::move(parts)));
  });
  return 0;
}
