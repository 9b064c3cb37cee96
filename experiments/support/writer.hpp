// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>

#include "experiments/driver.hpp"
#include "experiments/support/cuda_model.hpp"
#include "experiments/support/drafting.hpp"
#include "experiments/support/sequence.hpp"
#include "gemma4/draft/step.hpp"
#include "gemma4/plan/execution.hpp"

/// One sequence that is continued in several ways, by either room: what drivers that compare them need of a model.
namespace gemma4::experiment {

/// Steps of a writer on a device that are under way while the host looks at one: few, since what they give beyond a
/// window has to be taken back with it.
inline constexpr std::int64_t kWriterLag = 1;
/// Positions behind a window that they reach at most.
inline constexpr std::int64_t kBeyondWindow = (kWriterLag + 1) * (draft::kMaxDrafts + 1) + draft::kMaxDrafts;

/// A sequence on which one drafter after another writes.
class Writer {
 public:
  Writer() = default;
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;
  virtual ~Writer() = default;

  [[nodiscard]] virtual Sequence& sequence() = 0;
  /// From here on this drafter writes.
  virtual void use(const DraftSettings& drafting) = 0;
  /// From the next step on. A host has no switches.
  virtual void set_policy(const ExecutionPolicy& policy) = 0;
  /// Of all steps since use().
  [[nodiscard]] virtual draft::Counts counts() const = 0;
  /// That the drafter took since use(); on a device it is a part of the step.
  [[nodiscard]] virtual double propose_us() const = 0;
};

/// A model that makes them, in the room that --backend names. Compiled once for the drivers that do (writer.cpp).
class WriterSource {
 public:
  WriterSource() = default;
  WriterSource(const WriterSource&) = delete;
  WriterSource& operator=(const WriterSource&) = delete;
  virtual ~WriterSource() = default;

  [[nodiscard]] virtual std::int64_t vocab() const = 0;
  /// @param wish with max_draft > 0 where drafts are to be had
  [[nodiscard]] virtual std::unique_ptr<Writer> make(const CudaSettings& wish) const = 0;
};

/// @param drafter file of a drafter that a device holds beside the model; empty: none
/// @param first what will be asked for first: refused here, before anything is loaded, where it does not fit a device
[[nodiscard]] std::unique_ptr<WriterSource> load_writer_source(const DriverOptions& options, const CudaSettings& first,
                                                               const std::filesystem::path& drafter = {});

}  // namespace gemma4::experiment
