#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# .ci/mutants is code under test: in a toy tree a fault that its test sees must count as killed, one that no test sees
# must be named, and what tells nothing (text that is not there, a fault that does not compile, a test that fails by
# itself) must be an error.
# Usage: mutants_test.sh SCRATCH_DIR
set -euo pipefail
ci=$(cd "$(dirname "$0")/../../.ci" && pwd)
scratch=${1:?usage: mutants_test.sh SCRATCH_DIR}
tree=$scratch/tree
n_passed=0 n_failed=0

judge() { # judge NAME OUTCOME
  if [ "$2" = ok ]; then n_passed=$((n_passed + 1)); else n_failed=$((n_failed + 1)); echo "FAILED: $1"; fi
}
says() { # says STATUS WORDS ARGUMENT...: the script ends like this and says these words
  local wanted=$1 words=$2 said status=0
  shift 2
  said=$("$ci/mutants" --root "$tree" --scratch "$scratch/work" "$@" 2>&1) || status=$?
  if [ $status != "$wanted" ]; then judge "status $status, expected $wanted, of '$words': $said" no
  elif ! grep -qE -- "$words" <<<"$said"; then judge "no '$words' in: $said" no
  else judge "$words" ok; fi
}
fault() { # fault NAME OLD NEW [TEST] [FILE]
  printf '= %s\n@ %s\n- %s\n+ %s\n? %s\n\n' "$1" "${5:-include/toy.hpp}" "$2" "$3" "${4:-toy.cpu}"
}
list() { cat > "$tree/tests/mutants/cpu.list"; }

rm -rf "$scratch"
mkdir -p "$tree/include" "$tree/reference" "$tree/tests/mutants"
cat > "$tree/include/toy.hpp" <<'END'
inline int twice(int x) { return 2 * x; }
inline int thrice(int x) {
  int y = x;
  y += x;
  y += x;
  return y;
}
END
printf '#include "include/toy.hpp"\nint main() { return twice(3) == 6 ? 0 : 1; }\n' > "$tree/tests/toy_test.cpp"
printf '#include "include/toy.hpp"\nint main() { return thrice(2) == 6 ? 0 : 1; }\n' > "$tree/tests/sum_test.cpp"
printf 'int main() { return 1; }\n' > "$tree/tests/red_test.cpp"
printf 'int main() { return 77; }\n' > "$tree/tests/skipped_test.cpp"
cat > "$tree/CMakeLists.txt" <<'END'
cmake_minimum_required(VERSION 3.20)
project(toy CXX)
enable_testing()
foreach(name toy sum red skipped)
  add_executable(${name}_test tests/${name}_test.cpp)
  target_include_directories(${name}_test PRIVATE .)
  add_test(NAME ${name}.cpu COMMAND ${name}_test)
  set_tests_properties(${name}.cpu PROPERTIES SKIP_RETURN_CODE 77)
endforeach()
END
printf '{"version": 3, "configurePresets": [{"name": "cpu", "binaryDir": "${sourceDir}/build"}]}\n' > "$tree/CMakePresets.json"
before=$(find "$tree" -type f -exec md5sum {} + | sort)

fault killed '2 * x' '3 * x' | list
says 0 '^killed killed by toy.cpu' --list cpu --out "$scratch/table.csv"
if [ "$(sed -n 2p "$scratch/table.csv" | cut -d, -f1-4)" = killed,include/toy.hpp,toy.cpu,toy.cpu ]; then judge row ok; else judge "row: $(cat "$scratch/table.csv")" no; fi

{ fault killed '2 * x' '3 * x'; fault survivor 'return y;' 'return y + 1;'; } | list
says 1 '^SURVIVED survivor \(include/toy.hpp\): not seen by toy.cpu' --list cpu --out "$scratch/table.csv" --jobs 2
says 1 '1 killed, 1 survived, 0 errors' --list cpu
says 0 '1 killed, 0 survived' --list cpu --only killed
if grep -q '^survivor,include/toy.hpp,toy.cpu,SURVIVED,' "$scratch/table.csv"; then judge 'row of a survivor' ok; else judge 'row of a survivor' no; fi

fault later 'return y;' 'return y + 1;' 'toy.cpu sum.cpu' | list;  says 0 '^killed later by sum.cpu' --list cpu
printf '= lines\n@ include/toy.hpp\n-   y += x;\n-   return y;\n+   return y;\n? sum.cpu\n' | list;  says 0 '^killed lines' --list cpu
fault broken '2 * x' '2 * ;' | list;                               says 1 '^ERROR broken .*does not build' --list cpu
fault control '2 * x' '3 * x' red.cpu | list;                      says 1 'red.cpu: fails without a fault' --list cpu
fault skipped '2 * x' '3 * x' skipped.cpu | list;                  says 1 'skipped.cpu: did not run' --list cpu

# The lists alone.
fault gone '5 * x' '3 * x' | list;                                 says 1 "gone: its text occurs 0 times" --list cpu
fault twice 'y += x;' 'y -= x;' | list;                            says 1 "twice: its text occurs 2 times" --check
fault same '2 * x' '2 * x' | list;                                 says 1 'same: it changes nothing' --check
fault file '2 * x' '3 * x' toy.cpu include/none.hpp | list;        says 1 'file: no file include/none.hpp' --check
fault test '2 * x' '3 * x' none.cpu | list;                        says 1 'test: no test none.cpu' --check
{ fault a '2 * x' '3 * x'; fault a '2 * x' '4 * x'; } | list;      says 1 'a: the name is there twice' --check
printf '= a\n@ include/toy.hpp\n- 2\n? toy.cpu\n' | list;          says 1 "'a' needs lines" --check
printf 'hm\n' | list;                                              says 1 "'hm' begins with none of" --check
for i in $(seq 15); do fault "i$i" '2 * x' "$i + x"; done | list;  says 1 '15 faults in include/, need at least 16' --check
printf 'int a = 1;\n' > "$tree/reference/toy.hpp"
{ for i in $(seq 16); do fault "i$i" '2 * x' "$i + x"; fault "r$i" 'a = 1' "a = 1$i" toy.cpu reference/toy.hpp; done; } | list
says 0 '32 faults, each can be planted' --check
fault g '2 * x' '3 * x' > "$tree/tests/mutants/gpu.list";          says 1 '0 faults in cuda/, need at least 16' --check
rm "$tree/tests/mutants/gpu.list" "$tree/tests/mutants/cpu.list" "$tree/reference/toy.hpp"
if [ "$(find "$tree" -type f -exec md5sum {} + | sort)" = "$before" ]; then judge 'the tree is left alone' ok; else judge 'the tree was changed' no; fi

rm -rf "$scratch"
echo "mutants: $n_passed passed, $n_failed failed"
[ $n_failed = 0 ]
