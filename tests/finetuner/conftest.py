"""Files of the released format, made here: a dict of tensor name -> nn.Sequential, saved by torch.save."""

import os
from pathlib import Path

import pytest
import torch
from tests.reference.zo_finetuner import as_module
from torch import nn

from zotune.finetuner.fingerprint import cuda_networks
from zotune.finetuner.networks import from_flat

KINDS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")


def llama_names(layers):
    """Names as in LLaMA, with fewer kinds of tensors."""
    inner = [f"model.layers.{layer}.{kind}.weight" for layer in range(layers) for kind in KINDS]
    return ["model.embed_tokens.weight", *inner, "model.norm.weight"]


def fresh_network():
    """Of torch's global generator, as a CPU makes it."""
    return nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))


def cuda_like(names, starts, dtype=torch.float32, change=None):
    """Networks as GPUs would have made them, the counter restarting at `starts`; `change` (n, 449) is added."""
    numbers = [i - max(start for start in starts if start <= i) for i in range(len(names))]
    flat = cuda_networks(numbers)
    return from_flat(names, (flat if change is None else flat + change).to(dtype))


@pytest.fixture
def release(tmp_path):
    """Save a dict of modules, or networks as such a dict; returns the path."""

    def save(held, name="learned.pth"):
        if not isinstance(held, dict):
            dtype = held.w1.dtype
            held = {key: as_module(held, i).to(dtype) for i, key in enumerate(held.names)}
        torch.save(held, tmp_path / name)
        return tmp_path / name

    return save


@pytest.fixture
def released_file():
    """The released file for LLaMA-3.2-1B, which is not part of this project."""
    path = os.environ.get("ZOTUNE_RELEASED_FINETUNER")
    if not path:
        pytest.skip("ZOTUNE_RELEASED_FINETUNER does not name llama1B_finetuner.pth of the released code")
    return Path(path)
