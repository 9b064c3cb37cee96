// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cuda/kv_attention/decode_launch.cuh"

/// Attention of several rows at once over one vector for K and V, each with the bits of a call of its own.
namespace gemma4::cuda {

/// How rows go through attention at once, or why they do not.
struct KvRowsPlan {
  const char* misfit = "no kernel takes several rows with the bits of one yet";  ///< null: they go at once
};

}  // namespace gemma4::cuda
