"""Released files are read without running them (T6, T7)."""

import pickle
from pathlib import Path

import pytest
import torch
from tests.finetuner.conftest import fresh_network, llama_names
from torch import nn

from zotune.errors import FinetunerError
from zotune.finetuner.importer import read_released

NAMES = llama_names(1)


def test_the_released_format_is_read(release):
    held = {name: fresh_network() for name in NAMES}
    networks, facts = read_released(release(held))
    assert networks.names == tuple(NAMES)
    assert facts["source"] == "learned.pth"
    assert facts["source_dtype"] == "float32"
    x = torch.randn(len(NAMES), 5)
    with torch.no_grad():
        expected = torch.stack([abs(net(row))[0] for net, row in zip(held.values(), x, strict=True)])
    # fp32 sums of 64 products below 1, in two orders
    assert (networks.sigma(x, range(len(NAMES))) - expected).abs().max() < 1e-6


def test_dtype_and_bits_are_kept(release):
    held = {name: fresh_network().half() for name in NAMES}
    networks, facts = read_released(release(held))
    assert facts["source_dtype"] == "float16"
    for i, net in enumerate(held.values()):
        assert torch.equal(networks.w1[i], net[0].weight)
        assert torch.equal(networks.b1[i], net[0].bias)
        assert torch.equal(networks.w2[i], net[2].weight[0])
        assert torch.equal(networks.b2[i], net[2].bias[0])


def test_wrappers_in_names_are_taken_off(release):
    held = {"module.model.norm.weight": fresh_network(), "_orig_mod.base_model.model.lm_head.weight": fresh_network()}
    assert read_released(release(held))[0].names == ("model.norm.weight", "lm_head.weight")


def test_names_that_become_one_are_refused(release):
    with pytest.raises(FinetunerError, match=r"several for model\.norm\.weight"):
        read_released(release({"module.model.norm.weight": fresh_network(), "model.norm.weight": fresh_network()}))


class Planted:
    """Pickles to a call that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda held, path: path.write_bytes(pickle.dumps(held))])
def test_a_planted_call_is_not_run(tmp_path, save):
    trap, sprung = tmp_path / "trap.pth", tmp_path / "sprung"
    save({"model.norm.weight": fresh_network(), "other": Planted(sprung)}, trap)
    with pytest.raises(FinetunerError, match="nothing in it was run"):
        read_released(trap)
    assert not sprung.exists()
    torch.load(trap, weights_only=False) if save is torch.save else pickle.loads(trap.read_bytes())
    assert sprung.exists(), "the trap does not work, so nothing was tested"


def test_a_refused_file_says_what_it_names(tmp_path):
    torch.save({"a": Planted(tmp_path / "sprung")}, tmp_path / "trap.pth")
    with pytest.raises(FinetunerError, match=r"this file also names .*Path"):
        read_released(tmp_path / "trap.pth")


def test_reading_leaves_torch_s_list_of_safe_classes_alone(release):
    before = set(torch.serialization.get_safe_globals())
    read_released(release({"a": fresh_network()}))
    assert set(torch.serialization.get_safe_globals()) == before


class Disguised(nn.Sequential):
    """A class that only this machine knows."""


def wrong(change):
    network = fresh_network()
    change(network)
    return network


@pytest.mark.parametrize(
    ("held", "match"),
    [
        ([fresh_network()], "holds a list"),
        ({}, "holds a dict, not networks by name"),
        ({3: fresh_network()}, "holds a dict, not networks by name"),
        (torch.randn(4), "holds a Tensor"),
        ({"a": torch.randn(64, 5)}, "has for 'a' a Tensor"),
        ({"a": fresh_network().state_dict()}, "has for 'a' a OrderedDict"),
        ({"a": nn.Sequential(nn.Linear(5, 64), nn.Linear(64, 1))}, "the layers Linear, Linear"),
        ({"a": nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 1))}, r"0.weight of shape \(32, 5\)"),
        ({"a": nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 2))}, r"2.weight of shape \(2, 64\)"),
        ({"a": nn.Sequential(nn.Linear(5, 64, bias=False), nn.Tanh(), nn.Linear(64, 1))}, "0.bias"),
        ({"a": fresh_network(), "b": fresh_network().half()}, "several dtypes: torch.float16, torch.float32"),
        ({"a": nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 1))}, "also names torch.nn.modules.*ReLU"),
        ({"a": Disguised(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))}, "also names .*Disguised"),
        ({"a": wrong(lambda net: net[2].bias.data.fill_(float("inf")))}, "those for a do not"),
        ({"a": wrong(lambda net: vars(net).pop("_modules"))}, "the layers none"),
    ],
)
def test_what_is_no_fine_tuner(release, held, match):
    path = release({"x": 0}, "placeholder.pth")
    torch.save(held, path)
    with pytest.raises(FinetunerError, match=match):
        read_released(path)


@pytest.mark.parametrize("content", [b"", b"not a pickle", b"\x80\x02."])
def test_what_is_no_file_of_torch(tmp_path, content):
    (tmp_path / "bad.pth").write_bytes(content)
    with pytest.raises(FinetunerError, match="is refused"):
        read_released(tmp_path / "bad.pth")


def test_a_torn_file(release):
    path = release({name: fresh_network() for name in NAMES})
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(FinetunerError, match="is refused"):
        read_released(path)


def test_no_file(tmp_path):
    with pytest.raises(FinetunerError, match="There is no file"):
        read_released(tmp_path / "absent.pth")


def test_the_released_file(released_file):
    """T6, for the one of four files that could be had."""
    networks, facts = read_released(released_file)
    assert facts["source_sha256"].startswith("3e15467e")
    assert facts["source_dtype"] == "float32"
    assert networks.flat().shape == (146, 449)
    assert networks.names[0] == "model.embed_tokens.weight"
    assert networks.names[-1] == "model.norm.weight"
    assert "lm_head.weight" not in networks.names
    assert sum(".layers." in name for name in networks.names) == 16 * 9
