#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A format of the list that has no cache does not compile, in either room; the same file without it does.
# Usage: forgotten_format_test.sh ROOT CXX EIGEN_INCLUDE [NVCC]
set -uo pipefail
root=$1 cxx=$2 eigen=$3 nvcc=${4:-}
source=$root/tests/house/forgotten_format.cpp
fail() { echo "forgotten_format: $1"; exit 1; }
judge() { # judge ROOM COMMAND...
  local room=$1 said
  shift
  said=$("$@" "$source" 2>&1) || fail "$room: the control does not compile: $(head -c 2000 <<<"$said")"
  said=$("$@" -DFORGOTTEN "$source" 2>&1) && fail "$room: a format without a cache compiles"
  grep -q 'FullLayerCaches' <<<"$said" || fail "$room: refused for another reason: $(head -c 2000 <<<"$said")"
  echo "forgotten_format: $room as promised"
}
judge reference "$cxx" -std=c++20 -fsyntax-only -I "$root" -I "$root/include" -isystem "$eigen"
[ -z "$nvcc" ] || judge cuda "$nvcc" -std=c++20 -x cu -ptx -arch=compute_80 -o /dev/null -I "$root" -I "$root/include"
