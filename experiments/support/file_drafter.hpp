// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>

#include "gemma4/config.hpp"
#include "gemma4/draft/drafter.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/model/assistant_weights.hpp"
#include "reference/assistant_drafter.hpp"
#include "reference/backend.hpp"

namespace gemma4::experiment {

/// A drafter that is a model, with the file that it is bound to.
class FileDrafter {
 public:
  /// @throws FormatError where the file is no drafter, or one for another target
  FileDrafter(const std::filesystem::path& path, const ModelConfig& target)
      : file_(GgufFile::open(path)),
        weights_(assistant_weights_from_gguf(file_, target)),
        drafter_(weights_),
        cost_(static_cast<double>(total_bytes(model_tensors(file_))) / bytes_of(target)) {}
  FileDrafter(const FileDrafter&) = delete;
  FileDrafter& operator=(const FileDrafter&) = delete;

  void propose(const reference::Backend<float>& target, const draft::Request& request, draft::Proposal& proposal) {
    drafter_.propose(target, request, proposal);
  }
  void keep(std::int64_t n_token) { drafter_.keep(n_token); }

  /// Of a token, in plain steps: the bytes that it reads over those of the target's weights.
  [[nodiscard]] double cost() const { return cost_; }

 private:
  /// Of the target's weights, as published files mix their types: 4.85 bits a parameter.
  [[nodiscard]] static double bytes_of(const ModelConfig& target) {
    double n_parameter = 0;
    for (const ModelTensor& tensor : model_tensors(target, TensorType::kF32)) {
      n_parameter += static_cast<double>(tensor.size());
    }
    return n_parameter * 4.85 / 8;
  }

  GgufFile file_;
  AssistantWeights weights_;
  reference::AssistantDrafter<float> drafter_;
  double cost_;
};

}  // namespace gemma4::experiment
