# SPDX-License-Identifier: Apache-2.0
# Thin: each target calls a preset of CMakePresets.json. `make demo` and `make test` need nothing prepared.
.DEFAULT_GOAL := help
.PHONY: help bootstrap configure build test demo plots pages asan sanitize emulate fuzz mutants check format clean

JOBS ?= $(shell nproc)

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

demo: configure ## a trained model, and on a GPU the 31B at its full context; MODEL=file.gguf takes real weights
	cmake --build --preset release -j $(JOBS) --target accuracy generate device throughput synthesize plot
	@.ci/demo build/bin "$(MODEL)"

plots: ## results/plots/*.svg from the newest table of each driver
	@.ci/plots build/bin

pages: ## the tables of README.md and results/*.md from the newest table of each driver
	@.ci/pages . build/bin

asan: bootstrap ## tests that read untrusted bytes, under AddressSanitizer and UBSan
	cmake --preset asan
	cmake --build --preset asan -j $(JOBS) --target gemma4_hostile_tests
	ctest --preset asan -L hostile

sanitize: bootstrap ## every GPU test under memcheck, racecheck and synccheck (compute-sanitizer)
	cmake --preset gpu
	cmake --build --preset gpu -j $(JOBS)
	.ci/sanitize build-gpu $(JOBS)

emulate: bootstrap ## GPU tests without a GPU: TESTS="draft_step rms_norm"
	JOBS=$(JOBS) .ci/emulate $(TESTS)

fuzz: ## every fuzz target for FUZZ_SECONDS (60)
	@.ci/bootstrap fuzz
	cmake --preset fuzz
	cmake --build --preset fuzz -j $(JOBS)
	.ci/fuzz build-fuzz $(or $(FUZZ_SECONDS),60)

mutants: bootstrap ## known faults, planted one at a time: every one must be seen by a test; MUTANTS="--list cpu" and the like
	.ci/mutants --jobs $(JOBS) $(MUTANTS)

check: ## the rules of the rooms, without a build; and whether the pages say what the tables say
	@.ci/check-rooms
	@.ci/pages --check
	@.ci/mutants --check

format: ## clang-format on every source file
	git ls-files '*.hpp' '*.cuh' '*.cpp' '*.cu' | xargs clang-format -i

clean: ## remove every build directory
	cmake -E rm -rf build build-cpu build-gpu build-all-archs build-asan build-sanitizer build-fuzz build-emulator build-tidy
