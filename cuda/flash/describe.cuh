// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <string>
#include <utility>

#include "cuda/flash/launch.cuh"
#include "gemma4/plan/step_plan.hpp"

namespace gemma4::cuda {

/// What a plan of the flash engine says, as a row of a step plan.
[[nodiscard]] inline StepPlanRow describe_flash(std::string component, const FlashPlan& plan) {
  StepPlanRow row{.component = std::move(component),
                  .path = concat("flash ", to_string(plan.path)),
                  .n_split = plan.n_split,
                  .bytes = plan.workspace_bytes};
  if (plan.path == FlashPath::kWgmma) {
    row.tile = concat("d", plan.shape.head_dim, " wgmma");
    return row;
  }
  const FlashTile& tile = plan.tile;
  row.tile = concat("d", tile.head_dim, " m", tile.warps_m, " k", tile.warps_k, " d", tile.warps_d, " kv", tile.tile_kv,
                    " s", tile.n_stage, plan.overlap ? "" : ", no PDL");
  if (plan.path == FlashPath::kPrefill && plan.misfit != nullptr) row.why = concat("no wgmma: ", plan.misfit);
  return row;
}

}  // namespace gemma4::cuda
