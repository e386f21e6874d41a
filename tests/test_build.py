"""The search for the CUDA toolkit, the choice to build CUDA kernels, counts of machine code, and the stub file."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_toolkit
import pytest
import sanitized
import sass

NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
  *--list-gpu-arch*) printf 'compute_75\\ncompute_80\\ncompute_90\\ncompute_100\\n' ;;
  *--dryrun*) echo '#$ TOP={home}/bin/..' >&2 ;;
esac
"""


def _script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toolkit that is on the PATH by a wrapper script only."""
    home = tmp_path / "toolkit"
    _script(home / "bin" / "nvcc", NVCC.replace("{home}", str(home)))
    _script(tmp_path / "wrapper" / "bin" / "nvcc", f'#!/bin/sh\nexec {home}/bin/nvcc "$@"\n')
    (home / "include").mkdir()
    (home / "include" / "cuda_runtime.h").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}/wrapper/bin:{os.environ['PATH']}")
    for name in ("CUDA_HOME", "CUDA_PATH", "RWKV_KERNELS_CUDA", "TORCH_CUDA_ARCH_LIST"):
        monkeypatch.delenv(name, raising=False)
    return home


def test_the_toolkit_is_found_behind_a_wrapper(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = cuda_toolkit.find_toolkit()
    assert toolkit is not None and (toolkit.home, toolkit.version) == (home, "13.0")
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert cuda_toolkit.find_toolkit() == cuda_toolkit.Toolkit(home, home / "bin" / "nvcc", "13.0")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, ["7.5", "8.0", "9.0", "10.0+PTX"]),
        ("9.0", ["9.0"]),
        ("8.0 9.0a+PTX", ["8.0", "9.0+PTX"]),
        ("8.6;12.0;", ["8.6", "12.0"]),
    ],
)
def test_the_architectures_are_those_requested_or_all_that_nvcc_knows(
    asked: str | None, expected: list[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    toolkit = cuda_toolkit.find_toolkit()
    assert toolkit is not None and toolkit.architectures() == expected
    flags = cuda_toolkit.nvcc_flags(expected)
    assert ("-gencode=arch=compute_90,code=sm_90" in flags) == any(item.startswith("9.0") for item in expected)
    assert ("-gencode=arch=compute_90,code=compute_90" in flags) == ("9.0+PTX" in expected)


@pytest.mark.parametrize(("version", "compressed"), [("12.9", False), ("13.0", True)])
def test_code_is_compressed_where_every_driver_reads_that(version: str, compressed: bool) -> None:
    toolkit = cuda_toolkit.Toolkit(Path(), Path(), version)
    assert ("--compress-mode=size" in toolkit.library_flags(["9.0"])) == compressed


def test_an_architecture_that_is_no_number_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(SystemExit, match="TORCH_CUDA_ARCH_LIST: expected numbers .* got 'Hopper'"):
        cuda_toolkit.to_build_with("13.0")


@pytest.mark.parametrize(
    ("torch_cuda", "reason"),
    [
        (None, "this torch is built without CUDA"),
        ("12.8", "torch is built with CUDA 12.8, and the toolkit in .*toolkit is 13.0"),
        ("13.2", None),
    ],
)
def test_cuda_is_built_for_a_torch_that_can_run_it_or_where_it_is_insisted_on(
    torch_cuda: str | None,
    reason: str | None,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (cuda_toolkit.to_build_with(torch_cuda) is None) == (reason is not None)
    assert re.search(f"^CUDA kernels: {f'none: {reason}' if reason else 'for 7.5'}", capsys.readouterr().err)
    monkeypatch.setenv("RWKV_KERNELS_CUDA", "1")
    assert cuda_toolkit.to_build_with(torch_cuda) is not None
    monkeypatch.setenv("RWKV_KERNELS_CUDA", "0")
    assert cuda_toolkit.to_build_with(torch_cuda) is None


def test_modules_of_an_earlier_build_stay_out(tmp_path: Path) -> None:
    stale = tmp_path / "rwkv_kernels" / "gone.py"
    stale.parent.mkdir()
    stale.touch()
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "RWKV_KERNELS_CUDA": "0"}, check=True, capture_output=True)
    assert not stale.exists() and (stale.parent / "functional.py").exists()


def test_insisting_without_a_toolkit_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_toolkit, "find_toolkit", lambda: None)
    monkeypatch.setenv("RWKV_KERNELS_CUDA", "1")
    with pytest.raises(SystemExit, match="RWKV_KERNELS_CUDA=1, but there is no CUDA toolkit: nvcc is neither"):
        cuda_toolkit.to_build_with("13.0")


def test_the_program_for_the_sanitizer_compiles_and_says_that_it_needs_a_gpu(tmp_path: Path) -> None:
    """Linked with a stand-in for the kernels, whose own compilation takes a minute and is that of every CUDA build."""
    if cuda_toolkit.find_toolkit() is None:
        pytest.skip("there is no nvcc")
    kernels = tmp_path / "kernels.cpp"
    kernels.write_text(
        '#include "cuda/kernels.h"\n'
        "wkv::DeviceLimits wkv::device_limits(int) { return {}; }\n"
        "cudaError_t wkv::launch(const Launch&, cudaStream_t) { return cudaSuccess; }\n"
    )
    program = tmp_path / "program"
    sanitized.build(program, ["7.5", "9.0"], kernels)
    if shutil.which("nvidia-smi") is None:
        result = subprocess.run([program], capture_output=True, text=True)
        assert result.returncode == 2 and "no CUDA device" in result.stderr


LISTING = """
//--------------------- .text._kernel --------------------------
        /*0000*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        /*0010*/               @P1 LDG.E.U16 R3, desc[UR4][R2.64] ;
