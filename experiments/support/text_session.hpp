// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>

#include "experiments/driver.hpp"
#include "experiments/support/checkpoint_option.hpp"
#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/session/model_fingerprint.hpp"
#include "gemma4/session/session_reader.hpp"

/// --session of drivers that measure along one text: caches that were filled with it, to be used or to be made.
namespace gemma4::experiment {

struct SessionOptions {
  std::filesystem::path session;
  CheckpointPolicy checkpoints = kUsualCheckpoints;

  /// Of the sequence: a run that keeps nothing copies no rings.
  [[nodiscard]] CheckpointPolicy kept() const { return session.empty() ? CheckpointPolicy{} : checkpoints; }
};

/// --session and --checkpoints, of a driver that measures at depths.
inline void add_session_at_depths(CLI::App& app, SessionOptions& options) {
  app.add_option("--session", options.session,
                 "File of a filled cache: where it is there, depths come from it and not from prefill; else it is made "
                 "at the deepest. For one --cache and one text");
  add_checkpoints(app, options.checkpoints,
                  "With --session: tokens between copies of the sliding layers' caches, from which it goes back to a "
                  "depth; 0: none");
}

/// @throws std::invalid_argument where there are several formats for one file
inline void require_one_cache(const SessionOptions& session, const DriverOptions& options) {
  require(session.session.empty() || options.caches.size() == 1, "--session: needs one --cache, there are ",
          options.caches.size());
}

class TextSession {
 public:
  /// @param path empty: there is none, and none is to be made
  /// @param ids of the text
  /// @throws std::invalid_argument where the file begins with another text; FormatError where it is no session
  TextSession(std::filesystem::path path, const std::filesystem::path& model, std::span<const std::int32_t> ids)
      : path_(std::move(path)) {
    if (path_.empty()) return;
    model_hash_ = model_fingerprint(GgufFile::open(model));
    if (!std::filesystem::exists(path_)) return;
    file_.emplace(SessionFile::open(path_));
    const std::span<const std::int32_t> tokens = file_->info().tokens;
    const std::size_t n_same = std::min(tokens.size(), ids.size());
    require(std::ranges::equal(tokens.first(n_same), ids.first(n_same)), path_.string(),
            ": it holds another text than --ids or --seed give here");
  }

  [[nodiscard]] bool has_file() const { return file_.has_value(); }
  [[nodiscard]] const SessionFile& file() const { return *file_; }
  [[nodiscard]] std::uint64_t model_hash() const { return model_hash_; }
  /// Tokens of the text that the file holds; 0 without one.
  [[nodiscard]] std::int64_t n_token() const {
    return file_ ? static_cast<std::int64_t>(file_->info().tokens.size()) : 0;
  }

  [[nodiscard]] std::uintmax_t file_bytes() const { return std::filesystem::file_size(path_); }

  /// Makes the file from `sequence`, a Sequence or a CudaSession, where one is asked for and there is none.
  template <class TSequence>
  void make(TSequence& sequence) const {
    if (!path_.empty() && !file_) sequence.save(path_, {.model_hash = model_hash_});
  }

 private:
  std::filesystem::path path_;
  std::uint64_t model_hash_ = 0;
  std::optional<SessionFile> file_;
};

}  // namespace gemma4::experiment
