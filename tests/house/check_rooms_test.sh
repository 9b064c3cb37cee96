#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# .ci/check-rooms is code under test: a clean little tree must pass, and each planted breach must be found by name.
# Usage: check_rooms_test.sh SCRATCH_DIR
set -euo pipefail
ci=$(cd "$(dirname "$0")/../../.ci" && pwd)
scratch=${1:?usage: check_rooms_test.sh SCRATCH_DIR}
tree=$scratch/tree
n_passed=0 n_failed=0

put() { # put FILE LINE...: a file with the SPDX line and these lines
  mkdir -p "$tree/$(dirname "$1")"
  { echo '// SPDX-License-Identifier: Apache-2.0'; printf '%s\n' "${@:2}"; } > "$tree/$1"
}
clean_tree() {
  rm -rf "$scratch"
  put include/gemma4/a.hpp '#pragma once' '#include <vector>'
  put reference/a.hpp '#pragma once' '#include <Eigen/Dense>' '#include "gemma4/a.hpp"'
  put cuda/a.cuh '#pragma once' '#include <cuda_runtime.h>' '#include "gemma4/a.hpp"'
  put tests/a_test.cpp '#include "reference/a.hpp"' '#include <gtest/gtest.h>'
  put tests/a_test.cu '#include "cuda/a.cuh"'
  put experiments/a.cpp '#include "reference/a.hpp"'
  printf 'gemma4_test(a cpu)\ngemma4_test(a gpu LABELS slow)\n' > "$tree/tests/CMakeLists.txt"
  printf 'gemma4_experiment(a)\n' > "$tree/experiments/CMakeLists.txt"
  mkdir -p "$tree/.ci"
  : > "$tree/.ci/mirror-ledger"
  "$ci/list-headers" "$tree"
}
judge() { # judge NAME OUTCOME
  if [ "$2" = ok ]; then n_passed=$((n_passed + 1)); else n_failed=$((n_failed + 1)); echo "FAILED: $1"; fi
}
finds() { # finds WORDS: the check fails on the tree as it is, and says WORDS
  local said
  if said=$("$ci/check-rooms" "$tree" 2>&1); then judge "not found: $1" no
  elif grep -qF -- "$1" <<<"$said"; then judge "$1" ok
  else judge "found something else than '$1': $said" no; fi
  clean_tree
}

clean_tree
if "$ci/check-rooms" "$tree"; then judge clean ok; else judge 'a clean tree is refused' no; fi

put include/gemma4/a.hpp '#pragma once' '#include <Eigen/Core>';            finds 'include/ sees Eigen'
put include/gemma4/a.hpp '#pragma once' '# include <cuda_runtime.h>';       finds 'include/ sees Eigen, CUDA'
put include/gemma4/a.hpp '#pragma once' '#include "reference/a.hpp"';       finds 'include/ sees Eigen, CUDA or another'
put include/gemma4/a.hpp '#pragma once' '#include <nvtx3/nvtx3.hpp>';       finds 'NVTX'
put reference/a.hpp '#pragma once' '#include <cuda_bf16.h>';                finds 'reference/ sees CUDA'
put reference/a.hpp '#pragma once' '#include "cuda/a.cuh"';                 finds 'reference/ sees CUDA'
put cuda/a.cuh '#pragma once' '#include <Eigen/Dense>';                     finds 'cuda/ sees Eigen'
put cuda/a.cuh '#pragma once' '#include "reference/a.hpp"';                 finds 'cuda/ sees Eigen or reference/'
put cuda/a.cuh '#pragma once' '#include <gtest/gtest.h>';                   finds 'cuda/ sees a test'
put experiments/a.cpp '#include <gtest/gtest.h>';                           finds 'experiments/ sees GoogleTest'
put reference/a.hpp '#include <vector>';                                    finds 'without #pragma once'
echo '#pragma once' > "$tree/include/gemma4/a.hpp";                         finds 'SPDX'
put reference/a.hpp '#pragma once' 'using namespace std;';                  finds 'using namespace'
put reference/a.hpp '#pragma once' 'namespace {';                           finds 'anonymous namespace'
put reference/a.hpp '#pragma once' '#include "a.hpp"';                      finds 'full path'
put reference/a.hpp '#pragma once' '#include "gemma4/../a.hpp"';            finds '../'
put tests/b_test.cpp;                                                       finds 'tests/b_test.cpp'
put tests/a_test.cu; echo 'gemma4_test(a cpu)' > "$tree/tests/CMakeLists.txt"; finds 'tests/a_test.cu'
put tests/b_test.cpp; echo '# gemma4_test(b cpu)' >> "$tree/tests/CMakeLists.txt"; finds 'tests/b_test.cpp'
put tests/more/b_test.cpp;                                                  finds 'tests/more/b_test.cpp'
put tests/fuzz/b_fuzz.cpp;                                                  finds 'tests/fuzz/b_fuzz.cpp'
put experiments/b.cpp;                                                      finds 'experiments/b.cpp'
put include/gemma4/b.hpp '#pragma once';                                    finds 'header list out of date'
rm "$tree/cuda/a.cuh"; "$ci/list-headers" "$tree";                          finds 'no cuda/a.cuh'
rm "$tree/tests/a_test.cu";                                                 finds 'no cuda/a.cuh with tests/a_test.cu'
echo 'a being built' > "$tree/.ci/mirror-ledger";                           finds 'must go'
echo 'gone being built' > "$tree/.ci/mirror-ledger";                        finds 'stale line'

rm -rf "$scratch"
echo "check-rooms: $n_passed passed, $n_failed failed"
[ $n_failed = 0 ]
