# SPDX-License-Identifier: Apache-2.0
# Eigen, OpenMP, and for tests and drivers GoogleTest, rapidcheck and CLI11: what is installed first, otherwise sources
# pinned by commit (a git commit id is the hash of what it names). `make` installs the packages where it may.
include(FetchContent)
set(FETCHCONTENT_QUIET OFF)

# gemma4_fetch(<name> <repository> <commit> <commit in words> [HEADERS_ONLY]): says what it does, fetches, and adds the
# project with neither its warnings nor its install rules.
macro(gemma4_fetch name repository commit words)
  message(STATUS "gemma4: ${name} is not installed; fetching ${words} from ${repository}")
  # With a SOURCE_SUBDIR that does not exist MakeAvailable only fetches; its own add_subdirectory() knows no
  # EXCLUDE_FROM_ALL before CMake 3.28.
  FetchContent_Declare(${name} GIT_REPOSITORY ${repository} GIT_TAG ${commit} GIT_SUBMODULES "" SOURCE_SUBDIR .none)
  FetchContent_MakeAvailable(${name})
  if(NOT "${ARGN}" STREQUAL "HEADERS_ONLY")
    add_subdirectory("${${name}_SOURCE_DIR}" "${${name}_BINARY_DIR}" EXCLUDE_FROM_ALL SYSTEM)
  endif()
endmacro()

find_package(OpenMP QUIET COMPONENTS CXX)
if(NOT OpenMP_CXX_FOUND)
  message(STATUS "gemma4: no OpenMP, so the reference runs on one core")
endif()

find_package(Eigen3 3.4 QUIET NO_MODULE)
if(NOT TARGET Eigen3::Eigen)
  gemma4_fetch(eigen https://gitlab.com/libeigen/eigen.git 3147391d946bb4b6c68edd901f2add6ac1f31f8c 3.4.0 HEADERS_ONLY)
  add_library(Eigen3::Eigen INTERFACE IMPORTED GLOBAL)
  target_include_directories(Eigen3::Eigen SYSTEM INTERFACE "${eigen_SOURCE_DIR}")
endif()

if(GEMMA4_EXPERIMENTS)
  find_package(CLI11 2.1 QUIET CONFIG)
  if(NOT TARGET CLI11::CLI11)
    gemma4_fetch(cli11 https://github.com/CLIUtils/CLI11.git 4160d259d961cd393fd8d67590a8c7d210207348 v2.5.0)
  endif()
endif()

if(GEMMA4_TESTS)
  find_package(Threads REQUIRED)
  find_package(GTest 1.11 QUIET)
  if(NOT TARGET GTest::gtest)
    set(INSTALL_GTEST OFF)
    gemma4_fetch(googletest https://github.com/google/googletest.git f8d7d77c06936315286eb55f8de22cd23c188571 v1.14.0)
  endif()
  find_package(rapidcheck QUIET CONFIG)
  if(NOT TARGET rapidcheck)
    gemma4_fetch(rapidcheck https://github.com/emil-e/rapidcheck.git ff6af6fc683159deb51c543b065eba14dfcf329b
                 "master of 2023-12-14")
  endif()
  add_library(gemma4_rapidcheck INTERFACE)
  target_link_libraries(gemma4_rapidcheck INTERFACE rapidcheck)
  if(rapidcheck_SOURCE_DIR) # fetched: rapidcheck/gtest.h lies beside the library, not in it
    target_include_directories(gemma4_rapidcheck SYSTEM INTERFACE "${rapidcheck_SOURCE_DIR}/extras/gtest/include")
  endif()
endif()
