"""ONNX has no operator for the kernels: both exporters' errors give a remedy, and the remedy works."""

import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems import without_gauge
from torch import Tensor

import rwkv_kernels
from rwkv_kernels.nn import RWKV

onnx = pytest.importorskip("onnx", reason="onnx is not installed")


class _Layer(torch.nn.Module):
    def forward(self, w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return rwkv_kernels.wkv(w, u, k, v, return_state=True)


def _dynamo(module: torch.nn.Module, arguments: tuple[Any, ...]) -> Any:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    program = torch.onnx.export(module, arguments, dynamo=True, verbose=False)
    assert program is not None
    return program.model_proto


def _torchscript(module: torch.nn.Module, arguments: tuple[Any, ...]) -> Any:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its deprecation, and of sizes that a trace fixes
        torch.onnx.export(module, arguments, file, dynamo=False)
    return onnx.load_model_from_string(file.getvalue())


@pytest.mark.parametrize("export", [_dynamo, _torchscript], ids=["dynamo", "torchscript"])
def test_onnx_export_says_what_to_do_and_the_reference_does_it(export: Callable[..., Any]) -> None:
    """Takes seconds, because torch.export is tried in several ways before it gives up."""
    layer, inputs = _Layer(), (torch.zeros(4), torch.zeros(4), torch.randn(2, 3, 4), torch.randn(2, 3, 4))
    # The exporter of torch.export raises another error, which quotes this one.
    with pytest.raises(Exception, match=r"ONNX has no operator .*use_backend\('reference'\)"):
        export(layer, inputs)
    with rwkv_kernels.use_backend("reference"):
        model = export(layer, inputs)
    names = [entry.name for entry in model.graph.input]
    graph = pytest.importorskip("onnx.reference").ReferenceEvaluator(model)  # onnx's own, in numpy
    results = graph.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    found = without_gauge(*map(torch.from_numpy, results))
    torch.testing.assert_close(found, without_gauge(*layer(*inputs)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("export", [_dynamo, _torchscript], ids=["dynamo", "torchscript"])
def test_a_model_is_exported_to_onnx_on_the_reference(export: Callable[..., Any]) -> None:
    with rwkv_kernels.use_backend("reference"):
        model = export(RWKV(11, 8, 1).eval(), (torch.randint(11, (2, 3)),))
    onnx.checker.check_model(model)
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
