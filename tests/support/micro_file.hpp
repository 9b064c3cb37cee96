// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/float16.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/text/vocabulary.hpp"
#include "tests/support/gguf_edit.hpp"
#include "tests/support/temp_dir.hpp"

/// The micro model as a file with something changed, and the changes that files of other people show.
namespace gemma4::testkit {

using Change = std::function<void(GgufEdit&)>;

struct MicroFile {
  explicit MicroFile(const Change& change) {
    GgufEdit edit = micro_model();
    change(edit);
    edit.write(folder.file("micro.gguf"));
    file.emplace(GgufFile::open(folder.file("micro.gguf")));
  }
  MicroFile() : MicroFile([](GgufEdit&) {}) {}

  TempDir folder;
  std::optional<GgufFile> file;
};

/// The micro model in which the token `id` has the text `end`, of a type, and its old text goes where that was.
[[nodiscard]] inline Change with_end_at(std::int32_t id, const std::string& end, TokenType type,
                                        std::optional<std::uint32_t> eos_id) {
  return [=](GgufEdit& edit) {
    const MicroFile plain;
    auto tokens = plain.file->array<std::string>("tokenizer.ggml.tokens");
    auto types = plain.file->array<std::int32_t>("tokenizer.ggml.token_type");
    const auto here = static_cast<std::size_t>(id);
    const auto there = static_cast<std::size_t>(std::ranges::find(tokens, end) - tokens.begin());
    if (there == tokens.size()) {
      tokens[here] = end;
    } else {
      std::swap(tokens[here], tokens[there]);
      types[there] = static_cast<std::int32_t>(TokenType::kNormal);
    }
    types[here] = static_cast<std::int32_t>(type);
    edit.set_array("tokenizer.ggml.tokens", tokens).set_array("tokenizer.ggml.token_type", types);
    if (eos_id) edit.set("tokenizer.ggml.eos_token_id", *eos_id);
  };
}

/// Rows of a tensor, the last first.
[[nodiscard]] inline std::vector<std::byte> reversed_rows(const GgufEdit::Tensor& tensor) {
  std::vector<std::byte> out;
  const std::size_t n = static_cast<std::size_t>(tensor.dims[1]), bytes = tensor.data.size() / n;
  for (std::size_t row = n; row-- > 0;) {
    out.insert(out.end(), tensor.data.begin() + static_cast<std::ptrdiff_t>(row * bytes),
               tensor.data.begin() + static_cast<std::ptrdiff_t>((row + 1) * bytes));
  }
  return out;
}

/// An output matrix beside the embedding: its rows, or those the last first.
[[nodiscard]] inline Change with_output(bool reversed) {
  return [=](GgufEdit& edit) {
    GgufEdit::Tensor output = edit.tensor("token_embd.weight");
    output.name = "output.weight";
    if (reversed) output.data = reversed_rows(output);
    edit.tensors().push_back(output);
  };
}

/// A tokenizer of `count` tokens: the first of those there are, or more.
[[nodiscard]] inline Change with_tokens(std::size_t count) {
  return [=](GgufEdit& edit) {
    const MicroFile plain;
    auto tokens = plain.file->array<std::string>("tokenizer.ggml.tokens");
    auto types = plain.file->array<std::int32_t>("tokenizer.ggml.token_type");
    for (std::size_t i = tokens.size(); i < count; ++i) tokens.push_back(concat("more", i)), types.push_back(1);
    tokens.resize(count), types.resize(count);
    edit.set_array("tokenizer.ggml.tokens", tokens).set_array("tokenizer.ggml.token_type", types);
  };
}

/// Every norm rounded to T: stored as that, or as the float32 that it is.
template <class T>
[[nodiscard]] Change with_norms(bool is_stored) {
  return [=](GgufEdit& edit) {
    for (GgufEdit::Tensor& tensor : edit.tensors()) {
      if (tensor.dims.size() != 1 || tensor.name == "rope_freqs.weight") continue;
      std::vector<std::byte> bytes;
      const auto put = [&](const auto& x) {
        const auto* const from = reinterpret_cast<const std::byte*>(&x);
        bytes.insert(bytes.end(), from, from + sizeof(x));
      };
      for (std::size_t i = 0; i < tensor.data.size() / sizeof(float); ++i) {
        float value = 0;
        std::memcpy(&value, &tensor.data[i * sizeof(float)], sizeof(float));
        T half{};
        if constexpr (std::is_same_v<T, F16>) {
          half = to_f16(value);
        } else {
          half = to_bf16(value);
        }
        is_stored ? put(half) : put(to_float(half));
      }
      tensor.data = bytes;
      if (is_stored) tensor.type = static_cast<std::uint32_t>(*plain_tensor_type<T>());
    }
  };
}

}  // namespace gemma4::testkit