.L_x_0:
        /*0020*/                   MUFU.EX2 R5, R4 ;
        /*0030*/                   STS.64 [R1], R5 ;
        /*0040*/              @!P1 BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
        /*0060*/                   NOP ;
"""


def test_machine_code_is_counted() -> None:
    ((name, code),) = sass.kernels(LISTING)
    assert name == "_kernel" and code.instructions == 6 and code.mufu == 1
    assert code.accesses == {("LDGSTS", 16): 1, ("LDG", 2): 1, ("STS", 8): 1}


def test_innermost_loops_are_found() -> None:
    (loop,) = sass.innermost_loops(LISTING)
    assert loop.names == ["MUFU.EX2", "STS.64", "BRA"]
    outer = LISTING.replace("        /*0050*/", "        /*0048*/                   BRA `(.L_x_0) ;\n        /*0050*/")
    assert [loop.names for loop in sass.innermost_loops(outer)] == [loop.names]


def test_the_report_is_of_launches_that_each_architecture_can_hold() -> None:
    pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")
    import kernel_report

    assert tuple(kernel_report.DEVICES) == cuda_toolkit.ARCHITECTURES
    for architecture, device in kernel_report.DEVICES.items():
        for kernel, block in kernel_report.blocks(architecture).items():
            least = kernel_report.LEAST_BLOCKS.get(kernel, {}).get(architecture, 1)
            # With the registers that a compiler may give to a thread under this bound of blocks.
            warps = -(-least * block.threads // 32 // 4) * 4  # each of four schedulers has a register file
            registers = min(255, 65536 // (32 * warps) // 8 * 8)
            fit = device.blocks_that_fit(block.threads, registers, block.shared_bytes)
            assert fit >= least, (architecture, kernel, block)


def test_a_kernel_that_is_not_as_it_shall_be_is_complained_of() -> None:
    pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")
    import kernel_report
    from kernel_report import CODE_LIMITS, LIMITED, Kernel

    launched = kernel_report.blocks(LIMITED)
    good = [Kernel(*key, 32, 0, sass.Code(["FADD"])) for key in launched]
    assert not list(kernel_report.complaints({LIMITED: good}))

    def complaint(changed: Kernel | None) -> str:
        others = [kernel for kernel in good if (kernel.name, kernel.dtype) != ("backward", "float32")]
        (found,) = kernel_report.complaints({LIMITED: [*others, changed] if changed else others})
        return found

    name = "backward float32 for 9.0"
    kernel = Kernel("backward", "float32", 32, 0, sass.Code(["FADD"]))
    assert complaint(replace(kernel, stack_bytes=8)) == f"{name}: a stack frame of 8 bytes"
    assert complaint(replace(kernel, registers=176)) == f"{name}: 176 registers leave room for 2 blocks, fewer than 3"
    assert complaint(None) == f"{name}: launched and not compiled"
    elements = launched["backward", "float32"].elements
    assert elements == 32
    instructions, _ = CODE_LIMITS["backward", "float32"]
    long = sass.Code(["FADD"] * (elements * instructions + elements))
    assert complaint(replace(kernel, code=long)).startswith(f"{name}: {instructions + 1}.0 instructions per element")
    special = sass.Code(["MUFU.EX2"] * (elements * 3))
    assert complaint(replace(kernel, code=special)).startswith(
        f"{name}: 3.0 MUFU per element of a full tile, more than"
    )


@pytest.mark.parametrize(
    ("mangled", "expected"),
    [
        ("_ZN3wkv52_GLOBAL__N__0_10_kernels_cu_011wkv_kernelINS_7ForwardIfEEEEvNT_6ParamsE", ("forward", "float32")),
        ("_ZN3wkv11wkv_kernelINS_8BackwardINS_8Bfloat16EEEEEvNT_6ParamsE", ("backward", "bfloat16")),
        ("_ZN3wkv11wkv_kernelINS_6ReduceIdEEEEvNT_6ParamsE", ("reduce", "float64")),
        ("_ZN3wkv11wkv_kernelINS_4StepINS_4HalfEEEEEvNT_6ParamsE", ("step", "float16")),
    ],
)
def test_kernels_are_known_by_their_mangled_names(mangled: str, expected: tuple[str, str]) -> None:
    pytest.importorskip("rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built")
    import kernel_report

    assert kernel_report.identity(mangled) == expected
    with pytest.raises(SystemExit, match="which kernel is"):
        kernel_report.identity("_ZN3wkv5otherEv")


ROOT = Path(__file__).parent.parent
STUB = ROOT / "rwkv_kernels" / "_introspection.pyi"


def test_the_stub_fits_the_module() -> None:
    _introspection: Any = pytest.importorskip(
        "rwkv_kernels._introspection", reason="rwkv_kernels._introspection is not built"
    )
    tree = ast.parse(STUB.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    keys = {
        node.name: [item.target.id for item in node.body if isinstance(item, ast.AnnAssign)]  # type: ignore[attr-defined]
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }

    assert set(functions) == {name for name in dir(_introspection) if not name.startswith("_")}
    for name, function in functions.items():
        parameters = re.findall(r"[(,] ?(\**\w+)", _introspection.__dict__[name].__doc__.split(" -> ")[0])
        assert parameters == [argument.arg for argument in function.args.args], name

    limits = dict.fromkeys(keys["DeviceLimits"], 200_000)
    problem = ("forward", "float32", 2, 100, 64)
    assert list(_introspection.plan_cpu("float32", 2, 100, 64, 2)) == keys["CpuPlan"]
    assert list(_introspection.plan_cuda(*problem, limits)) == keys["CudaPlan"]
    for key in limits:
        with pytest.raises(KeyError, match=key):
            _introspection.plan_cuda(*problem, {name: limit for name, limit in limits.items() if name != key})
