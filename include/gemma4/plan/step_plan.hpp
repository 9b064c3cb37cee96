// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>
#include <cstdio>
#include <ostream>
#include <string>
#include <string_view>
#include <vector>

#include "gemma4/error.hpp"
#include "gemma4/fnv1a.hpp"

/// What one forward pass will do, decided before its first kernel: which path each component takes and why a faster one
/// did not fit. A backend acts by the same values that it prints here; nothing that a row could have refused is left to
/// a launch.
namespace gemma4 {

struct StepPlanRow {
  std::string component;     ///< project_qkv, qkv_prologue, attention_full, ...
  std::string path;          ///< the kernel that runs
  std::string tile = {};     ///< its compiled configuration; empty where it has none
  std::int64_t n_split = 1;  ///< blocks that share the keys of a KV head
  std::int64_t bytes = 0;    ///< of workspace
  std::string why = {};      ///< why a faster path did not fit, or what is off
  bool operator==(const StepPlanRow&) const = default;
};

struct StepPlan {
  std::string name;  ///< "decode", "verify" or "prefill"
  std::int64_t n_token = 0;
  std::vector<StepPlanRow> rows = {};
  bool operator==(const StepPlan&) const = default;

  /// @throws std::invalid_argument when there is no such component
  [[nodiscard]] const StepPlanRow& row(std::string_view component) const {
    for (const StepPlanRow& row : rows) {
      if (row.component == component) return row;
    }
    require(false, "step plan: no component '", component, "' in ", name);
    return rows.front();
  }
};

/// 64 bits over everything that the plans say, as 16 hexadecimal digits: equal plans have equal digests (FNV-1a).
[[nodiscard]] inline std::string digest(const std::vector<StepPlan>& plans) {
  std::uint64_t hash = fnv1a("");
  const auto add = [&](std::string_view text) { hash = fnv1a("\xFF", fnv1a(text, hash)); };  // no character of UTF-8
  for (const StepPlan& plan : plans) {
    add(concat(plan.name, ' ', plan.n_token));
    for (const StepPlanRow& row : plan.rows) {
      for (const std::string& text : {row.component, row.path, row.tile, row.why}) add(text);
      add(concat(row.n_split, ' ', row.bytes));
    }
  }
  char text[17];
  std::snprintf(text, sizeof(text), "%016llx", static_cast<unsigned long long>(hash));
  return text;
}

/// A table for the eye.
inline void print_step_plan(std::ostream& stream, const StepPlan& plan) {
  stream << plan.name << ", " << plan.n_token << (plan.n_token == 1 ? " token\n" : " tokens\n");
  for (const StepPlanRow& row : plan.rows) {
    char text[160];
    std::snprintf(text, sizeof(text), "  %-18s %-28s %-26s split %4lld %12lld B", row.component.c_str(),
                  row.path.c_str(), row.tile.c_str(), static_cast<long long>(row.n_split),
                  static_cast<long long>(row.bytes));
    stream << text << (row.why.empty() ? "" : "  ") << row.why << '\n';
  }
}

}  // namespace gemma4
