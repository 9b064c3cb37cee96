// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "gemma4/config.hpp"
#include "gemma4/error.hpp"
#include "gemma4/model/model.hpp"

namespace gemma4::testkit {

/// A backend without a network: the logits behind a token are a row of a table, chosen by that token and the one before
/// it as the backend remembers them. What is known of it exactly is the distribution of every text.
class TableBackend {
 public:
  /// @param spread standard deviation of the logits
  TableBackend(std::int64_t vocab, std::int64_t context, double spread, std::uint32_t seed)
      : memory_(static_cast<std::size_t>(context)), table_(static_cast<std::size_t>(vocab * vocab * vocab)) {
    config_.vocab = vocab;
    config_.is_sliding = {0};
    std::mt19937 random(seed);
    std::normal_distribution<float> normal(0, static_cast<float>(spread));
    for (float& logit : table_) logit = normal(random);
  }

  [[nodiscard]] const ModelConfig& config() const { return config_; }
  [[nodiscard]] std::int64_t context() const { return static_cast<std::int64_t>(memory_.size()); }
  [[nodiscard]] std::int64_t max_chunk() const { return 16; }
  void embed(std::span<const std::int32_t> tokens, std::int64_t position) {
    position_ = position;
    std::copy(tokens.begin(), tokens.end(), memory_.begin() + position);
  }
  void project_qkv(std::int64_t /*layer*/) {}
  void attend(std::int64_t /*layer*/) {}
  void project_output(std::int64_t /*layer*/) {}
  void gate_up(std::int64_t /*layer*/) {}
  void down(std::int64_t /*layer*/) {}
  void lm_head(std::span<const std::int64_t> rows) { rows_.assign(rows.begin(), rows.end()); }
  void copy_logits(std::int64_t row, std::span<float> out) const {
    const std::span<const float> logits = logits_at(position_ + rows_[static_cast<std::size_t>(row)]);
    std::copy(logits.begin(), logits.end(), out.begin());
  }
  void reset() { std::fill(memory_.begin(), memory_.end(), 0); }
  [[nodiscard]] int range(const char* /*name*/) const { return 0; }

  /// [vocab] behind `token`, which stands behind `before`.
  [[nodiscard]] std::span<const float> logits(std::int32_t before, std::int32_t token) const {
    const auto n = static_cast<std::size_t>(config_.vocab);
    return std::span(table_).subspan((static_cast<std::size_t>(before) * n + static_cast<std::size_t>(token)) * n, n);
  }
  [[nodiscard]] std::span<const float> logits_at(std::int64_t position) const {
    const auto at = static_cast<std::size_t>(position);
    return logits(at > 0 ? memory_[at - 1] : 0, memory_[at]);
  }

 private:
  ModelConfig config_ = gemma4_tiny();
  std::vector<std::int32_t> memory_;
  std::vector<float> table_;
  std::vector<std::int64_t> rows_;
  std::int64_t position_ = 0;
};
static_assert(Backend<TableBackend>);

}  // namespace gemma4::testkit
