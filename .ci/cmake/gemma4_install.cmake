# SPDX-License-Identifier: Apache-2.0
# The package: headers under <prefix>/include/gemma4-128k (so that "gemma4/x.hpp", "reference/x.hpp" and "cuda/x.cuh"
# resolve and no other package's files do), targets and gemma4Config.cmake.
include(CMakePackageConfigHelpers)
set(gemma4_include_dir "${CMAKE_INSTALL_INCLUDEDIR}/gemma4-128k")
set(gemma4_cmake_dir "${CMAKE_INSTALL_LIBDIR}/cmake/gemma4")

foreach(room core reference cuda)
  set_target_properties(gemma4_${room} PROPERTIES EXPORT_NAME ${room})
  install(TARGETS gemma4_${room} EXPORT gemma4_${room} FILE_SET HEADERS DESTINATION "${gemma4_include_dir}")
  install(EXPORT gemma4_${room} FILE gemma4-${room}.cmake NAMESPACE gemma4:: DESTINATION "${gemma4_cmake_dir}")
endforeach()
configure_package_config_file("${PROJECT_SOURCE_DIR}/.ci/cmake/gemma4Config.cmake.in"
                              "${PROJECT_BINARY_DIR}/gemma4Config.cmake" INSTALL_DESTINATION "${gemma4_cmake_dir}")
write_basic_package_version_file("${PROJECT_BINARY_DIR}/gemma4ConfigVersion.cmake" COMPATIBILITY SameMinorVersion
                                 ARCH_INDEPENDENT)
install(FILES "${PROJECT_BINARY_DIR}/gemma4Config.cmake" "${PROJECT_BINARY_DIR}/gemma4ConfigVersion.cmake"
        DESTINATION "${gemma4_cmake_dir}")
