#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Drivers that need a GPU say so where there is none, before they do or write anything; where there is one, nothing is
# tested (exit code 77). Usage: drivers_without_gpu_test.sh BIN MODEL
set -uo pipefail
bin=$1 model=$2
"$bin/device" >/dev/null && exit 77
scratch=$(mktemp -d) && trap 'rm -rf "$scratch"' EXIT
status=0
refuses() { # refuses DRIVER ARGUMENT...
  local said
  if said=$("$bin/$1" "${@:2}" --out "$scratch/table.csv" 2>&1); then
    echo "$1: exit code 0 without a GPU" && status=1
  elif ! grep -qE 'error: this needs (a CUDA device|CUDA)' <<<"$said"; then
    echo "$1: expected a refusal that names what is missing, found: $said" && status=1
  fi
  [ -z "$(ls -A "$scratch")" ] || { echo "$1: left something behind" && status=1; }
}
for driver in throughput ablation breakdown parity; do refuses $driver --model "$model"; done
refuses accuracy --backend cuda --model "$model" --depths 512
exit $status
