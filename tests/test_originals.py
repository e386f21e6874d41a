"""The originals' own model files with the line changed as in docs/migrating.md, in TorchScript as by default.

The rwkv package is taken where it is installed, and clones of RWKV-LM and RWKV-infctx-trainer where the environment
variable RWKV_KERNELS_ORIGINALS names their folder.
"""

import gc
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import model_oracle
import pytest
import torch
from problems import assert_tensor_close
from torch import Tensor
from torch.nn import functional as F

from rwkv_kernels.compat import rwkv_pip
from rwkv_kernels.nn import RWKV

V, C, L, T = 23, 32, 3, 9
TOKENS = torch.randint(V, (2, T), generator=torch.Generator().manual_seed(0))

Load = Callable[..., Any]


def _pretend(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Modules that an original imports and that its layers do not need."""
    for name, contents in modules.items():
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=["1", "0"], ids=["scripted", "in Python"])
def load(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Load]:
    """A function of a file and {old text: new text}: the file as a module, changed, with nothing compiled by ninja."""
    settings = {"RWKV_JIT_ON": request.param, "RWKV_CUDA_ON": "0", "RWKV_V7_ON": "0", "RWKV_T_MAX": "1024"}
    settings |= {"RWKV_FLOAT_MODE": "fp32", "RWKV_MY_TESTING": ""}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    _pretend(monkeypatch, {"torch.utils.cpp_extension": {"load": lambda *_, **__: None}})
    # Nothing here makes garbage, and the rwkv package collects it after every tensor of a model.
    monkeypatch.setattr(gc, "collect", lambda: 0)

    def load_changed(file: Path, changes: dict[str, str]) -> Any:
        text = file.read_text()
        for old, new in changes.items():
            assert text.count(old) == 1, f"{file} is not the one that this test knows: {old!r}, {text.count(old)} times"
            text = text.replace(old, new)
        # In a file, because TorchScript reads the sources of functions.
        (tmp_path / "model.py").write_text(text)
        spec = importlib.util.spec_from_file_location("original_model", tmp_path / "model.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32
    yield load_changed
    # The rwkv package sets them for the whole process.
    cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32 = before


def _in_clone(path: str) -> Path:
    folder = os.environ.get("RWKV_KERNELS_ORIGINALS")
    if not folder:
        pytest.skip("RWKV_KERNELS_ORIGINALS names no folder with clones of RWKV-LM and RWKV-infctx-trainer")
    if not (Path(folder) / path).exists():
        pytest.skip(f"RWKV_KERNELS_ORIGINALS: {folder} has no {path}")
    return Path(folder) / path


def _lightning(package: str, tools: str) -> dict[str, dict[str, Any]]:
    return {
        package: {"LightningModule": torch.nn.Module},
        f"{tools}.utilities": {"rank_zero_info": None, "rank_zero_only": None},
        f"{tools}.strategies": {"DeepSpeedStrategy": None},
    }


def _randomise(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))


def _loss(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), TOKENS[:, 1:].flatten())


def _assert_exact(model: torch.nn.Module, logits: Tensor, allowed: float) -> None:
    """Logits and the gradients of their loss equal a float64 computation that shares no code."""
    _loss(logits).backward()
    weights = {name: x.detach().double().requires_grad_() for name, x in model.named_parameters()}
    exact, _ = model_oracle.run(weights, TOKENS)
    _loss(exact).backward()
    assert_tensor_close("logits", logits, exact, allowed)
    for name, parameter in model.named_parameters():
        assert_tensor_close(name, parameter.grad, weights[name].grad, allowed)


# The branch of RWKV_CUDA_ON=1 that calls cuda_wkv, without the compilation and on every device.
CUDA_BRANCH = {
    "    if os.environ[\"RWKV_CUDA_ON\"] == '1':\n        @MyFunction\n": "    if True:\n        @MyFunction\n",
    "cuda_applicable = os.environ[\"RWKV_CUDA_ON\"] == '1' and 'cuda' in str(dev)": "cuda_applicable = True",
}


@pytest.mark.parametrize("changes", [{}, CUDA_BRANCH], ids=["its loop", "cuda_wkv"])
def test_logits_and_states_equal_those_of_the_rwkv_package(changes: dict[str, str], load: Load, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("rwkv")
    if spec is None or spec.origin is None:
        pytest.skip("rwkv is not installed: pip install rwkv==0.8.32")
    package = load(Path(spec.origin).with_name("model.py"), changes)
    package.cuda_wkv = rwkv_pip.cuda_wkv
    model, tokens = RWKV(V, C, L), TOKENS[0].tolist()
    _randomise(model)
    model.save_pretrained(tmp_path / "rwkv.pth")
    theirs = package.RWKV(model=str(tmp_path / "rwkv"), strategy="cpu fp32")
    whole, _ = model(torch.tensor([tokens]))
    logits, state = theirs.forward(tokens[:5], None)
    # Float32 through three layers, by two ways.
    assert_tensor_close("logits", logits, whole[0, 4], 1e-5)
    resumed, _ = model(torch.tensor([tokens[5:]]), rwkv_pip.import_model_state(state))
    assert_tensor_close("here", resumed, whole[:, 5:], 1e-5)
    _, ours = model(torch.tensor([tokens[:5]]))
    logits, _ = theirs.forward(tokens[5:], rwkv_pip.export_model_state(ours))
    assert_tensor_close("there", logits, whole[0, 8], 1e-5)


def test_rwkv_lm_trains_with_run_cuda(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _in_clone("RWKV-LM/RWKV-v4neo/src/model.py")
    _pretend(monkeypatch, _lightning("pytorch_lightning", "pytorch_lightning"))
    definition = "def RUN_CUDA(B, T, C, w, u, k, v):\n    return WKV.apply(B, T, C, w, u, k, v)\n"
    module = load(file, {definition: "from rwkv_kernels.compat.blinkdl import RUN_CUDA\n"})
    sizes = {"vocab_size": V, "n_embd": C, "n_layer": L, "ctx_len": T, "head_qk": 0, "dropout": 0}
    model = module.RWKV(types.SimpleNamespace(**sizes, my_pos_emb=0, pre_ffn=0, grad_cp=0))
    _randomise(model)
    # Float32 through three layers there and back.
    _assert_exact(model, model(TOKENS), 1e-5)


def test_infctx_trains_with_wkv_and_resumes_from_its_states(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _in_clone("RWKV-infctx-trainer/RWKV-v4neo/src/model.py")
    _pretend(monkeypatch, _lightning("lightning", "lightning.pytorch"))
    _pretend(monkeypatch, {"deepspeed": {}, "deepspeed.runtime": {}, "deepspeed.runtime.lr_schedules": {}})
    _pretend(monkeypatch, {"deepspeed.ops.adam": {"DeepSpeedCPUAdam": None, "FusedAdam": None}})
    changes = {"torch.ops.rwkv.wkv(": "wkv(", "import wandb\n": "from rwkv_kernels.compat.infctx import wkv\n"}
    module = load(file, changes)
    # Not a file to load from, but the name by which the original makes a new model.
    new = ".//<#|=@%!$init_model$!%@=|#>//."
    model = module.RWKV(new, n_embd=C, n_layer=L, vocab_size=V, ctx_len=T, grad_cp=False)
    _randomise(model)
    for block in model.blocks:
        block.att.time_first.data = block.att.time_first.bfloat16()
    logits, *_ = model(TOKENS)
    first, *states = model(TOKENS[:, :4])
    second, *_ = model(TOKENS[:, 4:], *states)
    # The original rounds keys and values to bfloat16, and so are the outputs.
    allowed = 4 * torch.finfo(torch.bfloat16).eps
    assert_tensor_close("in two parts", torch.cat((first, second), 1), logits, allowed)
    _assert_exact(model, torch.cat((first, second), 1), allowed)
