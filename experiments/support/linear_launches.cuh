// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cuda/quantized_linear.cuh"
#include "gemma4/config.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/gguf/model_tensors.hpp"

/// What `linear` launches: the products of a decode step, and with how many tokens by which path.
namespace gemma4::experiment {

enum class End { kPlain, kGeluUp, kSoftcap };

/// Where a launch has its input from.
enum class Start {
  kPlain,       ///< rows of bf16
  kNormLaunch,  ///< where the model normalises the residual stream first, a launch in front does it
};

[[nodiscard]] inline const char* input_name(Start start) {
  return start == Start::kPlain ? "bf16" : "norm_launch";
}

/// What multiplies, and for how many tokens.
struct Width {
  std::int64_t n_token = 0;
  cuda::LinearPath path = cuda::LinearPath::kDot;

  [[nodiscard]] const char* path_name() const { return path == cuda::LinearPath::kDot ? "dot" : "int8"; }
  [[nodiscard]] std::int64_t int8_from() const { return path == cuda::LinearPath::kDot ? n_token + 1 : n_token; }
};

/// Every number of tokens with every path that takes as many, few tokens first.
[[nodiscard]] inline std::vector<Width> widths_of(std::vector<std::int64_t> tokens,
                                                  const std::vector<std::string>& paths) {
  std::ranges::sort(tokens);
  std::vector<Width> widths;
  for (const std::int64_t n_token : tokens) {
    for (const cuda::LinearPath path : {cuda::LinearPath::kDot, cuda::LinearPath::kInt8}) {
      const Width width{n_token, path};
      const bool is_asked = std::ranges::find(paths, width.path_name()) != paths.end();
      if (is_asked && (path == cuda::LinearPath::kInt8 || n_token <= cuda::kMaxDecodeTokens)) widths.push_back(width);
    }
  }
  return widths;
}

/// One launch of a decode step: matrices that share their input.
struct Launch {
  std::string name;
  std::vector<TensorType> types;
  std::vector<std::int64_t> rows;
  std::int64_t cols = 0;
  End end = End::kPlain;
  bool begins_with_norm = false;  ///< in the model
  bool operator==(const Launch&) const = default;

  [[nodiscard]] std::int64_t bytes() const {
    std::int64_t sum = 0;
    for (std::size_t i = 0; i < rows.size(); ++i) sum += rows[i] * cuda::packed_row_bytes(types[i], cols);
    return sum;
  }
  [[nodiscard]] std::int64_t total_rows() const {
    std::int64_t sum = 0;
    for (const std::int64_t count : rows) sum += count;
    return sum;
  }
  [[nodiscard]] std::string type_text() const {
    std::string text;
    for (const TensorType type : types) text += (text.empty() ? "" : "+") + std::string(type_name(type));
    return text;
  }
};

/// The launches of one decode step, in order.
[[nodiscard]] inline std::vector<Launch> launches_of(const ModelConfig& config,
                                                     const std::vector<ModelTensor>& tensors) {
  std::map<std::string, const ModelTensor*> by_name;
  for (const ModelTensor& tensor : tensors) by_name[tensor.name] = &tensor;
  std::vector<Launch> launches;
  const auto add = [&](std::string name, const std::vector<std::string>& members, End end, bool begins_with_norm) {
    Launch launch{.name = std::move(name), .types = {}, .rows = {}, .end = end, .begins_with_norm = begins_with_norm};
    for (const std::string& member : members) {
      const auto found = by_name.find(member);
      if (found == by_name.end()) continue;
      launch.cols = found->second->row_len();
      launch.types.push_back(found->second->type);
      launch.rows.push_back(found->second->rows());
    }
    if (end == End::kGeluUp) launch.types = {launch.types[0]}, launch.rows = {launch.rows[0] + launch.rows[1]};
    launches.push_back(std::move(launch));
  };
  for (std::int64_t layer = 0; layer < config.n_layer(); ++layer) {
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    const std::string kind = config.sliding_layer(layer) ? "sliding" : "full";
    add("qkv_" + kind, {prefix + "attn_q.weight", prefix + "attn_k.weight", prefix + "attn_v.weight"}, End::kPlain,
        true);
    add("attn_output_" + kind, {prefix + "attn_output.weight"}, End::kPlain, false);
    add("gate_up", {prefix + "ffn_gate.weight", prefix + "ffn_up.weight"}, End::kGeluUp, true);
    add("down", {prefix + "ffn_down.weight"}, End::kPlain, false);
  }
  add("lm_head", {"token_embd.weight"}, End::kSoftcap, true);
  return launches;
}

}  // namespace gemma4::experiment
