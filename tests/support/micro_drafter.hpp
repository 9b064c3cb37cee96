// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "gemma4/assistant_config.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/synthetic/synthetic_assistant.hpp"
#include "tests/support/gguf_edit.hpp"
#include "tests/support/temp_dir.hpp"

/// Small random drafters.
namespace gemma4::testkit {

/// A drafter for `target`: two layers of each kind that it has, 64 wide.
[[nodiscard]] inline AssistantConfig micro_drafter_config(const ModelConfig& target = micro_config()) {
  AssistantConfig config{.own = target, .hidden_target = target.hidden};
  config.own.hidden = 64;
  config.own.ffn_hidden = 96;
  config.own.is_sliding.clear();
  if (target.n_full_layer() < target.n_layer()) config.own.is_sliding = {1, 1};
  if (target.n_full_layer() > 0) config.own.is_sliding.insert(config.own.is_sliding.end(), {0, 0});
  return config;
}

/// Its file, with something changed.
struct MicroDrafter {
  using Change = std::function<void(GgufEdit&)>;

  explicit MicroDrafter(const Change& change, const AssistantConfig& config = micro_drafter_config(),
                        const SyntheticOptions& options = {}) {
    write_synthetic_assistant(folder.file("drafter.gguf"), config, options);
    GgufEdit edit(GgufFile::open(folder.file("drafter.gguf")));
    change(edit);
    edit.write(folder.file("drafter.gguf"));
    file.emplace(GgufFile::open(folder.file("drafter.gguf")));
  }
  explicit MicroDrafter(const AssistantConfig& config = micro_drafter_config(), const SyntheticOptions& options = {})
      : MicroDrafter([](GgufEdit&) {}, config, options) {}

  TempDir folder;
  std::optional<GgufFile> file;
};

}  // namespace gemma4::testkit
