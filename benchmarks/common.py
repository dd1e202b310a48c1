"""What the benchmarks share: models, batches, losses, and the machine's description."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

import zotune
from zotune.models import load_model

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHAPES = {"1x32": (1, 32), "16x64": (16, 64)}


def load(name: str, dtype: torch.dtype, device: str) -> Any:
    """A model by name; `tiny` is a random one that loads at once, to try the benchmark itself."""
    if name == "tiny":
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=512,
            tie_word_embeddings=True,
        )  # fmt: skip
        model = transformers.LlamaForCausalLM(config).to(dtype)
    else:
        model, _ = load_model(name, dtype=dtype)
    return model.eval().to(device)


def make_closure(model: Any, shape: tuple[int, int], loss: str) -> Callable[[], torch.Tensor]:
    """One forward on fixed random tokens: cross entropy of the last token, or of all of them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, shape, generator=generator).to(model.device)
    if loss == "all":
        return lambda: model(input_ids=ids, labels=ids).loss

    def last() -> torch.Tensor:
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[:, -1].contiguous()
        return F.cross_entropy(model.lm_head(hidden).float(), ids[:, -1])

    return last


def machine() -> dict[str, Any]:
    """Enough to know where numbers were taken."""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line), platform.processor()
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "zotune": zotune.__version__,
        "commit": commit.stdout.strip(),
    }


class Crossing:
    """How dear it is to read what another thread has just written: about 1 where all threads share a cache, about 10 where
    they do not. A virtual machine's processors may be moved from one to the other while it runs."""

    REPEATS = 20
    # Above it they do not. Seen were 0.9 to 1.5 and 8.5 to 12.3, and once 4.01, where it may have changed within the round.
    APART = 4.0

    def __init__(self) -> None:
        self._x = torch.zeros(1 << 20)  # each of two threads writes its half
        self._sum = torch.empty(1 << 19)

    def _own(self) -> None:
        self._x.add_(1.0)

    def _both(self) -> None:
        self._x.add_(1.0)
        torch.add(self._x[: 1 << 19], self._x[1 << 19 :], out=self._sum)

    def __call__(self) -> float:
        """The time of a sum of numbers of which the other thread wrote half, in times of writing them."""
        own, both = (self._seconds(each) for each in (self._own, self._both))
        return (both - own) / own

    def _seconds(self, each: Callable[[], None]) -> float:
        each()
        start = time.perf_counter()
        for _ in range(self.REPEATS):
            each()
        return time.perf_counter() - start


def write(path: str | None, result: dict[str, Any]) -> None:
    """JSON, if a path was given."""
    if path:
        Path(path).write_text(json.dumps(result, indent=2) + "\n")


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
