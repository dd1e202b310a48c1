"""States of methods and rules go through safetensors and JSON and come back with the same types and bits."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from tests.support.methods import VARIANTS
from tests.support.models import CASES, assert_same_bits, snapshot

from zotune.errors import DataError
from zotune.runs.state_file import read_state, write_state


def same(one, other):
    """Equal types, values and bits, all the way down."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)
    elif isinstance(one, float):
        assert math.isnan(one) == math.isnan(other)
        assert math.isnan(one) or (one, math.copysign(1, one)) == (other, math.copysign(1, other))
    else:
        assert one == other


def rich_state():
    base = torch.arange(6.0)
    return {
        "tensors": {
            "bf16": torch.randn(3).bfloat16(), "int16": torch.tensor([-7, 7], dtype=torch.int16), "0-d": torch.tensor(2.5),
            "transposed": torch.randn(2, 3).t(), "a view": base[2:4], "the same memory": base, "empty": torch.zeros(0, 4),
            "bool": torch.tensor([True, False]), "int8": torch.tensor([-1], dtype=torch.int8), "fp64": torch.rand(2).double(),
        },
        "numbers": [0, -3, 2**70, 1 / 3, -0.0, 1e-45, math.inf, -math.inf, math.nan, True, None],
        "words": "with \n lines and ü",
        "by number": {0: "a", 1: {"$tensor": "not one"}},
        "nested": ((1, [2, ()]), {}, []),
    }  # fmt: skip


def test_everything_comes_back_with_its_type_and_bits(tmp_path):
    state = rich_state()
    write_state(tmp_path / "state.safetensors", state)
    same(read_state(tmp_path / "state.safetensors"), state)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]  # no temporary file is left


def test_the_file_is_safetensors_with_a_readable_header(tmp_path):
    """Another reader of the format finds the tensors and the tree."""
    write_state(tmp_path / "state", {"mu": {"w": torch.ones(2)}, "step": 3})
    with safe_open(tmp_path / "state", framework="np") as file:
        assert file.get_tensor("0").tolist() == [1.0, 1.0]
        assert json.loads(file.metadata()["tree"]) == {"mu": {"w": {"$tensor": "0"}}, "step": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.id)
def test_states_of_all_methods_and_rules_resume_to_the_same_bits(tmp_path, variant, dtype):
    """Learned means, bases, momenta, carried bits: 3 steps, saved, loaded, 2 more, as 5 steps in one go."""
    path, case = tmp_path / "state", CASES["mlp"](dtype)
    opt = variant.optimizer(case)
    for _ in range(3):
        opt.step(case.closure)
    write_state(path, {"weights": dict(case.named), "optimizer": opt.state_dict()})
    for _ in range(2):
        opt.step(case.closure)
    uninterrupted = snapshot(case)
    state, resumed = read_state(path), variant.optimizer(case)
    with torch.no_grad():
        for name, tensor in case.named:
            tensor.copy_(state["weights"][name])
    resumed.load_state_dict(state["optimizer"])
    for _ in range(2):
        resumed.step(case.closure)
    assert_same_bits(uninterrupted, snapshot(case))


@pytest.mark.parametrize("value", [{1, 2}, object(), torch.Generator(), b"bytes", 1j])
def test_what_cannot_be_held_is_refused_by_its_place(tmp_path, value):
    with pytest.raises(DataError, match=r"state\.method\[1\] is a .*takes tensors, numbers, words"):
        write_state(tmp_path / "state", {"method": [0, value]})
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_file_before_and_is_an_oserror(tmp_path, monkeypatch):
    """A full disk: the library raises a kind of its own, which training would not expect."""
    from safetensors import SafetensorError

    path = tmp_path / "state"
    write_state(path, {"step": 1})

    def full(tensors, name, metadata):
        name.write_bytes(b"half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("zotune.runs.state_file.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_state(path, {"step": 2})
    assert read_state(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_damage_and_other_formats_are_said(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "state"
    write_state(path, {"w": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DataError, match="damaged"):
        read_state(path)
    save_file({"w": torch.ones(1)}, path)
    with pytest.raises(DataError, match=r"its format is None, not 'zotune state 1'"):
        read_state(path)
