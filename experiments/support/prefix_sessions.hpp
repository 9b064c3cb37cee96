// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

#include "experiments/support/any_backend.hpp"
#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/model/accuracy.hpp"
#include "gemma4/model/accuracy_case.hpp"
#include "gemma4/model/model.hpp"
#include "gemma4/session/model_fingerprint.hpp"
#include "gemma4/session/sequence_store.hpp"

/// --session of a driver that compares caches: what each held of the text's beginning, one file a case.
namespace gemma4::experiment {

class PrefixSessions {
 public:
  /// @param path empty: none are asked for
  PrefixSessions(const std::filesystem::path& path, const std::filesystem::path& model) : path_(path) {
    if (is_asked()) model_hash_ = model_fingerprint(GgufFile::open(model));
  }

  [[nodiscard]] bool is_asked() const { return !path_.empty(); }
  [[nodiscard]] std::filesystem::path file_of(const AccuracyCase& one) const {
    return path_.string() + "." + one.canonical_name();
  }

  /// Brings a model, which is empty, to the end of `prefix`, with logits of its last token: as far as the file of the
  /// case reaches from there, and by reading the rest in chunks. Where there is no file it is made.
  /// @throws std::invalid_argument for a file of another text, or a longer one, or as SequenceStore::restore()
  void bring(Model<AnyBackend>& model, const AccuracyCase& one, std::span<const std::int32_t> prefix,
             std::int64_t chunk) const {
    const auto n_prefix = static_cast<std::int64_t>(prefix.size());
    const std::filesystem::path path = file_of(one);
    SequenceStore<AnyBackend> store(model, {});
    const bool is_there = std::filesystem::exists(path);
    if (is_there) {
      const SessionFile file = SessionFile::open(path);
      require_begins(file, prefix);
      require(store.restore(file, model_hash_).logits.size() > 0 || model.position() < n_prefix, path.string(),
              ": it ends where this run begins, and has no logits");
    }
    read_to(model, prefix, n_prefix, chunk, [](std::int64_t) {});
    model.require_finite(prefix);
    if (is_there) return;
    std::vector<float> logits(static_cast<std::size_t>(model.backend().config().vocab));
    model.backend().copy_logits(0, logits);
    store.save(path, {.model_hash = model_hash_, .tokens = {prefix.begin(), prefix.end()}, .logits = logits});
  }

 private:
  static void require_begins(const SessionFile& file, std::span<const std::int32_t> prefix) {
    const std::span<const std::int32_t> tokens = file.info().tokens;
    require(tokens.size() <= prefix.size(), file.name(), ": it holds ", tokens.size(),
            " tokens, and this run looks at positions from ", prefix.size(),
            " on: a prefix cannot be longer than that; another --session, --depths or --window");
    require(std::ranges::equal(tokens, prefix.first(tokens.size())), file.name(),
            ": it holds another text than --ids or --seed give here");
  }

  std::filesystem::path path_;
  std::uint64_t model_hash_ = 0;
};

}  // namespace gemma4::experiment
