# SPDX-License-Identifier: Apache-2.0
# Written by .ci/list-headers and held against the folder by .ci/check-rooms.
set(GEMMA4_REFERENCE_HEADERS
    "${PROJECT_SOURCE_DIR}/reference/attention_tile.hpp"
    "${PROJECT_SOURCE_DIR}/reference/backend.hpp"
    "${PROJECT_SOURCE_DIR}/reference/bf16_attention.hpp"
    "${PROJECT_SOURCE_DIR}/reference/bf16_cache.hpp"
    "${PROJECT_SOURCE_DIR}/reference/decoder_layer.hpp"
    "${PROJECT_SOURCE_DIR}/reference/embedding.hpp"
    "${PROJECT_SOURCE_DIR}/reference/fused_mlp.hpp"
    "${PROJECT_SOURCE_DIR}/reference/layer_cache.hpp"
    "${PROJECT_SOURCE_DIR}/reference/lm_head.hpp"
    "${PROJECT_SOURCE_DIR}/reference/matrix.hpp"
    "${PROJECT_SOURCE_DIR}/reference/quantized_linear.hpp"
    "${PROJECT_SOURCE_DIR}/reference/ring_cache.hpp"
    "${PROJECT_SOURCE_DIR}/reference/rms_norm.hpp"
    "${PROJECT_SOURCE_DIR}/reference/rope.hpp"
    "${PROJECT_SOURCE_DIR}/reference/rotation.hpp"
    "${PROJECT_SOURCE_DIR}/reference/sampler.hpp"
    "${PROJECT_SOURCE_DIR}/reference/sliding_attention.hpp"
    "${PROJECT_SOURCE_DIR}/reference/softmax_state.hpp"
    "${PROJECT_SOURCE_DIR}/reference/tq4_attention.hpp"
    "${PROJECT_SOURCE_DIR}/reference/tq4_cache.hpp"
)
