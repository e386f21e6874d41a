"""Checkpoints in every published format, read and written; and refused files."""

import json
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import model_oracle
import models
import pytest
import torch
import transformers_models
from problems import assert_tensor_close
from torch import Tensor

from rwkv_kernels.nn import RWKV, RWKVState, checkpoints, files

V, C, L, HIDDEN = transformers_models.V, transformers_models.C, transformers_models.L, transformers_models.HIDDEN
# Float64 through three layers, by two ways.
CLOSE = 1e-11


def _model(dtype: torch.dtype = torch.float64) -> RWKV:
    return models.rwkv(dtype, hidden=HIDDEN)


def _assert_same(found: RWKV, expected: RWKV) -> None:
    tensors, exact = found.state_dict(), expected.state_dict()
    assert list(tensors) == list(exact)
    for name, x in exact.items():
        assert tensors[name].dtype == x.dtype and torch.equal(tensors[name], x), name
    assert all(parameter.requires_grad for parameter in found.parameters())


# ---- round trips ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["rwkv.pth", "rwkv.safetensors", "folder"])
def test_what_is_saved_is_loaded(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if name != "rwkv.pth":
        pytest.importorskip("safetensors")
    model = _model(dtype)
    model.save_pretrained(tmp_path / name)
    _assert_same(RWKV.from_pretrained(str(tmp_path / name)), model)


def test_a_file_of_rwkv_lm_is_loaded_as_it_is(tmp_path: Path) -> None:
    """As its trainer writes it: a plain dictionary of bfloat16 tensors, some of them views."""
    model = _model(torch.bfloat16)
    whole = torch.zeros(2, C, dtype=torch.bfloat16)
    tensors = dict(model.state_dict()) | {"blocks.1.att.time_first": whole[1]}
    torch.save(tensors, tmp_path / "rwkv-init.pth")
    loaded = RWKV.from_pretrained(tmp_path / "rwkv-init.pth")
    model.load_state_dict(tensors)
    _assert_same(loaded, model)


# ---- transformers ----


def _saved_by_transformers(folder: Path, model: Any, layout: str) -> None:
    transformers = pytest.importorskip("transformers")
    if layout == "safetensors":
        model.save_pretrained(folder)
    elif layout == "sharded":
        model.save_pretrained(folder, max_shard_size="4KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 2
    else:
        assert transformers
        model.config.save_pretrained(folder)
        tensors = model.state_dict()
        if layout == "bin":
            torch.save(tensors, folder / "pytorch_model.bin")
            return
        names = sorted(tensors)
        places = {name: f"pytorch_model-0000{i % 2 + 1}-of-00002.bin" for i, name in enumerate(names)}
        for place in set(places.values()):
            torch.save({name: tensors[name] for name in names if places[name] == place}, folder / place)
        index = {"metadata": {}, "weight_map": places}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "sharded_bin"])
@pytest.mark.parametrize("rescale_every", [0, 2])
def test_logits_equal_those_of_transformers_on_the_same_weights(
    layout: str, rescale_every: int, tmp_path: Path
) -> None:
    theirs, tokens = transformers_models.make(rescale_every=rescale_every), transformers_models.tokens(3, 11)
    _saved_by_transformers(tmp_path, theirs, layout)
    model = RWKV.from_pretrained(tmp_path)
    logits, _ = model(tokens)
    with torch.no_grad():
        # transformers' loop rounds keys to float32; in train mode it does not rescale.
        assert_tensor_close("train mode", logits, theirs.train()(tokens).logits, 1e-5)
        # Rescaled layers differ from the others only in the epsilon of their layer norms.
        assert_tensor_close("eval mode", logits, theirs.eval()(tokens).logits, 1e-5 if rescale_every == 0 else 1e-3)
    exact, _ = model_oracle.run({name: x.double() for name, x in model.state_dict().items()}, tokens)
    assert_tensor_close("exact", logits, exact, CLOSE)


