#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The README's recipe "add a simulated cache format", followed to the letter in a copy of the tree: the functor of
# tests/recipes/, one name in the list, and a row of `accuracy`. At most 3 files and 80 lines.
# Usage: recipe_test.sh ROOT SCRATCH CXX
set -euo pipefail
root=$1 scratch=$2 cxx=$3
fail() { echo "recipe: $1"; exit 1; }
rm -rf "$scratch" && mkdir -p "$scratch/tree"
(cd "$root" && tar cf - CMakeLists.txt CMakePresets.json .ci include reference cuda/headers.cmake experiments tests/recipes) |
  tar xf - -C "$scratch/tree"
cd "$scratch/tree"
list=include/gemma4/quantisers.hpp
cp tests/recipes/e4m3_token.hpp include/gemma4/quantisers/                                                 # file 1
sed -i 's|^#include "gemma4/quantisers/int8_token.hpp"|#include "gemma4/quantisers/e4m3_token.hpp"\n&|' $list # file 2
sed -i 's|SimulatedFormats<ScalarCodes, Int8Token, Q80Cache, Q40Cache, TrellisCodes>|SimulatedFormats<ScalarCodes, Int8Token, Q80Cache, Q40Cache, TrellisCodes, recipes::E4m3Token>|' $list
changed=$(diff "$root/$list" $list | grep -c '^>') || true
[ "$changed" = 2 ] || fail "the list of quantisers took $changed changed lines, expected 2"
lines=$(($(wc -l < "$root/tests/recipes/e4m3_token.hpp") + $(wc -l < "$root/tests/recipes_test.cpp") + changed))
[ "$lines" -le 80 ] || fail "$lines lines in 3 files, at most 80"
.ci/list-headers
cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_COMPILER="$cxx" -DGEMMA4_CUDA=OFF -DGEMMA4_TESTS=OFF \
  > configure.log 2>&1 || fail "$(tail -n 5 configure.log)"
cmake --build build --target accuracy > build.log 2>&1 || fail "$(grep -m 5 error build.log)"
data=$root/tests/data/nano
said=$(build/bin/accuracy --model "$data/nano-Q4_K_M.gguf" --ids "$data/heldout-ids.u16" --contexts 128 --chunk 128 \
  --cache bf16,sim-e4m3,sim-e4m3-had --quiet --out "$scratch/row.csv")
[ "$(grep -c 'sim-e4m3' "$scratch/row.csv")" -ge 2 ] || fail "no row of the new format: $said"
echo "recipe: a row of accuracy from 3 files and $lines lines"
printf '%s\n' "$said"
