"""The CPU kernels: every instruction set, any number of threads, and the plan that splits the work."""

import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from problems import Problem, assert_close, checkpoint_interval, make, oracle, solve

import rwkv_kernels

_introspection = pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")

ROOT = Path(__file__).parent.parent

# torch's names of the instruction sets, in its environment variable and to the user.
CAPABILITIES = {"baseline": "default", "avx2": "avx2", "avx512": "avx512"}


def _target(instruction_set: str) -> set[str]:
    """The features that its kernels are compiled for, from the source's target pragma."""
    source = (ROOT / "csrc" / "cpu" / f"isa_{instruction_set}.cpp").read_text()
    found = re.findall(r'target\("(.+?)"\)', source)
    assert len(set(found)) <= 1, "the targets of GCC and Clang differ"
    return set(",".join(found[:1]).split(",")) - {""}


def _in_use(largest: str) -> str:
    """The largest instruction set that is built, allowed and, by /proc/cpuinfo, present."""
    there = set(
        re.findall(r"\w+", "".join(re.findall(r"^flags.*", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[:1]))
    )
    names = list(CAPABILITIES)
    can_be = [name for name in names[: names.index(largest) + 1] if _target(name) <= there]
    return next(name for name in reversed(can_be) if name in rwkv_kernels.build_info().cpu_instruction_sets)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("instruction_set", ["avx2", "avx512"])
def test_every_compiled_feature_is_checked_on_the_processor(instruction_set: str) -> None:
    source = (ROOT / "csrc" / "cpu" / "isa.cpp").read_text()
    (body, *_) = re.findall(rf"bool runs_{instruction_set}\(\) {{(.*?)}}", source, re.DOTALL)
    checked = {*re.findall(r'__builtin_cpu_supports\("(\w+)"\)', body), *re.findall(r"processor_has_(\w+)", body)}
    assert checked == _target(instruction_set)


@pytest.mark.parametrize("instruction_set", CAPABILITIES)
def test_every_instruction_set_passes_the_same_tests(instruction_set: str) -> None:
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": CAPABILITIES[instruction_set]}
    # The doctor compares outputs and gradients with the oracle for any instruction set in use.
    doctor = subprocess.run([sys.executable, "-m", "rwkv_kernels"], env=environment, capture_output=True, text=True)
    assert doctor.returncode == 0, doctor.stdout + doctor.stderr
    used = re.findall(r"^cpu kernels +(\w+) in use of", doctor.stdout, re.MULTILINE)
    if Path("/proc/cpuinfo").exists():
        assert used == [_in_use(instruction_set)]
    if used != [instruction_set]:
        pytest.skip(f"this processor or build has no {instruction_set}: on request it uses {used[0]} and is correct")
    if instruction_set == rwkv_kernels.build_info().cpu_instruction_set:
        return  # the suite itself runs on it
    files = ["tests/test_operator.py", "tests/test_special_values.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *files, "-k", "cpu and not float64 and not extremes"],
        env=environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert f"cpu kernels: {instruction_set} of" in result.stdout


@pytest.mark.parametrize(("B", "C"), [(4, 64), (1, 1024), (3, 200)])
def test_results_do_not_depend_on_the_number_of_threads(B: int, C: int, threads: None) -> None:
    tensors = make(Problem(B=B, T=600, C=C, with_state=True), torch.bfloat16)
    torch.set_num_threads(1)
    expected = solve(tensors, "cpu")
    for count in (2, 3, 4):
        torch.set_num_threads(count)
        assert _introspection.plan_cpu("bfloat16", B, 600, C, count)["chunks"] == 1
        for name, value in solve(tensors, "cpu").items():
            assert torch.equal(value, expected[name]), (count, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("log_decay", [-1e-4, None, -30.0])
def test_a_split_over_time_equals_the_oracle(dtype: torch.dtype, log_decay: float | None, threads: None) -> None:
    T, C = 1700, 50
    tensors = make(Problem(B=1, T=T, C=C, log_decay=log_decay, with_state=True), dtype)
    torch.set_num_threads(4)
    assert _introspection.plan_cpu(str(dtype).removeprefix("torch."), 1, T, C, 4)["chunks"] > 2
    found = solve(tensors, "cpu")
    assert_close(found, oracle(tensors), tensors)
    for name, value in solve(tensors, "cpu").items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [5, 40])
def test_keys_whose_level_moves_leave_and_enter_every_scale(
    steps: int, dtype: torch.dtype, count: int, threads: None
) -> None:
    """By less and by more than a scale spans, after a few steps or many, while decays forget at once or nothing."""
    x = make(Problem(B=1, T=1100, C=70, with_state=True), dtype)
    levels = torch.tensor([0, -40, -80, -50, 3, 12, -30, -58, -100, -20, 7, 70, 30, 0, -64]).repeat(20)
    x.k += levels.repeat_interleave(steps)[:1100, None].to(dtype)
    x.w.copy_(torch.linspace(-12, 3, 70))
    torch.set_num_threads(count)
    assert_close(solve(x, "cpu"), oracle(x), x)
    _, state = rwkv_kernels.wkv(*x.inputs, return_state=True, backend="cpu")
    assert state[:, 1].min() >= 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_checkpoints_are_the_states_after_each_interval_and_after_all_steps(dtype: torch.dtype) -> None:
    T, interval = 300, checkpoint_interval(dtype)
    x = make(Problem(B=2, T=T, C=70, with_state=True), dtype)
    forward = torch.ops.rwkv_kernels.wkv_forward
    checkpoints = forward(*x.inputs, True)[2]
    ends = [*range(interval, T, interval), T]
    assert checkpoints.shape[1] == len(ends)
    for i, end in enumerate(ends):
        state = forward(x.w, x.u, x.k[:, :end], x.v[:, :end], x.state, False)[1]
        if end == T:
            assert torch.equal(checkpoints[:, i], state)
        # The others have the kernel's own max. From there to the max of a final state, both sums are rounded twice; the
        # sum of max and log(den) is rounded here, in float64.
        (num, den, max_), (final_num, final_den, final_max) = checkpoints[:, i].unbind(1), state.unbind(1)
        eps = torch.finfo(state.dtype).eps
        torch.testing.assert_close(num / den, final_num / final_den, rtol=4 * eps, atol=0)
        logits = max_.double() + den.double().log(), final_max.double() + final_den.double().log()
        torch.testing.assert_close(*logits, rtol=0, atol=4 * (eps + torch.finfo(torch.float64).eps * float(max_.max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_a_page_apart_change_no_bit(dtype: torch.dtype) -> None:
    """The kernels copy such keys; as views of wider rows they are read where they lie."""
    C = 4096 // dtype.itemsize
    w, u = torch.linspace(-2, 1, C), torch.linspace(-1, 1, C)
    k, v = torch.randn(2, 1, 70, C + 16, generator=torch.Generator().manual_seed(0)).to(dtype)[..., :C]
    found = []
    for inputs in ((w, u, k, v), (w, u, k.contiguous(), v.contiguous())):
        leaves = [x.detach().requires_grad_() for x in inputs]
        y = rwkv_kernels.wkv(*leaves, backend="cpu")
        found.append((y, *torch.autograd.grad(y, leaves, y)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_the_plan_covers_every_element_once(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(100):
        dtype = draw.choice(["float32", "float16", "bfloat16", "float64"])
        B, T, C = draw.choice([1, 2, 7, 64]), int(10 ** draw.uniform(0, 6)), int(10 ** draw.uniform(0, 4))
        threads = draw.choice([1, 2, 3, 8, 64, 192])
        plan = _introspection.plan_cpu(dtype, B, T, C, threads)
        interval = checkpoint_interval(dtype)
        assert plan["column_channels"] % 64 == 0 and plan["chunk_steps"] % interval == 0
        assert (plan["columns"] - 1) * plan["column_channels"] < C <= plan["columns"] * plan["column_channels"]
        assert (plan["chunks"] - 1) * plan["chunk_steps"] < T <= plan["chunks"] * plan["chunk_steps"]
        if plan["chunks"] > 1:
            assert threads > B * -(-C // 64), "split over time although the channels keep the threads busy"


@pytest.mark.parametrize(
    ("B", "T", "C", "threads", "idle"), [(8, 1024, 768, 2, 0.0), (1, 16384, 768, 2, 0.0), (3, 512, 768, 2, 0.1)]
)
def test_the_plan_keeps_threads_busy(B: int, T: int, C: int, threads: int, idle: float) -> None:
    plan = _introspection.plan_cpu("float32", B, T, C, threads)
    units = B * plan["columns"] * plan["chunks"]
    assert units / (-(-units // threads) * threads) >= 1 - idle


def test_plan_refuses_an_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="dtype: expected float32.*got int8"):
        _introspection.plan_cpu("int8", 1, 1, 1, 1)