@pytest.mark.parametrize("rescale_every", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_layers_that_transformers_rescaled_are_restored(dtype: torch.dtype, rescale_every: int, tmp_path: Path) -> None:
    theirs, tokens = transformers_models.make(dtype, rescale_every=rescale_every), transformers_models.tokens(1, 5)
    _saved_by_transformers(tmp_path / "before", theirs, "safetensors")
    with torch.no_grad():
        theirs.eval()(tokens)
    assert theirs.rwkv.layers_are_rescaled
    _saved_by_transformers(tmp_path / "after", theirs, "safetensors")
    expected = RWKV.from_pretrained(tmp_path / "before")
    # Halving and doubling are exact.
    _assert_same(RWKV.from_pretrained(tmp_path / "after", rescaled=True), expected)
    rescaled = RWKV.from_pretrained(tmp_path / "after").state_dict()
    changed = {name for name, x in expected.state_dict().items() if not torch.equal(rescaled[name], x)}
    assert changed == ({"blocks.2.att.output.weight", "blocks.2.ffn.value.weight"} if rescale_every else set())


def _warnings_of(path: Path, **settings: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RWKV.from_pretrained(path, **settings)
    return [str(warning.message) for warning in caught if "rescaled" in str(warning.message)]


@pytest.mark.parametrize(("layers", "every"), [(3, 2), (12, 6), (24, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_folder_that_transformers_rescaled_warns(dtype: torch.dtype, layers: int, every: int, tmp_path: Path) -> None:
    theirs = transformers_models.make(dtype, rescale_every=every, num_hidden_layers=layers)
    draw = torch.Generator().manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if ".value.weight" in name or ".output.weight" in name:
            # No two trained layers have the same norm, and norms grow with depth.
            depth = int(name.split(".")[2]) / layers
            parameter.data.mul_(float(2 ** (depth + 0.15 * torch.randn(1, generator=draw))))
    _saved_by_transformers(tmp_path / "before", theirs, "safetensors")
    assert _warnings_of(tmp_path / "before") == []
    theirs.eval()
    theirs.rwkv._rescale_layers()
    assert theirs.rwkv.layers_are_rescaled
    for layout in ("safetensors", "sharded", "bin"):
        _saved_by_transformers(tmp_path / layout, theirs, layout)
        found = _warnings_of(tmp_path / layout)
        assert len(found) == 1
        assert f"halve every {every} layers" in found[0] and "from_pretrained(..., rescaled=True)" in found[0]
        assert _warnings_of(tmp_path / layout, rescaled=True) == []


def test_no_other_folder_warns_of_rescaling(tmp_path: Path) -> None:
    layers = 12
    torch.manual_seed(0)
    fresh = RWKV(V, C, layers, HIDDEN)
    trained = [RWKV(V, C, layers, HIDDEN) for _ in range(5)]
    for model in trained:
        for name, parameter in model.named_parameters():
            # Of any size from layer to layer, or all matrices of a layer together, or falling steadily.
            parameter.data.normal_().mul_(float(2 ** (0.3 * torch.randn(()))))
            if name.startswith("blocks."):
                layer = int(name.split(".")[1])
                parameter.data.mul_(
                    (1, 2 ** -(layer / 3), 2 ** -(layer // 6), 2**-layer, 2 ** (layer / 6))[trained.index(model)]
                )
    zero, constant = RWKV(V, C, layers, HIDDEN), RWKV(V, C, layers, HIDDEN)
    for parameter in zero.parameters():
        parameter.data.zero_()
    for parameter in constant.parameters():
        parameter.data.fill_(0.5)
    for i, model in enumerate([fresh, *trained, zero, constant, RWKV(V, C, 1), RWKV(V, C, 6)]):
        model.save_pretrained(tmp_path / f"{i}")
        assert _warnings_of(tmp_path / f"{i}") == [], i
    theirs = transformers_models.make(torch.float32, rescale_every=0, num_hidden_layers=layers)
    _saved_by_transformers(tmp_path / "never", theirs.eval(), "safetensors")
    assert _warnings_of(tmp_path / "never") == []


def test_transformers_loads_what_is_saved_for_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, tokens = _model(torch.float32), transformers_models.tokens(3, 11)
    model.save_pretrained(tmp_path / "folder")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder", output_loading_info=True)
    assert type(theirs).__name__ == "RwkvForCausalLM" and theirs.dtype == torch.float32
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.config.intermediate_size == HIDDEN
    with torch.no_grad():
        assert_tensor_close("logits", theirs.train()(tokens).logits, model(tokens)[0], 1e-5)


def test_tied_embeddings_become_two_matrices(tmp_path: Path) -> None:
    theirs, tokens = transformers_models.make(tie_word_embeddings=True), transformers_models.tokens(2, 6)
    _saved_by_transformers(tmp_path, theirs, "safetensors")
    model = RWKV.from_pretrained(tmp_path)
    assert torch.equal(model.head.weight, model.emb.weight)
    assert model.head.weight.data_ptr() != model.emb.weight.data_ptr()
    with torch.no_grad():
        assert_tensor_close("logits", model(tokens)[0], theirs.train()(tokens).logits, 1e-5)


@pytest.mark.parametrize("name", ["rwkv.pth", "rwkv.pt", "rwkv.safetensors", "folder"])
def test_a_model_of_tied_embeddings_is_saved_and_loaded_as_one_of_two_matrices(name: str, tmp_path: Path) -> None:
    if "rwkv.p" not in name:
        pytest.importorskip("safetensors")
    model = _model()
    model.head.weight = model.emb.weight
    model.save_pretrained(tmp_path / name)
    for loaded in (RWKV.from_pretrained(tmp_path / name), RWKV.from_state_dict(model.state_dict())):
        _assert_same(loaded, model)
        _assert_apart(loaded)
    assert model.head.weight is model.emb.weight
    RWKV.from_pretrained(tmp_path / name).save_pretrained(tmp_path / "again.pth")


def _assert_apart(model: RWKV) -> None:
    """Writing to one parameter changes no other."""
    expected = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(7)
            expected[name].fill_(7)
            for other, x in model.state_dict().items():
                assert torch.equal(x, expected[other]), (name, other)


@pytest.mark.parametrize("name", ["rwkv.pth", "rwkv.pt", "rwkv.bin", "folder"])
def test_entries_that_share_memory_in_a_file_are_loaded_apart(name: str, tmp_path: Path) -> None:
    tensors, whole = dict(_model().state_dict()), torch.randn(V * C + 5 * C, dtype=torch.float64)
    tensors["head.weight"] = tensors["emb.weight"]  # the same
    tensors["blocks.0.att.key.weight"] = whole[: C * C].view(C, C)
    tensors["blocks.0.att.value.weight"] = whole[: C * C].view(C, C).T
    tensors["blocks.1.att.key.weight"] = whole[3 * C : 3 * C + C * C].view(C, C)  # a part of it
    tensors["blocks.0.ln1.bias"] = whole[:1].expand(C)  # with itself
    expected = {entry: x.clone() for entry, x in tensors.items()}
    path = tmp_path / name
    if name == "folder":
        _model().save_pretrained(path)
        (path / "model.safetensors").unlink()
        torch.save({checkpoints.to_transformers(entry): x for entry, x in tensors.items()}, path / "pytorch_model.bin")
    else:
        torch.save(tensors, path)
    model = RWKV.from_pretrained(path)
    for entry, x in model.state_dict().items():
        assert torch.equal(x, expected[entry]), entry
    _assert_apart(model)


def test_a_part_of_a_tensor_is_saved_without_the_rest(tmp_path: Path) -> None:
    whole = torch.zeros(100, 1000)
    files.write(tmp_path / "part.pth", {"part": whole[0]})
    assert (tmp_path / "part.pth").stat().st_size < 10_000
    _, state = _model()(torch.zeros(1, 2, dtype=torch.int64))
    torch.save({"att_shift": state.wkv[:, :, 0], "ffn_shift": state.wkv[:, :, 1], "wkv": state.wkv}, tmp_path / "s")
    loaded = RWKVState.load(tmp_path / "s")
    loaded.att_shift.fill_(7)
    assert torch.equal(loaded.wkv, state.wkv)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_single_file_with_the_names_of_transformers_is_recognised(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    theirs = transformers_models.make(torch.float32)
    files.write(tmp_path / f"model{suffix}", theirs.state_dict())
    model = RWKV.from_pretrained(tmp_path / f"model{suffix}")
    expected = {transformers_models.rwkv_lm_name(name): x for name, x in theirs.state_dict().items()}
    assert {name: x.tolist() for name, x in model.state_dict().items()} == {k: x.tolist() for k, x in expected.items()}


def test_nothing_but_torch_is_needed_for_rwkv_lms_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    for name in ("safetensors", "safetensors.torch", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    model.save_pretrained(tmp_path / "rwkv.pth")
    _assert_same(RWKV.from_pretrained(tmp_path / "rwkv.pth"), model)
    for name in ("rwkv.safetensors", "folder"):
        with pytest.raises(ImportError, match=r"pip install 'rwkv_kernels\[safetensors\]'"):
            model.save_pretrained(tmp_path / name)


# ---- refused files ----


class _Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("container", ["torch", "pickle", "folder", "state"])
def test_a_file_with_code_is_refused_and_nothing_of_it_runs(
    container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # torch's switch to trust files has no effect here.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, ran = tmp_path / "rwkv.pth", tmp_path / "ran"
    content = dict(_model().state_dict()) | {"emb.weight": _Malicious(ran)}
    if container == "folder":
        (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
        path = tmp_path / "pytorch_model.bin"
    if container == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="more than tensors, which is refused because reading it could execute code"):
        (RWKVState.load if container == "state" else RWKV.from_pretrained)(tmp_path if container == "folder" else path)
    assert not ran.exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.5, 0.99])
def test_a_truncated_file_is_refused(suffix: str, part: float, tmp_path: Path) -> None:
    path = tmp_path / f"rwkv{suffix}"
    _model().save_pretrained(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=rf"rwkv{re.escape(suffix)}: broken"):
        RWKV.from_pretrained(path)


def _changed(changes: dict[str, Tensor | None]) -> dict[str, Tensor]:
    tensors = dict(_model().state_dict()) | changes
    return {name: x for name, x in tensors.items() if x is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (_changed({"blocks.0.att.ln_x.weight": torch.ones(C)}), r"expected .* RWKV-4, got one of RWKV-5 \(it has"),
        (_changed({"blocks.0.att.time_maa_k": torch.ones(C)}), r"got one of RWKV-6 \(it has blocks.0.att.time_maa_k"),
        (_changed({"blocks.0.att.x_r": torch.ones(C), "blocks.0.att.ln_x.weight": torch.ones(C)}), "got one of RWKV-7"),
        (_changed({"blocks.1.att.time_first": None}), r"of 3 layers: missing blocks.1.att.time_first \[16\]$"),
        (_changed({"blocks.3.ln1.bias": torch.ones(C)}), r"of 4 layers: missing blocks.3.ln1.weight \[16\]; missing"),
        (_changed({"optimizer": torch.ones(1)}), "unknown optimizer$"),
        (
            _changed({"blocks.1.att.key.weight": torch.ones(24, C)}),
            r"blocks.1.att.key.weight: expected shape \[16, 16\], got \[24, 16\]$",
        ),
        (_changed({"ln_out.bias": torch.ones(C).int()}), "ln_out.bias: expected floating-point numbers, got torch.int"),
        ({"model": torch.ones(1), "step": torch.ones(1)}, "expected a matrix 'emb.weight', got none among model, step"),
        ({}, "expected a matrix 'emb.weight', got none among no tensors"),
    ],
    ids=["RWKV-5", "RWKV-6", "RWKV-7", "missing", "layer", "unknown", "shape", "integers", "other", "empty"],
)
def test_other_checkpoints_are_refused_by_name(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "rwkv.pth")
    with pytest.raises(ValueError, match=rf"rwkv.pth.*{message}"):
        RWKV.from_pretrained(tmp_path / "rwkv.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {"emb.weight": torch.ones(2, 2)}, "epoch": 3}, r"expected tensors by name, got \['epoch', 'st"),
        ([torch.ones(1)], "expected tensors by name, got list"),
    ],
    ids=["nested", "list"],
)
def test_files_of_another_kind_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "rwkv.pth")
    with pytest.raises(ValueError, match=message):
        RWKV.from_pretrained(tmp_path / "rwkv.pth")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "rwkv5"}, "config.json: .*model_type: expected 'rwkv', got 'rwkv5'"),
        ({"attention_hidden_size": 24}, "attention_hidden_size: expected 16, got 24"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon: expected 1e-05, got 1e-06"),
    ],
    ids=["version", "width", "epsilon"],
)
def test_other_configurations_are_refused_by_name(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    _model().save_pretrained(tmp_path / "folder")
    path = tmp_path / "folder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(ValueError, match=message):
        RWKV.from_pretrained(tmp_path / "folder")


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="never downloaded"):
        RWKV.from_pretrained("RWKV/rwkv-4-169m-pile")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        RWKV.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        RWKV.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    with pytest.raises(FileNotFoundError, match=r"expected one of model\.safetensors, "):
        RWKV.from_pretrained(tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"head.weight": "../secret.bin"}}')
    with pytest.raises(ValueError, match=r"expected files of the same folder, got '\.\./secret\.bin'"):
        RWKV.from_pretrained(tmp_path)
    index.write_text('{"weight_map": {"head.weight": "part.bin"}}')
    with pytest.raises(FileNotFoundError, match=r"part\.bin"):
        RWKV.from_pretrained(tmp_path)
