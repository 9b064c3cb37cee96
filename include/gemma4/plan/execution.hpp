// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "gemma4/error.hpp"

/// How a run on a device executes, one switch at a time: off is a slower way to the same result, so that a table can
/// say what each is worth. The table below is all that there is: drivers read their --off from it, the tests prove each
/// row.
namespace gemma4 {

struct ExecutionPolicy {
  bool kv_len_clamp = true;
  bool causal_skip = true;
  bool split_k = true;
  bool qkv_prologue_fusion = true;
  bool sliding_decode_fusion = true;
  bool dynamic_rows = true;
  bool launch_overlap = true;
  bool gate_up_fusion = true;
  bool graph = true;
  bool operator==(const ExecutionPolicy&) const = default;
};

/// One of them.
using PolicyField = bool ExecutionPolicy::*;

enum class Phase : std::uint8_t { kDecode = 1, kPrefill = 2 };

/// What must differ when a switch is off; a test looks, for each phase in which the switch acts.
enum class SwitchEvidence {
  kPlan,        ///< a row of the StepPlan
  kGraphNodes,  ///< the kernels of a captured decode step; in prefill, where nothing is captured, a row of the plan
  kTiles,       ///< key tiles that attention visits
  kReplays,     ///< whether a session holds a captured step
};

/// When it is decided.
enum class SwitchScope { kStep, kSession, kLoad };

struct ExecutionSwitch {
  PolicyField field;
  std::string_view name;  ///< of the field, in tables and behind --off
  std::string_view help;  ///< what off means
  std::uint8_t phases;    ///< in which it acts, of Phase
  SwitchEvidence evidence;
  SwitchScope scope = SwitchScope::kStep;

  [[nodiscard]] constexpr bool acts_in(Phase phase) const { return (phases & static_cast<std::uint8_t>(phase)) != 0; }
};

namespace detail {
inline constexpr std::uint8_t kDecodeOnly = static_cast<std::uint8_t>(Phase::kDecode);
inline constexpr std::uint8_t kPrefillOnly = static_cast<std::uint8_t>(Phase::kPrefill);
inline constexpr std::uint8_t kBothPhases = kDecodeOnly | kPrefillOnly;
}  // namespace detail

inline constexpr std::array kExecutionSwitches{
    ExecutionSwitch{&ExecutionPolicy::kv_len_clamp, "kv_len_clamp",
                    "a full layer of a decode step walks the whole cache, with a mask over what is not there yet",
                    detail::kDecodeOnly, SwitchEvidence::kPlan},
    ExecutionSwitch{&ExecutionPolicy::causal_skip, "causal_skip",
                    "a chunk visits the key tiles that none of its queries sees", detail::kPrefillOnly,
                    SwitchEvidence::kTiles},
    ExecutionSwitch{&ExecutionPolicy::split_k, "split_k", "one block a KV head walks all keys of a decode step",
                    detail::kDecodeOnly, SwitchEvidence::kPlan},
    ExecutionSwitch{&ExecutionPolicy::qkv_prologue_fusion, "qkv_prologue_fusion",
                    "norms, RoPE and the cache's update are a launch each, in sliding layers too", detail::kBothPhases,
                    SwitchEvidence::kGraphNodes},
    ExecutionSwitch{&ExecutionPolicy::sliding_decode_fusion, "sliding_decode_fusion",
                    "a sliding layer of a decode step prepares q, k and v, attends, and merges in a launch each",
                    detail::kDecodeOnly, SwitchEvidence::kGraphNodes},
    ExecutionSwitch{&ExecutionPolicy::dynamic_rows, "dynamic_rows",
                    "each block of a decode product has an equal share of the rows, and no more", detail::kDecodeOnly,
                    SwitchEvidence::kPlan},
    ExecutionSwitch{&ExecutionPolicy::launch_overlap, "launch_overlap",
                    "a decode kernel begins when the one before it has ended (no programmatic dependent launch)",
                    detail::kDecodeOnly, SwitchEvidence::kPlan},
    ExecutionSwitch{&ExecutionPolicy::gate_up_fusion, "gate_up_fusion", "gate and up are multiplied one by one",
                    detail::kBothPhases, SwitchEvidence::kPlan, SwitchScope::kLoad},
    ExecutionSwitch{&ExecutionPolicy::graph, "graph", "decode steps are launched kernel by kernel", detail::kDecodeOnly,
                    SwitchEvidence::kReplays, SwitchScope::kSession},
};

/// @throws std::invalid_argument naming the switches that there are
[[nodiscard]] inline const ExecutionSwitch& execution_switch(std::string_view name) {
  std::string names;
  for (const ExecutionSwitch& entry : kExecutionSwitches) {
    if (entry.name == name) return entry;
    names += concat(names.empty() ? "" : ", ", entry.name);
  }
  require(false, "switch '", name, "': there is none of that name; there are ", names);
  return kExecutionSwitches.front();
}

/// Everything on but these. @throws std::invalid_argument for a name that is none
template <class TNames>
[[nodiscard]] ExecutionPolicy policy_without(const TNames& names) {
  ExecutionPolicy policy;
  for (const auto& name : names) policy.*execution_switch(name).field = false;
  return policy;
}

/// The names of what is off, joined by '+'; empty with everything on.
[[nodiscard]] inline std::string off_text(const ExecutionPolicy& policy) {
  std::string text;
  for (const ExecutionSwitch& entry : kExecutionSwitches) {
    if (!(policy.*entry.field)) text += concat(text.empty() ? "" : "+", entry.name);
  }
  return text;
}

}  // namespace gemma4
