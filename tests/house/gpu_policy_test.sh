#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Without a device the program skips, says why, runs the host tests, and fails where a GPU is required.
# With a device it passes either way. Usage: gpu_policy_test.sh PROGRAM
set -uo pipefail
program=${1:?usage: gpu_policy_test.sh PROGRAM}
fail() { echo "gpu_policy: $1"; exit 1; }

said=$(GEMMA4_REQUIRE_GPU=0 "$program" 2>&1); status=$?
grep -q 'OK.*GpuPolicyPlan.HostCodeIsTestedEverywhere' <<<"$said" || fail "host tests did not run: $said"
case $status in
  0) GEMMA4_REQUIRE_GPU=1 "$program" >/dev/null 2>&1 || fail 'passes, but fails when a GPU is required' ;;
  77)
    grep -q 'tests skipped: no CUDA device' <<<"$said" || fail "skipped without a reason: $said"
    GEMMA4_REQUIRE_GPU=1 "$program" >/dev/null 2>&1 && fail 'passes without a GPU although one is required' ;;
  *) fail "ended with $status: $said" ;;
esac
echo 'gpu_policy: as promised'
