# make demo | test | test-ptx | bench | bench-micro | gpu-check | lint | cuda-build | cross-compile | kernel-report: each
# sets up what it needs first.
#
# A line for each step; what a compiler or installer prints is shown where it fails.
#
# By default everything lives in .venv, made by $(PYTHON) from requirements.txt. `make test PYTHON=python3 VENV=` uses the
# environment that is there instead, installs nothing into it and needs no network: the extension is built in place.

PYTHON ?= python3
VENV ?= .venv
BENCH ?=
MICRO ?=
TEXT ?=
MINUTES ?= 3.5
DEVICE ?= cuda
PEERS ?=
ONLY ?=
# Processes that test at the same time, by pytest-xdist; without it, WORKERS= tests in one.
WORKERS ?= $(if $(VENV),2)
RESULTS ?= build/gpu-check
BUDGET ?= 570
NO_BUILD ?=
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch

EXTENSION_INPUTS := setup.py tools/cuda_toolkit.py tools/openmp.py $(shell find csrc -type f)

ifeq ($(VENV),)
RUN := $(PYTHON)
STATE := build/in-place
else
RUN := $(abspath $(VENV))/bin/python
STATE := $(VENV)/state
REQUIREMENTS := $(STATE)/requirements
export PATH := $(abspath $(VENV))/bin:$(PATH)
endif
export PYTHONPATH := $(CURDIR):$(PYTHONPATH)

.PHONY: demo test test-ptx bench bench-micro gpu-check lint setup doctor cuda-build cross-compile kernel-report clean

# The command that follows, without its output where it succeeds.
QUIETLY := @sh tools/quietly.sh

# What is tested on the CPU starts from as many threads as there are processors, in every worker: none shall spin for work.
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest --durations=15 $(if $(WORKERS),-n $(WORKERS) --dist worksteal)

demo: setup
	@printf 'demo: training for $(MINUTES) minutes\n'
	@$(RUN) examples/train_bytes.py --minutes $(MINUTES) $(if $(TEXT),--text "$(TEXT)")

test: setup
	@printf 'test: pytest, $(or $(WORKERS),1) at a time\n'
	@$(PYTEST) -m 'not ptx'

# The GPU kernels as their PTX, translated to this processor's code by the program that RWKV_KERNELS_PTX_RUNNER names.
test-ptx: setup
	@printf 'test-ptx: pytest, $(or $(WORKERS),1) at a time\n'
	@$(PYTEST) -m ptx

bench: setup
	@printf 'bench: every benchmark\n'
	@$(RUN) -m benchmarks all $(BENCH)

bench-micro: setup
	@printf 'bench-micro: pytest-benchmark\n'
	@$(RUN) -m pytest benchmarks/micro.py $(MICRO)

# Takes $(VENV) where one has been made and otherwise what $(PYTHON) has, installs nothing, and builds by itself, for the
# GPU that is there; NO_BUILD=1 takes the extension that lies in the tree. PEERS="name=file.py ..." are measured beside it.
gpu-check:
	@printf 'gpu-check: on $(DEVICE), for at most $(BUDGET) s\n'
	@$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) -m benchmarks.gpu_check --device $(DEVICE) --results $(RESULTS) \
		--budget $(BUDGET) $(if $(NO_BUILD),--no-build) $(PEERS:%=--peer %) $(ONLY:%=--only %)

lint: setup
	@printf 'lint: ruff\n'
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --quiet --check .
	@printf 'lint: mypy\n'
	@$(RUN) -m mypy
	@printf 'lint: clang-format\n'
	@clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

doctor: setup
	@$(RUN) -m rwkv_kernels

setup: $(STATE)/extension

ifneq ($(VENV),)
$(REQUIREMENTS): requirements.txt
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(QUIETLY) 'setup: installing requirements.txt into $(VENV)' \
		$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	@mkdir -p $(STATE) && touch $@

$(STATE)/extension: $(REQUIREMENTS)
endif

$(STATE)/extension: $(EXTENSION_INPUTS)
	$(QUIETLY) 'setup: building the extension' $(RUN) setup.py --quiet build_ext --inplace
	@mkdir -p $(STATE) && touch $@

# A CUDA build beside the other one, in an environment of its own with a CUDA torch; needs a toolkit and no GPU.
CUDA_RUN := env PATH="$(abspath $(CUDA_VENV))/bin:$$PATH"

cuda-build:
	@test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(QUIETLY) 'cuda-build: installing $(CUDA_TORCH) into $(CUDA_VENV)' $(CUDA_RUN) python -m pip install \
		--disable-pip-version-check "$(CUDA_TORCH)" numpy "setuptools>=77" ninja pybind11
	$(QUIETLY) 'cuda-build: building for 9.0' $(CUDA_RUN) RWKV_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 \
		python setup.py --quiet build -b build/cuda --build-lib build/cuda/lib
	@printf 'cuda-build: what was built registers\n'
	@$(CUDA_RUN) PYTHONPATH=build/cuda/lib python tools/check_cuda_build.py 9.0

# For aarch64, which GH200 and GB200 have; needs Debian's g++-aarch64-linux-gnu.
cross-compile: $(REQUIREMENTS)
	@printf 'cross-compile: host sources for aarch64\n'
	@$(RUN) tools/cross_compile.py aarch64-linux-gnu-g++

# The layout that Hugging Face's kernels loads, in build/hub.
.PHONY: hub
hub: setup
	$(QUIETLY) 'hub: laying out build/hub' $(RUN) tools/hub.py

kernel-report: setup
	@printf 'kernel-report: CUDA kernels\n'
	@$(RUN) tools/kernel_report.py
	@printf 'kernel-report: Triton kernels\n'
	@$(RUN) tools/triton_report.py

clean:
	@printf 'clean\n'
	@rm -rf build dist demo *.egg-info rwkv_kernels/_C.*.so rwkv_kernels/_built_for.txt $(STATE)/extension
