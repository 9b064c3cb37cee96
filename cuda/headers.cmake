# SPDX-License-Identifier: Apache-2.0
# Written by .ci/list-headers and held against the folder by .ci/check-rooms.
set(GEMMA4_CUDA_HEADERS
)
