// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <iomanip>
#include <memory>
#include <optional>
#include <ostream>
#include <string>
#include <string_view>

#include "experiments/support/file_drafter.hpp"
#include "gemma4/config.hpp"
#include "gemma4/draft/auto_drafts.hpp"
#include "gemma4/draft/lookup.hpp"
#include "gemma4/draft/step.hpp"
#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf_reader.hpp"
#include "gemma4/gguf/text_model.hpp"

/// Drafting as the command line asks for it.
namespace gemma4::experiment {

/// --drafter and --draft.
struct DraftSettings {
  std::string drafter = "none";              ///< none | lookup | a model file
  std::optional<std::int64_t> n_draft = {};  ///< drafts of a step; none: AutoDrafts decides
  [[nodiscard]] bool is_on() const { return drafter != "none"; }
  [[nodiscard]] bool is_file() const { return is_on() && drafter != "lookup"; }
  /// Empty where it is none.
  [[nodiscard]] std::filesystem::path file() const {
    return is_file() ? std::filesystem::path(drafter) : std::filesystem::path();
  }
};

/// `auto`, or a number of drafts. @throws std::invalid_argument naming what was not understood
[[nodiscard]] inline std::optional<std::int64_t> parse_n_draft(std::string_view text) {
  if (text == "auto") return std::nullopt;
  std::int64_t n_draft = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n_draft);
  require(error == std::errc() && end == text.data() + text.size() && n_draft >= 1 && n_draft <= draft::kMaxDrafts,
          "--draft ", text, ": expected auto or a whole number from 1 to ", draft::kMaxDrafts);
  return n_draft;
}

/// What can be refused before a model is loaded. @throws FormatError for a file that is no drafter,
/// std::invalid_argument for one that is not there
inline void require_drafter(const DraftSettings& settings) {
  if (!settings.is_file()) return;
  require(std::filesystem::exists(settings.drafter), "--drafter ", settings.drafter,
          ": expected lookup, none or the GGUF file of a drafter");
  require_assistant(GgufFile::open(settings.drafter));
}

/// The drafter for a target of this shape. @throws FormatError where the file is no drafter, or one for another target
template <class TTarget>
[[nodiscard]] std::unique_ptr<draft::AnyDrafter<TTarget>> make_drafter(const DraftSettings& settings,
                                                                       const ModelConfig& target) {
  if (settings.drafter == "none") return std::make_unique<draft::Erased<TTarget, draft::NoDrafter>>();
  if (settings.drafter == "lookup") return std::make_unique<draft::Erased<TTarget, draft::LookupDrafter>>();
  require_drafter(settings);
  return std::make_unique<draft::Erased<TTarget, FileDrafter>>(settings.drafter, target);
}

/// Drafts of each step: fixed, or by the rule of AutoDrafts.
class DraftCount {
 public:
  /// @param cost of a proposed token, in plain steps
  DraftCount(const DraftSettings& settings, double cost)
      : fixed_(settings.is_on() ? settings.n_draft : std::optional<std::int64_t>(0)), rule_({.draft = cost}) {}
  [[nodiscard]] std::int64_t next() const { return fixed_ ? *fixed_ : rule_.next(); }
  void saw(const draft::Step& step) {
    if (!fixed_) rule_.saw(step.n_draft, step.n_accepted());
  }

 private:
  std::optional<std::int64_t> fixed_;
  draft::AutoDrafts rule_;
};

/// A drafter at work: who proposes, how many, and what came of it.
template <class TTarget>
struct Drafting {
  Drafting(const DraftSettings& settings, const ModelConfig& target)
      : drafter(make_drafter<TTarget>(settings, target)), n_draft(settings, drafter->cost()) {}

  std::unique_ptr<draft::AnyDrafter<TTarget>> drafter;
  DraftCount n_draft;
  draft::Counts counts;
  double propose_us = 0;  ///< time that the drafter took, over all steps
};

/// `drafts: 2.41 tokens a step, 310 steps; accepted 71.0 52.3 40.1 % at places 1 to 3`
inline void print_drafts(std::ostream& stream, const draft::Counts& counts) {
  const auto flags = stream.flags();
  const auto precision = stream.precision();
  stream << std::fixed << "drafts: " << std::setprecision(2) << counts.tokens_per_step() << " tokens a step, "
         << counts.n_step << " steps";
  std::size_t n_place = 0;
  for (; n_place < counts.drafted.size() && counts.drafted[n_place] > 0; ++n_place) {
    stream << (n_place == 0 ? "; accepted " : " ") << std::setprecision(1)
           << 100.0 * static_cast<double>(counts.accepted[n_place]) / static_cast<double>(counts.drafted[n_place]);
  }
  if (n_place > 0) stream << " % of those at " << (n_place == 1 ? "place 1" : concat("places 1 to ", n_place));
  stream << '\n';
  stream.flags(flags);
  stream.precision(precision);
}

}  // namespace gemma4::experiment
