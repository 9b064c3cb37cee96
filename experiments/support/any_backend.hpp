// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "gemma4/cache_formats.hpp"
#include "gemma4/config.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/plan/cache_bytes.hpp"
#include "gemma4/plan/step_plan.hpp"
#include "gemma4/report/nvtx.hpp"
#include "gemma4/ring_format.hpp"
#include "gemma4/session/stored_part.hpp"
#include "gemma4/step_limits.hpp"

namespace gemma4::experiment {

/// A backend of either room behind one type: a driver is compiled once, and takes both.
class AnyBackend {
 public:
  AnyBackend() = default;
  AnyBackend(const AnyBackend&) = delete;
  AnyBackend& operator=(const AnyBackend&) = delete;
  virtual ~AnyBackend() = default;

  [[nodiscard]] virtual const ModelConfig& config() const = 0;
  [[nodiscard]] virtual std::int64_t context() const = 0;
  [[nodiscard]] virtual std::int64_t max_chunk() const = 0;
  virtual void embed(std::span<const std::int32_t> tokens, std::int64_t position) = 0;
  virtual void project_qkv(std::int64_t layer) = 0;
  virtual void attend(std::int64_t layer) = 0;
  virtual void project_output(std::int64_t layer) = 0;
  virtual void gate_up(std::int64_t layer) = 0;
  virtual void down(std::int64_t layer) = 0;
  virtual void lm_head(std::span<const std::int64_t> rows) = 0;
  virtual void copy_logits(std::int64_t row, std::span<float> out) const = 0;
  virtual void copy_logit_rows(std::span<float> out) const = 0;
  virtual void copy_residual(std::span<float> out) = 0;
  virtual void watch(std::span<const std::int64_t> logit_rows) = 0;
  [[nodiscard]] virtual std::optional<NotFinite> first_not_finite() const = 0;
  /// As allocated.
  [[nodiscard]] virtual CacheBytes cache_bytes() = 0;
  virtual void reset() = 0;
  // StoringBackend's
  [[nodiscard]] virtual const CacheSpec& cache() const = 0;
  [[nodiscard]] virtual RingSpec ring() const = 0;
  [[nodiscard]] virtual std::vector<StoredLayer> stored_layers() = 0;
  virtual void copy_stored(const std::byte* from, std::span<std::byte> to) = 0;
  virtual void set_stored(std::byte* to, std::span<const std::byte> from) = 0;
  virtual void set_position(std::int64_t position, std::int64_t farthest) = 0;
  virtual void set_logits(std::span<const float> logits) = 0;
  [[nodiscard]] virtual std::int64_t max_rewind() const = 0;
  /// How a decode step and the longest chunk run.
  [[nodiscard]] virtual std::vector<StepPlan> step_plans() const = 0;
  /// The drivers that profile do not come through here.
  [[nodiscard]] NvtxRange range(const char* name) const { return NvtxRange(name); }
};
static_assert(WatchedBackend<AnyBackend> && StoringBackend<AnyBackend>);

/// Holds a `TBackend` made in place from `arguments`.
template <class TBackend>
class HeldBackend final : public AnyBackend {
 public:
  template <class... TArguments>
  explicit HeldBackend(TArguments&&... arguments) : backend_(std::forward<TArguments>(arguments)...) {}

  [[nodiscard]] const ModelConfig& config() const override { return backend_.config(); }
  [[nodiscard]] std::int64_t context() const override { return backend_.context(); }
  [[nodiscard]] std::int64_t max_chunk() const override { return backend_.max_chunk(); }
  void embed(std::span<const std::int32_t> tokens, std::int64_t position) override { backend_.embed(tokens, position); }
  void project_qkv(std::int64_t layer) override { backend_.project_qkv(layer); }
  void attend(std::int64_t layer) override { backend_.attend(layer); }
  void project_output(std::int64_t layer) override { backend_.project_output(layer); }
  void gate_up(std::int64_t layer) override { backend_.gate_up(layer); }
  void down(std::int64_t layer) override { backend_.down(layer); }
  void lm_head(std::span<const std::int64_t> rows) override { backend_.lm_head(rows); }
  void copy_logits(std::int64_t row, std::span<float> out) const override { backend_.copy_logits(row, out); }
  void copy_logit_rows(std::span<float> out) const override {
    if constexpr (requires { backend_.copy_logit_rows(out); }) {
      backend_.copy_logit_rows(out);
    } else {
      const auto vocab = static_cast<std::size_t>(backend_.config().vocab);
      for (std::size_t r = 0; r * vocab < out.size(); ++r) {
        backend_.copy_logits(static_cast<std::int64_t>(r), out.subspan(r * vocab, vocab));
      }
    }
  }
  void copy_residual(std::span<float> out) override { backend_.copy_residual(out); }
  void watch(std::span<const std::int64_t> logit_rows) override { backend_.watch(logit_rows); }
  [[nodiscard]] std::optional<NotFinite> first_not_finite() const override { return backend_.first_not_finite(); }
  [[nodiscard]] CacheBytes cache_bytes() override { return backend_.cache_bytes(); }
  void reset() override { backend_.reset(); }
  [[nodiscard]] const CacheSpec& cache() const override { return backend_.cache(); }
  [[nodiscard]] RingSpec ring() const override { return backend_.ring(); }
  [[nodiscard]] std::vector<StoredLayer> stored_layers() override { return backend_.stored_layers(); }
  void copy_stored(const std::byte* from, std::span<std::byte> to) override { backend_.copy_stored(from, to); }
  void set_stored(std::byte* to, std::span<const std::byte> from) override { backend_.set_stored(to, from); }
  void set_position(std::int64_t position, std::int64_t farthest) override {
    backend_.set_position(position, farthest);
  }
  void set_logits(std::span<const float> logits) override { backend_.set_logits(logits); }
  [[nodiscard]] std::int64_t max_rewind() const override {
    if constexpr (requires { backend_.max_rewind(); }) return backend_.max_rewind();
    return kMaxRewind;
  }
  [[nodiscard]] std::vector<StepPlan> step_plans() const override { return backend_.step_plans(); }

 private:
  TBackend backend_;
};

}  // namespace gemma4::experiment
