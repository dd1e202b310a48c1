"""A folder is written whole or not at all, and read only if it is what it says."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from zotune.errors import FinetunerError
from zotune.finetuner import folder as folders
from zotune.finetuner.folder import load_folder, save_folder
from zotune.finetuner.networks import from_flat, untrained

NAMES = ["model.embed_tokens.weight", "model.norm.weight"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path, dtype):
    networks = from_flat(NAMES, untrained(NAMES, 0).flat().to(dtype))
    save_folder(tmp_path / "new" / "folder", networks, {"eps": 1e-3, "base_model": None})
    again, facts = load_folder(tmp_path / "new" / "folder")
    assert again.names == networks.names
    assert all(torch.equal(a, b) for a, b in zip(again.arrays.values(), networks.arrays.values(), strict=True))
    assert again.w1.dtype == dtype
    assert facts["eps"] == 1e-3
    assert facts["features"] == ["mean", "variance", "loss_plus", "loss_minus", "sigma_before"]
    assert facts["digest"] == networks.digest()


def test_names_are_read_as_canonical(tmp_path):
    save_folder(tmp_path / "f", untrained([f"module.{name}" for name in NAMES], 0), {})
    facts = json.loads((tmp_path / "f" / "finetuner.json").read_text())
    networks = untrained(NAMES, 0)
    facts["digest"] = from_flat(NAMES, untrained([f"module.{name}" for name in NAMES], 0).flat().float()).digest()
    (tmp_path / "f" / "finetuner.json").write_text(json.dumps(facts))
    assert load_folder(tmp_path / "f")[0].names == networks.names


def test_an_existing_folder_is_left_alone(tmp_path):
    (tmp_path / "f").mkdir()
    with pytest.raises(FinetunerError, match="exists already"):
        save_folder(tmp_path / "f", untrained(NAMES, 0), {})


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(folders.os, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_folder(tmp_path / "f", untrained(NAMES, 0), {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_none(tmp_path):
    for path in (tmp_path, tmp_path / "absent"):
        with pytest.raises(FinetunerError, match="zotune import-finetuner"):
            load_folder(path)


def changed(tmp_path, change):
    save_folder(tmp_path / "f", untrained(NAMES, 0), {})
    facts = json.loads((tmp_path / "f" / "finetuner.json").read_text())
    change(facts)
    (tmp_path / "f" / "finetuner.json").write_text(json.dumps(facts))
    return tmp_path / "f"


@pytest.mark.parametrize("change", [{"format": 2}, {"features": ["variance", "mean"]}, {"out": "exp"}])
def test_other_meanings_are_refused(tmp_path, change):
    with pytest.raises(FinetunerError, match="other networks than this version knows"):
        load_folder(changed(tmp_path, lambda facts: facts.update(change)))


def test_other_names_are_refused(tmp_path):
    with pytest.raises(FinetunerError, match="changed by hand"):
        load_folder(changed(tmp_path, lambda facts: facts["names"].reverse()))
    with pytest.raises(FinetunerError, match="list of names"):
        load_folder(changed(tmp_path / "second", lambda facts: facts.pop("names")))


def test_changed_numbers_are_refused(tmp_path):
    save_folder(tmp_path / "f", untrained(NAMES, 0), {})
    arrays = load_file(tmp_path / "f" / "networks.safetensors")
    arrays["b1"][0, 0] += 1
    save_file(arrays, tmp_path / "f" / "networks.safetensors")
    with pytest.raises(FinetunerError, match="damaged"):
        load_folder(tmp_path / "f")
