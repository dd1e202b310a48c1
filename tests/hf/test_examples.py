"""The examples run, in a shortened form, on a tiny random model."""

import importlib.util
import math
from pathlib import Path

import pytest

from zotune.tuning import without_peft_warning

ROWS = ([{"sentence": text, "label": i % 2} for i, text in enumerate(["a dull film", "a gripping film"] * 8)],) * 2
SHORT = {"use_cpu": True, "disable_tqdm": True}


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[2] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(make_model, tokenizer, tmp_path):
    make_model(max_position_embeddings=256).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_classification(folder, tmp_path, capsys):
    before, after = load("hf_classification").main(folder, 3, ROWS, str(tmp_path / "out"), **SHORT)
    assert 0.0 <= before <= 1.0
    assert 0.0 <= after <= 1.0
    assert "after 6 forwards" in capsys.readouterr().out
    assert "forward-only" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")
def test_sft_with_lora(folder, tmp_path, capsys):
    pytest.importorskip("trl")
    with without_peft_warning():
        before, after = load("hf_sft_lora").main(folder, 3, ROWS, str(tmp_path / "out"), **SHORT)
    assert math.isfinite(before)
    assert before != after
    assert "after 6 forwards" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_reward(folder, tmp_path, capsys):
    before, _ = load("hf_reward").main(folder, 2, str(tmp_path / "out"), new_tokens=3, eps=1.0, **SHORT)
    assert 0.0 <= before <= 1.0
    assert "after 4 queries" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
