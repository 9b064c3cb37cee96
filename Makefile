# SPDX-License-Identifier: Apache-2.0
# Thin: each target calls a preset of CMakePresets.json. `make demo` and `make test` need nothing prepared.
.DEFAULT_GOAL := help
.PHONY: help bootstrap configure build test demo asan fuzz check format clean

JOBS ?= $(shell nproc)
NANO := tests/data/nano
DEMO_CONTEXTS ?= 512,1024,2048,4096,8192
DEMO_CSV ?= results/demo/accuracy.csv
PROMPT ?= def read_lines(path):\n    """Return the lines of a file.\n

help: ## what there is
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

bootstrap:
	@.ci/bootstrap

configure: bootstrap
	@cmake --preset release

build: configure ## everything into build/, executables into build/bin/
	cmake --build --preset release -j $(JOBS)

test: build ## build everything and run every test
	ctest --preset release

demo: configure ## a trained model on this host's CPU: what TQ4 costs, in one table
	cmake --build --preset release -j $(JOBS) --target accuracy generate
	@mkdir -p $(dir $(DEMO_CSV)) && rm -f $(DEMO_CSV)
	OMP_WAIT_POLICY=passive build/bin/accuracy --model $(NANO)/nano-Q4_K_M.gguf --ids $(NANO)/heldout-ids.u16 \
	  --recall $(NANO)/recall-public-8192.gguf --contexts $(DEMO_CONTEXTS) --cache bf16,tq4,tq4-peer --out $(DEMO_CSV)
	OMP_WAIT_POLICY=passive build/bin/generate --model $(NANO)/nano-Q4_K_M.gguf --cache tq4 --max-tokens 96 --echo --prompt "$$(printf '$(PROMPT)')"
	@echo; echo "The table above is also in $(DEMO_CSV)."

asan: bootstrap ## tests that read untrusted bytes, under AddressSanitizer and UBSan
	cmake --preset asan
	cmake --build --preset asan -j $(JOBS) --target gemma4_hostile_tests
	ctest --preset asan -L hostile

fuzz: ## every fuzz target for FUZZ_SECONDS (60)
	@.ci/bootstrap fuzz
	cmake --preset fuzz
	cmake --build --preset fuzz -j $(JOBS)
	.ci/fuzz build-fuzz $(or $(FUZZ_SECONDS),60)

check: ## the rules of the rooms, without a build
	@.ci/check-rooms

format: ## clang-format on every source file
	git ls-files '*.hpp' '*.cuh' '*.cpp' '*.cu' | xargs clang-format -i

clean: ## remove every build directory
	cmake -E rm -rf build build-cpu build-gpu build-all-archs build-asan build-sanitizer build-fuzz build-tidy
