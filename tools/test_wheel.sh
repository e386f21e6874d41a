#!/bin/sh
# tools/test_wheel.sh WHEEL VENV [ARCHITECTURE...]: installs the wheel into the environment and tests it there,
# where this tree's own package is on no path. The architectures are those of the wheel's CUDA library, if it has one.
set -eu
wheel=$1 venv=$PWD/$2
shift 2
unset PYTHONPATH
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps "$wheel"
(cd "$venv" && bin/python -m rwkv_kernels)
if [ $# -gt 0 ]; then "$venv/bin/python" tools/check_cuda_build.py "$@" >/dev/null; fi
# Not `python -m pytest`, which puts this folder on the path.
"$venv/bin/pytest" -q -rNfE -p no:cacheprovider tests/test_operator.py tests/test_state.py tests/test_errors.py
