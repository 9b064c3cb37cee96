# SPDX-License-Identifier: Apache-2.0
# cmake -DSOURCE_DIR= -DOUTPUT= -DBUILD= -DFLAGS= -P: writes the definition of gemma4::experiment::build_info(), and
# leaves the file alone where nothing changed. Outside a git checkout, as in an unpacked archive of a commit, the commit is
# the -DARCHIVE_SHA= that the configuration was given (GEMMA4_ARCHIVE_SHA), or "unknown".
execute_process(COMMAND git -C "${SOURCE_DIR}" rev-parse HEAD OUTPUT_VARIABLE sha RESULT_VARIABLE status ERROR_QUIET
                OUTPUT_STRIP_TRAILING_WHITESPACE)
set(dirty unknown)
if(status EQUAL 0)
  execute_process(COMMAND git -C "${SOURCE_DIR}" status --porcelain --untracked-files=no -- . ":!results"
                  OUTPUT_VARIABLE changes ERROR_QUIET)
  if(changes STREQUAL "")
    set(dirty 0)
  else()
    set(dirty 1)
  endif()
elseif(ARCHIVE_SHA)
  set(sha "${ARCHIVE_SHA}")
  set(dirty 0)
else()
  set(sha unknown)
endif()
string(STRIP "${FLAGS}" FLAGS)
file(CONFIGURE OUTPUT "${OUTPUT}" @ONLY CONTENT [[
// Written by .ci/cmake/write_build_info.cmake.
#include "experiments/build_info.hpp"

gemma4::BuildInfo gemma4::experiment::build_info() {
  return {.git_sha = "@sha@", .git_dirty = "@dirty@", .build = "@BUILD@", .flags = "@FLAGS@"};
}
]])
