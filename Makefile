# make demo | test | test-ptx | bench | gpu-check | lint | wheel | wheel-test | hub | cross-compile |
# kernel-report | kernel-check | test-aotinductor: each sets up what it needs first.
#
# make wheel makes dist/*.whl, of the CPU kernels and, where nvcc is, of the CUDA kernels for every architecture, and audits
# it: torch's stable ABI, the glibc that its tag promises, its files and their size. make wheel-test installs it beside the
# oldest torch and beside the newest, in environments of their own, and tests it there.
#
# A line for each step; what a compiler or installer prints is shown where it fails.
#
# By default everything lives in .venv, made by $(PYTHON) from requirements.txt. `make test PYTHON=python3 VENV=` uses the
# environment that is there instead, installs nothing into it and needs no network: the libraries are built in place.

PYTHON ?= python3
VENV ?= .venv
BENCH ?=
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
LIBRARY ?=
OLDEST_VENV ?= .venv-oldest
NEWEST_VENV ?= .venv-newest

LIBRARY_INPUTS := setup.py tools/cuda_toolkit.py $(shell find csrc -type f)

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

.PHONY: demo test test-ptx bench gpu-check lint setup doctor wheel \
	wheel-test wheel-test-oldest wheel-test-newest cross-compile hub kernel-report kernel-check test-aotinductor clean

# The command that follows, without its output where it succeeds.
QUIETLY := @sh tools/quietly.sh

# What is tested on the CPU starts from as many threads as there are processors, in every worker: none may spin for work.
PYTEST := OMP_WAIT_POLICY=passive $(RUN) -m pytest --durations=15 $(if $(WORKERS),-n $(WORKERS) --dist worksteal)

demo: setup
	@printf 'demo: training for $(MINUTES) minutes\n'
	@$(RUN) examples/train_bytes.py --minutes $(MINUTES) $(if $(TEXT),--text "$(TEXT)")

test: setup
	@printf 'test: pytest, $(or $(WORKERS),1) at a time\n'
	@$(PYTEST) -m 'not ptx and not aotinductor'

# The GPU kernels on this processor, from their PTX, by tools/ptx, and Triton's in its interpreter; what needs nvcc, Triton
# or g++ is skipped without it.
test-ptx: setup
	@printf 'test-ptx: pytest, $(or $(WORKERS),1) at a time\n'
	@$(PYTEST) -m ptx

bench: setup
	@printf 'bench: every benchmark\n'
	@$(RUN) -m benchmarks all $(BENCH)

# Takes $(VENV) where one has been made and otherwise what $(PYTHON) has, installs nothing, and builds by itself, for the
# GPU that is there; NO_BUILD=1 takes the libraries that lie in the tree. PEERS="name=file.py ..." are measured beside it.
gpu-check:
	@printf 'gpu-check: on $(DEVICE), for at most $(BUDGET) s\n'
	@$(if $(wildcard $(RUN)),$(RUN),$(PYTHON)) tools/gpu_check.py --device $(DEVICE) --results $(RESULTS) \
		--budget $(BUDGET) $(if $(NO_BUILD),--no-build) $(PEERS:%=--peer %) $(ONLY:%=--only %)

lint: setup
	@printf 'lint: ruff\n'
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --quiet --check .
	@printf 'lint: mypy\n'
	@$(RUN) -m mypy
	@printf 'lint: clang-format\n'
	@clang-format --dry-run --Werror $(shell find csrc tools -name '*.h' -o -name '*.cpp' -o -name '*.cu')

doctor: setup
	@$(RUN) -m rwkv_kernels

setup: $(STATE)/libraries

ifneq ($(VENV),)
$(REQUIREMENTS): requirements.txt
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(QUIETLY) 'setup: installing requirements.txt into $(VENV)' \
		$(RUN) -m pip install --disable-pip-version-check -r requirements.txt
	@mkdir -p $(STATE) && touch $@

$(STATE)/libraries: $(REQUIREMENTS)
endif

