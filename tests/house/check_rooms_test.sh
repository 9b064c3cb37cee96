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
  put reference/a.hpp '#pragma once' '#include <Eigen/Dense>' '#include "gemma4/a.hpp"' '/// Mirror: cuda/a.cuh'
  put cuda/a.cuh '#pragma once' '#include <cuda_runtime.h>' '#include "cuda/a/part.cuh"' '#include "gemma4/a.hpp"' \
    '/// What it is. Mirror:' '/// reference/a.hpp.'
  put cuda/a/part.cuh '#pragma once' '#include "cuda/ptx/b.cuh"'
  put cuda/ptx/b.cuh '#pragma once'
  put cuda/flash/launch.cuh '#pragma once' '#include "cuda/flash/params.cuh"'
  put cuda/flash/params.cuh '#pragma once'
  put tests/a_test.cpp '#include "reference/a.hpp"' '#include <gtest/gtest.h>'
  put tests/a_test.cu '#include "cuda/a.cuh"'
  put experiments/a.cpp '#include "experiments/driver.hpp"' '#include "reference/a.hpp"' '  return run_main(argc, argv, run);'
  printf 'gemma4_test(a cpu)\ngemma4_test(a gpu LABELS slow)\n' > "$tree/tests/CMakeLists.txt"
  printf 'gemma4_experiment(a)\n' > "$tree/experiments/CMakeLists.txt"
  mkdir -p "$tree/.ci"
  : > "$tree/.ci/mirror-ledger"
  put tests/a_parts_test.cu '#include "cuda/a/part.cuh"'
  put tests/part_test.cu '#include "cuda/a/part.cuh"'
  printf 'gemma4_test(a_parts gpu)\ngemma4_test(part gpu)\n' >> "$tree/tests/CMakeLists.txt"
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

# Drivers. driver LINE...: a driver with a main as it must be and these lines.
driver() { put experiments/a.cpp '#include "experiments/driver.hpp"' "${@}" '  return run_main(argc, argv, run);'; }
put experiments/a.cpp '#include "experiments/driver.hpp"' '  return 0;';       finds "experiments/a.cpp: its main is not"
put experiments/a.cpp '  return run_main(argc, argv, run);';                  finds "experiments/a.cpp: its main is not"
driver '  x->check(CLI::PositiveNumber);';                                    finds 'experiments/a.cpp:3:  x->check(CLI::Pos'
driver '  const CLI::Range tokens(1, 2);';                                    finds 'say limits in words'
driver '  ResultTable table(path, info, {}, {});';                            finds 'run_table opens the table'
driver '  std::ofstream file(path);';                                         finds 'notice what is lost'
driver '  printf("x");';                                                      finds 'notice what is lost'
driver '  std::exit(1);';                                                     finds 'notice what is lost'
for line in '  require(access(path, W_OK) == 0, std::strerror(errno));' '  if (errno == EINTR) continue;' '  fail(errno);'; do
  put include/gemma4/a.hpp '#pragma once' "$line";                            finds 'errno that is not kept at once'
done
driver '#include <fstream>' '  std::snprintf(text, 2, "x");' '  std::ifstream file(path);' '  ResultTable& table;'
put reference/a.hpp '#pragma once' '/// Mirror: cuda/a.cuh' '  const int reason = errno;' '    reason = errno;'
if "$ci/check-rooms" "$tree" > /dev/null; then judge 'what a driver may do' ok; else judge 'refused: what a driver may do' no; fi
clean_tree

