"""tools/same_outputs.py itself: it accepts two equal builds, and reports one that rounds differently."""

import os
from pathlib import Path

import pytest
import same_outputs
import torch
from torch import Tensor

import rwkv_kernels

TREE = Path(rwkv_kernels.__file__).parent.parent
EVERY = 40  # cases, of which one is run


def test_every_kind_of_difference_is_seen() -> None:
    one = {"case": {"y": "float32 1 1", "state": "float32 2 2"}, "step": {"version": "moved"}}
    assert not list(same_outputs.differences(one, one))
    for other, expected in [
        ({**one, "case": {"y": "float32 1 1", "state": "float32 3 3"}}, "case: state: float32 2 2 and float32 3 3"),
        ({**one, "case": {"y": "float32 1 1", "state": "refused"}}, "case: state: float32 2 2 and refused"),
        ({**one, "case": {"y": "float32 1 1"}}, "case: state: float32 2 2 and None"),
        ({"case": one["case"]}, "step: version: moved and None"),
    ]:
        assert list(same_outputs.differences(one, other)) == [expected]
    unmoved = {"step": {"version": "UNMOVED"}}
    assert list(same_outputs.differences(unmoved, unmoved)) == ["step: version: unmoved in both"]


def test_digests_tell_all_but_two_nans_apart() -> None:
    def found(tensor: Tensor) -> dict[str, dict[str, str]]:
        return {"case": {"y": same_outputs.digest(tensor)}}

    x = torch.tensor([[0.0, 1.0, torch.nan], [2.0, 3.0, 4.0]])
    for other in (x + 0.0 * x.flip(0), x.double(), x.t().contiguous().t(), x[:1], x * torch.tensor([[-1.0], [1.0]])):
        assert len(list(same_outputs.differences(found(x), found(other)))) == 1
    negative_nan = (
        x.view(torch.int32).bitwise_xor(torch.tensor([[0, 0, -(2**31)], [0, 0, 0]]).int()).view(torch.float32)
    )
    assert not list(same_outputs.differences(found(x), found(negative_nan)))
    assert same_outputs.differing_nans(found(x), found(negative_nan)) == 1
    assert same_outputs.differing_nans(found(x), found(x.clone())) == 0


def test_no_case_is_there_twice() -> None:
    names = [str(case) for case in same_outputs.cases()]
    assert len(names) == len(set(names)) > 500


def test_another_instruction_set_is_another_result() -> None:
    if rwkv_kernels.build_info().cpu_instruction_set in (None, "baseline"):
        pytest.skip("the CPU kernels have one instruction set here, or are not built")
    found = same_outputs.outputs_of_tree(TREE, every=EVERY)
    assert not list(same_outputs.differences(found, same_outputs.outputs_of_tree(TREE, every=EVERY)))
    plain = same_outputs.outputs_of_tree(TREE, every=EVERY, environment={"ATEN_CPU_CAPABILITY": "default"})
    differing = list(same_outputs.differences(found, plain))
    assert any("forward, checkpoint=True: y" in what for what in differing)
    assert not any(": input" in what for what in differing)


def test_another_package_than_the_trees_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.fspath(TREE))
    with pytest.raises(SystemExit, match="No module named 'rwkv_kernels'|expected the package in"):
        same_outputs.outputs_of_tree(tmp_path, every=EVERY)
