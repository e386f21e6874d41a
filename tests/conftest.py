"""Fixtures that every test may use, and the closing line that says which backends ran."""

import collections

import pytest
import torch

import rwkv_kernels

_calls_by_backend: collections.Counter[str] = collections.Counter()


NAMES = [info.name for info in rwkv_kernels.backends()]


def _name_if_available(name: str) -> str:
    info = next(info for info in rwkv_kernels.backends() if info.name == name)
    if not info.available:
        pytest.skip(f"backend {name}: {info.reason}")
    _calls_by_backend[name] += 1
    return name


@pytest.fixture(params=NAMES)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend in turn; one that this machine lacks is a skip with its reason."""
    return _name_if_available(request.param)


@pytest.fixture(params=[name for name in NAMES if name != "reference"])
def compiled_backend(request: pytest.FixtureRequest) -> str:
    """Every backend with an operator of its own, as against the oracle in plain torch."""
    return _name_if_available(request.param)


@pytest.fixture(autouse=True)
def poisoned_memory() -> collections.abc.Iterator[None]:
    """New tensors start as NaN, so that an element that nothing wrote is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, available, reason in rwkv_kernels.backends():
        ran = f"{_calls_by_backend[name]} tests" if available else f"not available: {reason}"
        terminalreporter.write_line(f"backend {name}: {ran}")
    build = rwkv_kernels.build_info()
    terminalreporter.write_line(f"cpu kernels: {build.cpu_instruction_set} of {', '.join(build.cpu_instruction_sets)}")
