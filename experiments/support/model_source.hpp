// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "experiments/driver.hpp"
#include "experiments/support/any_backend.hpp"
#include "experiments/support/backend_info.hpp"
#include "experiments/support/cuda_model.hpp"
#include "experiments/support/notes.hpp"
#include "gemma4/cache_formats.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/model/weights.hpp"
#include "reference/backend.hpp"

namespace gemma4::experiment {

/// What a backend is asked to hold.
struct BackendWish {
  CacheSpec cache;
  std::int64_t context = 0;
  std::int64_t max_chunk = 512;
  std::int64_t n_logit_row = 1;
  ExecutionPolicy policy = {};  ///< of a device
  RingSpec ring = {};           ///< of the sliding layers
};

/// A model that makes backends of the room that --backend names. Outlives them.
class ModelSource {
 public:
  /// @param first what will be asked for first: refused here, before anything is loaded, where it does not fit a device
  ModelSource(const DriverOptions& options, const BackendWish& first) {
    if (options.backend == "cuda") {
      device_ = load_cuda_model(options.model, {.progress = progress_options(options, "B")}, settings(first));
    } else {
      file_.emplace(GgufFile::open(options.model));
      weights_.emplace(weights_from_gguf(*file_));
      show_notes(model_notes(*file_));
    }
  }

  [[nodiscard]] const ModelConfig& config() const { return device_ ? device_->config() : weights_->config; }

  [[nodiscard]] std::unique_ptr<AnyBackend> make(const BackendWish& wish) const {
    if (device_) return device_->make_backend(settings(wish));
    return std::make_unique<HeldBackend<reference::Backend<float>>>(
        *weights_, reference::BackendOptions{
                       .cache = wish.cache, .context = wish.context, .max_chunk = wish.max_chunk, .ring = wish.ring});
  }

 private:
  [[nodiscard]] static CudaSettings settings(const BackendWish& wish) {
    return {.cache = wish.cache,
            .context = wish.context,
            .max_chunk = wish.max_chunk,
            .n_logit_row = wish.n_logit_row,
            .policy = wish.policy,
            .ring = wish.ring};
  }

  std::optional<GgufFile> file_;
  std::optional<ModelWeights> weights_;
  std::unique_ptr<CudaModel> device_;
};

}  // namespace gemma4::experiment
