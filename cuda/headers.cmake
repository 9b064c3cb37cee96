# SPDX-License-Identifier: Apache-2.0
# Written by .ci/list-headers and held against the folder by .ci/check-rooms.
set(GEMMA4_CUDA_HEADERS
    "${PROJECT_SOURCE_DIR}/cuda/bf16_attention.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/check.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/device_buffer.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/device_info.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/flash_launch.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/flash_mma.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/flash_params.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/flash_wgmma.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/flash_wgmma_256.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/flash_wgmma_512.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/mma.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/nvtx.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/rotation.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/sliding_attention.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/stream.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/tensor_copy.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/tq4_layout.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/wgmma.cuh"
)