# Doors and parts. door NAME LINE...: cuda/NAME.cuh without a twin.
list() { "$ci/list-headers" "$tree"; }
door() {
  put "cuda/$1.cuh" '#pragma once' "${@:2}"
  echo "$1 reference made up" >> "$tree/.ci/mirror-ledger"
  list
}
passes() { # passes NAME: nothing is found in the tree as it is
  if "$ci/check-rooms" "$tree" > /dev/null; then judge "$1" ok; else judge "refused: $1" no; fi
  clean_tree
}
door c '#include "cuda/a/part.cuh"';                    finds 'cuda/c.cuh: cuda/a/part.cuh'
put cuda/c/part.cuh '#pragma once' '#include "cuda/a/part.cuh"'; list; finds 'cuda/c/part.cuh: cuda/a/part.cuh'
put experiments/a.cpp '#include "cuda/a/part.cuh"';     finds 'experiments/a.cpp: cuda/a/part.cuh'
put tests/support/c.cuh '#pragma once' '#include "cuda/a/part.cuh"'; finds 'tests/support/c.cuh: cuda/a/part.cuh'
put tests/a_test.cpp '#include "cuda/a/part.cuh"';      passes 'a test of the component sees its parts'
door c '#include "cuda/flash/launch.cuh"';              finds 'cuda/c.cuh: cuda/flash/launch.cuh'
door sliding_attention '#include "cuda/flash/launch.cuh"'; passes 'a door of the flash engine'
door c '#include "cuda/ptx/b.cuh"' '#include "cuda/a.cuh"'; passes 'a door sees shared machinery and another door'
put cuda/ptx/b.cuh '#pragma once' '#include "cuda/a.cuh"'; finds 'include cycle in cuda/'
{ cat "$tree/cuda/a.cuh"; seq -f '// %g' 400; } > "$tree/long"; mv "$tree/long" "$tree/cuda/a.cuh"; finds 'cuda/a.cuh: 40'
for i in $(seq 28); do door "c$i"; done;                finds '29 headers at the top of cuda/'
for i in $(seq 27); do door "c$i"; done;                passes '28 doors'

# Mirror and ledger.
rm "$tree/cuda/a.cuh"; list;                            finds "a: no cuda/a.cuh, and no line 'a cuda'"
rm "$tree/reference/a.hpp" "$tree/tests/a_test.cpp"; list; finds "a: no reference/a.hpp, and no line 'a reference'"
rm "$tree/tests/a_test.cu";                             finds "a: no tests/a_test.cu, and no line 'a test'"
rm "$tree/tests/a_test.cu"; echo 'a test to come' > "$tree/.ci/mirror-ledger"; passes 'a twin whose test is in the ledger'
put cuda/c.cuh '#pragma once'; list;                    finds "c: no reference/c.hpp, and no line 'c reference'"
echo 'a test being built' > "$tree/.ci/mirror-ledger";  finds 'a: its test has come'
echo 'a cuda being built' > "$tree/.ci/mirror-ledger";  finds 'a: its cuda has come'
echo 'a being built' > "$tree/.ci/mirror-ledger";       finds "'being' is not reference, cuda or test"
echo 'gone test being built' > "$tree/.ci/mirror-ledger"; finds 'gone: a stale line'
put include/gemma4/a.hpp '#pragma once' '/// Mirror: cuda/gone.cuh'; finds 'Mirror: cuda/gone.cuh does not exist'
put reference/a.hpp '#pragma once';                     finds "reference/a.hpp: no 'Mirror: cuda/a.cuh'"
put cuda/a.cuh '#pragma once' '#include "cuda/a/part.cuh"'; finds "cuda/a.cuh: no 'Mirror: reference/a.hpp'"

# The emulator's twins.
instruction() { put "$1" '#pragma once' "__device__ __forceinline__ void $2(int) {" '  asm("");' '}'; }
twin=tests/emulator/twins/cuda/ptx/b.cuh
instruction cuda/ptx/b.cuh add;                         passes 'instructions where there is no emulator'
instruction cuda/ptx/b.cuh add; instruction $twin add;  passes 'a twin with the same function'
instruction cuda/ptx/b.cuh add; instruction $twin sub;  finds "$twin: no add()"
instruction cuda/ptx/b.cuh add; instruction $twin sub;  finds "$twin: sub() is not in cuda/ptx/b.cuh"
instruction cuda/ptx/b.cuh add; mkdir -p "$tree/tests/emulator/twins"; finds "cuda/ptx/b.cuh: no $twin"
put tests/emulator/twins/cuda/ptx/gone.cuh '#pragma once'; finds 'there is no cuda/ptx/gone.cuh'

rm -rf "$scratch"
echo "check-rooms: $n_passed passed, $n_failed failed"
[ $n_failed = 0 ]
