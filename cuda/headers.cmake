# SPDX-License-Identifier: Apache-2.0
# Written by .ci/list-headers and held against the folder by .ci/check-rooms.
set(GEMMA4_CUDA_HEADERS
    "${PROJECT_SOURCE_DIR}/cuda/flash_mma.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/flash_params.cuh"
    "${PROJECT_SOURCE_DIR}/cuda/mma.cuh"
)
