// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <utility>

#include "cuda/backend/few_tokens_path.cuh"
#include "cuda/backend/path.cuh"
#include "cuda/backend/prefill_path.cuh"
#include "cuda/layer_cache.cuh"
#include "cuda/model_weights.cuh"
#include "cuda/quantized_linear.cuh"
#include "gemma4/error.hpp"
#include "gemma4/gguf/gguf.hpp"
#include "gemma4/plan/step_plan.hpp"
#include "gemma4/step_limits.hpp"

namespace gemma4::cuda {

[[nodiscard]] inline bool pass_is_short(const Pass& pass) {
  return pass.n_token() <= kDecodeChunk;
}

/// How a pass runs, for the eye.
[[nodiscard]] inline StepPlan describe_pass(const Pass& pass, const FewTokensPath& few_tokens,
                                            const PrefillPath& prefill, const LayerCaches& caches,
                                            const PackedModel& model) {
  const bool verifies = pass.row_positions != nullptr;
  StepPlan plan{.name = verifies ? "verify" : pass.n_token() == 1 ? "decode" : "prefill", .n_token = pass.n_token()};
  plan.rows = pass_is_short(pass) ? few_tokens.rows(pass) : prefill.rows(pass);
  for (StepPlanRow& row : caches.rows(pass.caches)) plan.rows.push_back(std::move(row));
  const LinearOptions products = few_tokens.products(pass);
  plan.rows.push_back(
      {.component = "lm_head",
       .path = concat("int8, ", type_name(model.output().type)),
       .tile = concat(products.tickets ? "dynamic rows" : "equal rows", products.overlap ? "" : ", no PDL")});
  return plan;
}

}  // namespace gemma4::cuda
