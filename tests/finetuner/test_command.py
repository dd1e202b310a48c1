"""`zotune import-finetuner`."""

import pytest
import torch
from tests.finetuner.conftest import cuda_like, fresh_network, llama_names
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import zotune.models
from zotune.cli.app import app
from zotune.errors import ConfigError
from zotune.finetuner.fingerprint import cuda_network
from zotune.finetuner.folder import load_folder

STARTS = (0, 4)


def run(*words):
    result = CliRunner().invoke(app, ["import-finetuner", *map(str, words)], env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def model_names(layers=2, tied=True):
    return [name for name, _ in tiny(layers, tied).named_parameters()]


def tiny(layers=2, tied=True):
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture
def model(monkeypatch):
    """Stands in for the model of any name."""
    monkeypatch.setattr(zotune.models, "load_model", lambda name: (tiny(tied="untied" not in name), None))
    return "tiny"


def test_networks_close_to_their_initialisation(release, tmp_path):
    names = llama_names(2)
    change = torch.zeros(len(names), 449)
    change[6, 100] = 0.05
    printed = run(release(cuda_like(names, STARTS, change=change)), "--out", tmp_path / "out")
    assert "CUDA's numbers of seed 42, counted anew at networks 0-3, 4-11" in printed
    assert f"{len(names) - 1} of {len(names)} networks, bit for bit" in printed
    assert "most 5.0e-02" in printed
    assert f"{names[6]}" in printed
    assert "1 of 449" in printed
    networks, facts = load_folder(tmp_path / "out")
    assert networks.names == tuple(names)
    assert (facts["eps"], facts["batch"], facts["tokens_per_example"]) == (1e-3, 8, 15)


def test_networks_of_unknown_initialisation(release, tmp_path):
    names = llama_names(1)
    printed = run(release({name: fresh_network() for name in names}), "--out", tmp_path / "out")
    assert "unknown: not CUDA's numbers of this seed" in printed
    assert "numbers beyond its range" in printed
    with pytest.raises(ConfigError, match="was not found"):
        run(release({name: fresh_network() for name in names}), "--out", tmp_path / "second", "--initial")
    assert not (tmp_path / "second").exists()


def test_the_untrained_control(release, tmp_path):
    names = llama_names(1)
    change = torch.full((len(names), 449), 1e-3)
    run(release(cuda_like(names, STARTS, change=change)), "--out", tmp_path / "out", "--initial")
    networks, facts = load_folder(tmp_path / "out")
    expected = torch.stack([cuda_network(i if i < 4 else i - 4) for i in range(len(names))])
    assert torch.equal(networks.flat().float(), expected)
    assert facts["networks"] == "initial"


@pytest.mark.filterwarnings("ignore:Networks left out")
def test_names_are_checked_against_a_model(release, tmp_path, model):
    path = release({name: fresh_network() for name in [*model_names(), "lm_head.weight"]})
    assert "every tensor of tiny has one" in run(path, "--out", tmp_path / "out", "--model", model)
    with pytest.warns(UserWarning, match="uses the network of model.embed_tokens"):
        run(release({name: fresh_network() for name in model_names()}), "--out", tmp_path / "b", "--model", "untied")


@pytest.mark.filterwarnings("ignore:Networks left out")
@pytest.mark.parametrize(("layers", "match"), [(1, "no network for 9 of 20"), (3, "not the architecture and depth")])
def test_another_depth_is_refused(release, tmp_path, model, layers, match):
    path = release({name: fresh_network() for name in model_names(layers)})
    with pytest.raises(ConfigError, match=match):
        run(path, "--out", tmp_path / "out", "--model", model)
    assert not (tmp_path / "out").exists()


def test_the_released_file_through_the_command_line(released_file, tmp_path):
    printed = run(released_file, "--out", tmp_path / "out")
    assert "counted anew at networks 0-0, 1-54, 55-108, 109-145" in printed
    assert "median 7.3e-04" in printed
    assert "model.layers.1.mlp.down_proj.weight" in printed
    assert load_folder(tmp_path / "out")[1]["source_sha256"].startswith("3e15467e")
