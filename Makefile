# make demo | test | bench | bench-micro | gpu-check | lint | cuda-build | kernel-report: each sets up what it needs first.
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
RESULTS ?= build/gpu-check
BUDGET ?= 570
NO_BUILD ?=
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch

EXTENSION_INPUTS := setup.py tools/cuda_toolkit.py $(shell find csrc -type f)

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

.PHONY: demo test bench bench-micro gpu-check lint setup doctor cuda-build kernel-report clean

demo: setup
	$(RUN) examples/train_bytes.py --minutes $(MINUTES) $(if $(TEXT),--text "$(TEXT)")

test: setup
	$(RUN) -m pytest

bench: setup
	$(RUN) -m benchmarks all $(BENCH)

bench-micro: setup
	$(RUN) -m pytest benchmarks/micro.py $(MICRO)

# Takes $(VENV) where one has been made and otherwise what $(PYTHON) has, installs nothing, and builds by itself, for the
# GPU that is there; NO_BUILD=1 takes the extension that lies in the tree. PEERS="name=file.py ..." are measured beside it.
gpu-check:
	$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) -m benchmarks.gpu_check --device $(DEVICE) --results $(RESULTS) \
		--budget $(BUDGET) $(if $(NO_BUILD),--no-build) $(PEERS:%=--peer %) $(ONLY:%=--only %)

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')

doctor: setup
	$(RUN) -m rwkv_kernels

setup: $(STATE)/extension

ifneq ($(VENV),)
$(REQUIREMENTS): requirements.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	mkdir -p $(STATE) && touch $@

$(STATE)/extension: $(REQUIREMENTS)
endif

$(STATE)/extension: $(EXTENSION_INPUTS)
	$(RUN) setup.py --quiet build_ext --inplace
	mkdir -p $(STATE) && touch $@

# A CUDA build beside the other one, in an environment of its own with a CUDA torch; needs a toolkit and no GPU.
CUDA_RUN := PATH=$(abspath $(CUDA_VENV))/bin:$$PATH python

cuda-build:
	test -x $(CUDA_VENV)/bin/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_RUN) -m pip install --quiet --disable-pip-version-check "$(CUDA_TORCH)" numpy "setuptools>=77" ninja pybind11
	RWKV_KERNELS_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0 $(CUDA_RUN) setup.py --quiet build -b build/cuda --build-lib build/cuda/lib
	PYTHONPATH=build/cuda/lib $(CUDA_RUN) tools/check_cuda_build.py 9.0

kernel-report: setup
	$(RUN) tools/kernel_report.py
	$(RUN) tools/triton_report.py

clean:
	rm -rf build dist demo *.egg-info rwkv_kernels/_C.*.so rwkv_kernels/_built_for.txt $(STATE)/extension
