# `make help` lists the targets. The programs stand in tools/; this file knows their environment and their order.
#   PYTHON=python3.12   the Python that .venv is made with      ARGS="--steps 50"   flags for the target's program

PYTHON ?= python3
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
VENV := .venv
READY := $(VENV)/ready
RUN := $(VENV)/bin/python

export PIP_DISABLE_PIP_VERSION_CHECK = 1
.DEFAULT_GOAL := build
.PHONY: build help venv train test test-isa test-asan test-ubsan test-tsan test-peers test-crashes test-kills test-ray test-array-api test-gpu test-cuda-compile test-wheel lint mutate mutate-auto nightly fuzz fuzz-wire exhaustive bench ladder plan lines doctor wheel clean
.DELETE_ON_ERROR:

build: $(READY) ## compile the kernels in place (what plain `make` does)
	@$(RUN) tools/build_kernels.py

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(READY) ## make the environment .venv from pyproject.toml's dev extra

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "make: $(PYTHON) is not Python 3.10 or later; name one that is: make PYTHON=python3.12"; exit 1; }
	@echo "environment: making $(VENV) from pyproject.toml, and compiling the kernels (minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/array-api: $(READY)
	@$(RUN) -m pip install --quiet --editable '.[dev,array-api]'
	@touch $@

$(VENV)/cluster: $(READY)
	@$(RUN) -m pip install --quiet --editable '.[dev,cluster]'
	@touch $@

$(VENV)/mutation: $(READY)
	@$(RUN) -m pip install --quiet --editable '.[dev,mutation]'
	@touch $@

$(VENV)/peers: $(READY)
	@echo "environment: adding pyproject.toml's peers extra, several hundred megabytes"
	@$(RUN) -m pip install --quiet --editable '.[dev,peers]'
	@touch $@

train: build ## train a Transformer on the parameter server: checkpoint, plot, report, samples
	@$(RUN) tools/train.py --resume --minutes 7 $(ARGS)

# One kernel thread for each of the JOBS processes; the tests that are about threads set their own number.
test: build ## run all tests that fit in ten minutes
	@ENGINE_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) $(ARGS)

test-isa: build ## run the tests of the ops at every instruction-set level of this machine
	@set -e; for level in $$($(RUN) -m engine doctor --levels); do \
	    echo "tests of the ops: ENGINE_ISA=$$level"; \
	    ENGINE_ISA=$$level ENGINE_NUM_THREADS=1 $(RUN) -m pytest -q -n $(JOBS) tests/ops $(ARGS); \
	done

# The whole suite on kernels built with a sanitizer, every buffer between guard zones, in every process that the tests start.
# The C++ library is loaded at once too, for the sanitizers want to see the exceptions of extension modules.
SANITIZED = ENGINE_KERNELS=$(CURDIR)/build/$@ PYTHONPATH=$(CURDIR)/tests PYTEST_PLUGINS=guarded \
            ENGINE_NUM_THREADS=2 $(RUN) -m pytest -q -n $(JOBS) $(ARGS)
BUILD_SANITIZED = $(RUN) tools/build_kernels.py --into build/$@ --work build/$@-objects --flags

test-asan: $(READY) ## all tests on kernels built with the address sanitizer, buffers between guard zones
	@$(BUILD_SANITIZED) "-fsanitize=address -fno-omit-frame-pointer -g"
	@LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 $(SANITIZED)

test-ubsan: $(READY) ## the same with the undefined-behaviour sanitizer
	@$(BUILD_SANITIZED) "-fsanitize=undefined -fno-sanitize-recover=all -g"
	@$(SANITIZED)

# What was not compiled for it starts no threads: OpenBLAS, in NumPy, and the tokenizers. It cannot follow a process with
# a team of threads into a forked child that starts threads, so what forks servers comes by itself, with kernels of one.
test-tsan: export OPENBLAS_NUM_THREADS = 1
test-tsan: export TOKENIZERS_PARALLELISM = false
test-tsan: export TSAN_OPTIONS = halt_on_error=1:die_after_fork=0
test-tsan: TSAN_PRELOAD = LD_PRELOAD="$$($(CC) -print-file-name=libtsan.so) $$($(CC) -print-file-name=libstdc++.so)"
test-tsan: $(READY) ## the same with the thread sanitizer
	@$(BUILD_SANITIZED) "-fsanitize=thread -g"
	@$(TSAN_PRELOAD) $(SANITIZED) -k "not process"
	@$(TSAN_PRELOAD) $(subst THREADS=2,THREADS=1,$(SANITIZED)) -k process

test-peers: build $(VENV)/peers ## hold ops, layers, optimizers and models against PyTorch and transformers
	@ENGINE_NUM_THREADS=1 $(RUN) -m pytest -q tests/peers tests/test_foreign.py $(ARGS)