$(STATE)/libraries: $(LIBRARY_INPUTS)
	$(QUIETLY) 'setup: building the libraries' $(RUN) setup.py --quiet build_ext --inplace
	@mkdir -p $(STATE) && touch $@

# The toolkit's version and the architectures that it compiles for. It takes no CUDA torch: any torch has the headers.
TOOLKIT = $(shell PYTHONPATH=tools $(RUN) -c 'import cuda_toolkit as c; \
	t = c.find_toolkit(); print(*((t.version, *t.architectures()) if t else ()))')
CUDA = $(firstword $(TOOLKIT))

# Objects of the in-place build are used again. build/wheel/content is the wheel, unpacked.
wheel: setup
	@rm -rf build/lib.* build/wheel dist
	$(QUIETLY) 'wheel: building, $(if $(CUDA),with CUDA $(CUDA),without CUDA: there is no nvcc)' \
		env RWKV_KERNELS_CUDA=$(if $(CUDA),1,0) PYTHONDONTWRITEBYTECODE= \
		$(RUN) -m build --wheel --no-isolation --outdir build/wheel .
	$(QUIETLY) 'wheel: naming the glibc that it needs' $(RUN) -m auditwheel repair --wheel-dir dist \
		--exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' build/wheel/*.whl
	@printf 'wheel: checking it\n'
	@$(RUN) tools/check_wheel.py $(if $(CUDA),--cuda $(firstword $(subst ., ,$(CUDA)))) dist/*.whl
	@$(RUN) -m zipfile -e dist/*.whl build/wheel/content

# The two do not need each other: `make -j2 -Otarget wheel-test` tests beside both torches at once.
wheel-test: wheel-test-oldest wheel-test-newest

wheel-test-oldest: wheel $(OLDEST_VENV)/made
	@printf 'wheel-test: beside the oldest torch\n'
	@sh tools/test_wheel.sh dist/*.whl $(OLDEST_VENV) $(wordlist 2,99,$(TOOLKIT))

wheel-test-newest: wheel $(NEWEST_VENV)/made
	@printf 'wheel-test: beside the newest torch\n'
	@sh tools/test_wheel.sh dist/*.whl $(NEWEST_VENV) $(wordlist 2,99,$(TOOLKIT))

# Several GB each, where the registry's torch is one for CUDA.
$(OLDEST_VENV)/made: WANTED := torch==2.11.*
$(NEWEST_VENV)/made: WANTED := torch
$(OLDEST_VENV)/made $(NEWEST_VENV)/made:
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(QUIETLY) 'wheel-test: installing $(WANTED) into $(@D)' env -u PYTHONPATH $(@D)/bin/python -m pip install \
		--disable-pip-version-check --no-compile "$(WANTED)" numpy pytest
	@touch $@

# For aarch64, which GH200 and GB200 have; needs Debian's g++-aarch64-linux-gnu.
cross-compile: $(REQUIREMENTS)
	@printf 'cross-compile: host sources for aarch64\n'
	@$(RUN) tools/cross_compile.py aarch64-linux-gnu-g++

# The layout that Hugging Face's kernels loads, in build/hub.
hub: setup
	$(QUIETLY) 'hub: laying out build/hub' $(RUN) tools/hub.py

# LIBRARY=file, a built CUDA library, is read instead of compiling the kernels once more.
kernel-check: CHECK := --check
kernel-report kernel-check: setup
	@printf '$@: CUDA kernels\n'
	@$(RUN) tools/kernel_report.py $(CHECK) $(LIBRARY:%=--library %)
	@printf '$@: Triton kernels\n'
	@$(RUN) tools/triton_report.py $(CHECK)

# A model packaged by AOTInductor, run by a C++ program without Python; compiles both.
test-aotinductor: setup
	@printf 'test-aotinductor: pytest\n'
	@$(RUN) -m pytest -m aotinductor tests/test_aotinductor.py

clean:
	@printf 'clean\n'
	@rm -rf build dist demo *.egg-info rwkv_kernels/*.so $(STATE)/libraries
