# SPDX-License-Identifier: Apache-2.0
# One INTERFACE library per room, linked by role. The header lists are files that .ci/check-rooms holds against the
# folders; .ci/list-headers writes them.
include("${PROJECT_SOURCE_DIR}/include/headers.cmake") # GEMMA4_CORE_HEADERS
include("${PROJECT_SOURCE_DIR}/reference/headers.cmake") # GEMMA4_REFERENCE_HEADERS
include("${PROJECT_SOURCE_DIR}/cuda/headers.cmake") # GEMMA4_CUDA_HEADERS

# include/ alone: the standard library and nothing else.
add_library(gemma4_core INTERFACE)
add_library(gemma4::core ALIAS gemma4_core)
target_compile_features(gemma4_core INTERFACE cxx_std_20)
# CMake 3.25 knows no C++20 flag for nvcc and drops CUDA_STANDARD 20 without a word.
target_compile_options(gemma4_core INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
target_sources(gemma4_core INTERFACE FILE_SET HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}/include"
                                     FILES ${GEMMA4_CORE_HEADERS})

# reference/: core and Eigen; OpenMP where there is any.
add_library(gemma4_reference INTERFACE)
add_library(gemma4::reference ALIAS gemma4_reference)
target_link_libraries(gemma4_reference INTERFACE gemma4_core Eigen3::Eigen)
# Eigen's own CUDA support is of no use here and costs dozens of nvcc warnings. The threads are in the loops over tiles
# around Eigen's products: a product that split itself would sum in an order that depends on the number of threads.
target_compile_definitions(gemma4_reference INTERFACE EIGEN_DONT_PARALLELIZE $<$<COMPILE_LANGUAGE:CUDA>:EIGEN_NO_CUDA>)
if(OpenMP_CXX_FOUND)
  target_link_libraries(gemma4_reference INTERFACE OpenMP::OpenMP_CXX)
  target_compile_options(gemma4_reference INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=-fopenmp>)
endif()
target_sources(gemma4_reference INTERFACE FILE_SET HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}"
                                          FILES ${GEMMA4_REFERENCE_HEADERS})

# cuda/: core and the CUDA toolkit (NVTX is headers in it).
add_library(gemma4_cuda INTERFACE)
add_library(gemma4::cuda ALIAS gemma4_cuda)
target_link_libraries(gemma4_cuda INTERFACE gemma4_core)
if(GEMMA4_HAS_CUDA)
  target_link_libraries(gemma4_cuda INTERFACE CUDA::cudart CUDA::cublasLt)
endif()
target_sources(gemma4_cuda INTERFACE FILE_SET HEADERS BASE_DIRS "${PROJECT_SOURCE_DIR}" FILES ${GEMMA4_CUDA_HEADERS})