test-crashes: build ## a crash and a reshard at every event boundary, for 1..8 workers and 1..7 shards (hours; goes on)
	@ENGINE_NUM_THREADS=1 $(RUN) -m pytest -q -m slow -n $(JOBS) tests/sharder/test_crashes.py $(ARGS)

test-kills: build ## 200 real SIGKILLs at random moments of training; goes on where it stopped
	@ENGINE_NUM_THREADS=1 $(RUN) tools/kills.py $(ARGS)

test-ray: build $(VENV)/cluster ## the Ray driver on three raylets of this machine: actors killed, nodes removed (minutes)
	@ENGINE_NUM_THREADS=1 $(RUN) -m pytest -q -m slow tests/sharder/test_ray.py $(ARGS)

# The suite is not on PyPI: git clone --recursive https://github.com/data-apis/array-api-tests
test-array-api: build $(VENV)/array-api ## the array API standard's own tests: ARRAY_API_TESTS=a checkout of data-apis/array-api-tests
	@test -d "$(ARRAY_API_TESTS)/array_api_tests" || { echo "make: ARRAY_API_TESTS is '$(ARRAY_API_TESTS)', expected a" \
	    "checkout of https://github.com/data-apis/array-api-tests with its submodule"; exit 1; }
	@cd "$(ARRAY_API_TESTS)" && ENGINE_NUM_THREADS=1 PYTHONPATH="$(CURDIR):$(CURDIR)/tests/array_api" $(CURDIR)/$(RUN) \
	    -m pytest -q -rs -p standard_suite -p no:cacheprovider --disable-deadline array_api_tests $(ARGS)

test-gpu: build ## run the op suite, training runs and every CUDA kernel on a GPU, and say what ran
	@ENGINE_TEST_GPU=1 $(RUN) -m pytest -q -s tests/cuda_emulation/test_cuda_device.py $(ARGS)

test-cuda-compile: $(READY) ## compile the CUDA kernels for sm_75, sm_80, sm_90 (needs nvcc or libnvrtc, no GPU)
	@$(RUN) -m pytest -q -rs -m slow -n $(JOBS) tests/cuda_emulation/test_cuda_source.py $(ARGS)

test-wheel: $(READY) ## build the wheel, install it in a new environment, run it without a compiler
	@$(RUN) -m pytest -q -m slow tests/test_packaging.py $(ARGS)

lint: $(READY) ## ruff and mypy
	@$(RUN) -m ruff check
	@$(RUN) -m mypy

mutate: build ## plant bugs one by one, and see that the tests catch every one
	@$(RUN) tools/mutate.py $(ARGS)

mutate-auto: build $(VENV)/mutation ## the same with 330 mutants of the ops and autograd that a library makes (an hour; goes on)
	@ENGINE_NUM_THREADS=1 $(RUN) tools/mutate.py --automatic 330 --seed 0 --ledger build/mutate-automatic.json $(ARGS)

nightly: build ## thousands of new examples a check, goes on where it stopped (make nightly ARGS="--minutes 60")
	@ENGINE_NUM_THREADS=1 $(RUN) tools/nightly.py $(ARGS)

fuzz: build ## damaged files for everything that reads files, a minute each (make fuzz ARGS="checkpoint --minutes 30")
	@ENGINE_NUM_THREADS=1 $(RUN) tools/fuzz.py $(ARGS)

fuzz-wire: build ## a million inputs for the decoder of messages; goes on where it stopped
	@ENGINE_NUM_THREADS=1 $(RUN) tools/fuzz_wire.py $(ARGS)

exhaustive: build ## prove the accuracy of the float functions over all 2^32 floats (an hour; goes on where it stopped)
	@$(RUN) tools/exhaustive.py $(ARGS)

bench: build ## ours beside the peers that are installed (make bench ARGS="gemm --threads 1")
	@$(RUN) tools/bench.py $(or $(ARGS),all)

ladder: build ## matrix product in seven steps, attention in four: validated, timed, drawn (tools/ladder/README.md)
	@$(RUN) tools/ladder/ladder.py $(ARGS)

plan: build ## predict a cluster's step time, and the best number of shards (make plan ARGS="--check")
	@ENGINE_NUM_THREADS=1 $(RUN) tools/plan.py $(or $(ARGS),--help)

lines: ## the reader's budget: lines of source beside their goals
	@$(PYTHON) tools/lines.py $(ARGS)

doctor: build ## what is active on this machine, its measured limits, and a self-test
	@$(RUN) -m engine doctor

wheel: $(READY) ## build the wheel in dist/
	@$(RUN) -m pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

clean: ## remove what was built (.venv and runs/ stay)
	@rm -rf build dist *.egg-info engine/_kernels/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
