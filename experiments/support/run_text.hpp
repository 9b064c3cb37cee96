// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include "experiments/driver.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/model_tensors.hpp"
#include "gemma4/gguf/text_model.hpp"
#include "gemma4/plan/execution.hpp"
#include "gemma4/report/result_table.hpp"
#include "gemma4/synthetic/synthetic_weights.hpp"
#include "gemma4/text/id_file.hpp"

/// What drivers run, in words and in tokens.
namespace gemma4::experiment {

/// "gemma4-synthetic (random weights), 60 layers, 18.69 GB": a table must not leave in doubt what was measured.
[[nodiscard]] inline std::string model_desc(const std::filesystem::path& path) {
  const GgufFile file = GgufFile::open(path);
  require_text_model(file);
  const auto name = file.get_or<std::string>("general.name", path.filename().string());
  char text[64];
  std::snprintf(text, sizeof(text), ", %lld layers, %.2f GB",
                static_cast<long long>(file.get<std::int64_t>("gemma4.block_count")),
                static_cast<double>(total_bytes(model_tensors(file))) / 1e9);
  return name + (name == "gemma4-synthetic" ? " (random weights)" : "") + text;
}

/// The first `count` ids of --ids; without such a file, ids drawn evenly from the vocabulary by --seed.
[[nodiscard]] inline std::vector<std::int32_t> text_ids(const DriverOptions& options, std::int64_t vocab,
                                                        std::int64_t count) {
  if (!options.ids.empty()) return read_ids(options.ids, vocab, count);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(count));
  RowRandom random(options.seed, "text", 0);
  for (std::int32_t& id : ids) {
    id = static_cast<std::int32_t>(random.next() % static_cast<std::uint64_t>(vocab));
  }
  return ids;
}

/// What the column text says of the ids.
[[nodiscard]] inline std::string text_name(const DriverOptions& options) {
  return options.ids.empty() ? "random ids" : options.ids.filename().string();
}

/// The columns model, model_desc and text of a row.
inline void set_run_text(ResultTable::Row& row, const DriverOptions& options, const std::string& desc) {
  row.set("model", options.model.filename().string()).set("model_desc", desc);
  row.set("text", text_name(options));
}

/// The columns off and plan: what is switched off, and the digest of how a decode step and the longest chunk run.
inline void set_run_plan(ResultTable::Row& row, const ExecutionPolicy& policy, const std::string& plan_digest) {
  row.set("off", off_text(policy)).set("plan", plan_digest);
}

}  // namespace gemma4::experiment
