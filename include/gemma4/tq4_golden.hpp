// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "gemma4/attention.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/tq4_codebook.hpp"

/// Golden TQ4 attention: one case as another implementation computed it, with its own rotation and codebook.
namespace gemma4 {

/// The tensors of a case as floats, row-major. The norms are raw: not corrected.
struct Tq4Golden {
  AttentionShape shape;
  std::int64_t kv_len = 0;
  Codebook codebook;
  std::vector<float> rotation;                 ///< [head_dim, head_dim], rotated = rotation * x
  std::vector<float> q;                        ///< [n_query, n_head, head_dim]
  std::vector<float> k, v;                     ///< [n_head_kv, buffer_len, head_dim]; the tail is 1000 times larger
  std::vector<std::uint8_t> k_codes, v_codes;  ///< [n_head_kv, buffer_len, head_dim / 2]
  std::vector<float> k_norm, v_norm;           ///< [n_head_kv, buffer_len]
  std::vector<float> out_tq4;                  ///< [n_query, n_head, head_dim], on the decompressed cache
  std::vector<float> out_exact;                ///< the same on the original one

  /// Scores are scaled by 1 / sqrt(head_dim) and causal from the bottom right.
  [[nodiscard]] AttentionOptions options() const {
    return {.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim))};
  }
};

namespace detail {

/// A float tensor of exactly `size` values, whatever of F32 and BF16 it is stored as.
inline std::vector<float> golden_floats(const GgufFile& file, const std::string& name, std::int64_t size) {
  const GgufTensor& tensor = file.tensor(name);
  require_format(tensor.size() == size, file.path().string(), ": tensor '", name, "' has ", tensor.size(),
                 " values, expected ", size);
  std::vector<float> values(static_cast<std::size_t>(size));
  if (tensor.type == TensorType::kBf16) {
    std::ranges::transform(data_as<Bf16>(tensor), values.begin(), [](Bf16 value) { return to_float(value); });
  } else {
    std::ranges::copy(data_as<float>(tensor), values.begin());
  }
  return values;
}

inline std::vector<std::uint8_t> golden_bytes(const GgufFile& file, const std::string& name, std::int64_t size) {
  const GgufTensor& tensor = file.tensor(name);
  require_format(tensor.type == TensorType::kI8 && tensor.size() == size, file.path().string(), ": tensor '", name,
                 "' is ", type_name(tensor.type), " with ", tensor.size(), " values, expected I8 with ", size);
  std::vector<std::uint8_t> bytes(static_cast<std::size_t>(size));
  std::ranges::transform(tensor.data, bytes.begin(),
                         [](std::byte byte) { return std::to_integer<std::uint8_t>(byte); });
  return bytes;
}

/// [n_head, n_query, head_dim] as [n_query, n_head, head_dim].
inline std::vector<float> tokens_first(const std::vector<float>& heads_first, const AttentionShape& shape) {
  std::vector<float> out(heads_first.size());
  for (std::int64_t h = 0; h < shape.n_head; ++h) {
    for (std::int64_t t = 0; t < shape.n_query; ++t) {
      std::copy_n(heads_first.begin() + (h * shape.n_query + t) * shape.head_dim, shape.head_dim,
                  out.begin() + (t * shape.n_head + h) * shape.head_dim);
    }
  }
  return out;
}

}  // namespace detail

/// @throws FormatError naming the key or tensor that is missing or does not fit
[[nodiscard]] inline Tq4Golden read_tq4_golden(const std::filesystem::path& path) {
  const GgufFile file = GgufFile::open(path);
  Tq4Golden golden;
  AttentionShape& shape = golden.shape;
  shape = {.batch = 1,
           .n_query = file.get<std::int64_t>("n_query"),
           .n_head = file.get<std::int64_t>("n_head"),
           .n_head_kv = file.get<std::int64_t>("n_head_kv"),
           .head_dim = file.get<std::int64_t>("head_dim"),
           .buffer_len = file.get<std::int64_t>("buffer_len")};
  golden.kv_len = file.get<std::int64_t>("kv_len");
  try {
    require_attention("golden", shape, golden.options(), golden.kv_len);
  } catch (const std::invalid_argument& error) {
    throw FormatError(concat(path.string(), ": ", error.what()));
  }
  const auto floats = [&](const char* name, std::int64_t size) { return detail::golden_floats(file, name, size); };
  golden.codebook = codebook_from(floats("centroids", 16), floats("boundaries", 15));
  golden.rotation = floats("rotation", shape.head_dim * shape.head_dim);
  const std::int64_t n_q = shape.n_query * shape.n_head * shape.head_dim;
  const std::int64_t n_row = shape.n_head_kv * shape.buffer_len;
  golden.q = detail::tokens_first(floats("q", n_q), shape);
  golden.k = floats("k", n_row * shape.head_dim);
  golden.v = floats("v", n_row * shape.head_dim);
  golden.k_codes = detail::golden_bytes(file, "k_packed", n_row * shape.head_dim / 2);
  golden.v_codes = detail::golden_bytes(file, "v_packed", n_row * shape.head_dim / 2);
  golden.k_norm = floats("k_norm", n_row);
  golden.v_norm = floats("v_norm", n_row);
  golden.out_tq4 = detail::tokens_first(floats("out_tq4", n_q), shape);
  golden.out_exact = detail::tokens_first(floats("out_exact", n_q), shape);
  return golden;
}

}  // namespace gemma4
