"""What learning a fine-tuner is made of: one dataclass, from which the command line is made as well."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from zotune.core.registry import suggest
from zotune.errors import ConfigError
from zotune.runs.config import PRECISIONS, setting

VARIANTS = ("paper", "corrected")
GRADIENTS = ("keep", "twice")
RATES = {"paper": 0.1, "corrected": 1e-3}  # of the networks: the released recipe's; chosen here (docs/learn.md)


@dataclass(frozen=True)
class LearnConfig:
    """Settings of `zotune learn`. Values without another source are those of the released recipe for LLaMA-3.2-1B."""

    out: str = setting("finetuner", "Folder to write; must not exist. The same command resumes a killed run.")
    model: str = setting("smollm2-135m", "Base model: hub id, folder, .gguf file, or smollm2-135m.")
    tasks: str = setting("", "Tasks to learn on, separated by commas.")
    data: str | None = setting(None, "Folder with a folder for each task, of train.jsonl and validation.jsonl.")
    variant: str = setting(
        "paper", "paper (as published), or corrected (budget differentiated, less noise, scaled features)."
    )
    epochs: int = setting(15, "Passes over the first task's rows; every round visits all tasks.")
    epochs_per_restart: int = setting(5, "Passes after which the weights return to the base model's.")
    batch_size: int = setting(8, "Examples per visit.")
    micro_batch: int | None = setting(None, "Examples per forward and backward pass, if a batch does not fit.")
    train_rows: int = setting(300, "Training rows of each task; 0 for all.")
    lr_llm: float = setting(1e-2, "Learning rate of the model along its trajectory (SGD, falling to 0).")
    momentum: float = setting(0.8, "Of the trajectory.")
    clip: float | None = setting(1.0, "Largest norm of the trajectory's gradient; none for no limit.")
    lr_mlp: float | None = setting(None, "Learning rate of the networks. Default: 0.1 (paper), 0.001 (corrected).")
    lr_update: float = setting(1e-6, "Length of the zeroth-order step that is judged; corrected: give the tuned one.")
    eps: float = setting(1e-3, "Perturbation scale of the probes.")
    normalise: bool = setting(True, "Keep the size of the step (nf); without it nf is 1.")
    average: bool = setting(True, "Corrected: put its mean in the place of the noisy first-order part.")
    shuffle: bool = setting(True, "Visit the tasks of a round in random order.")
    mode: str = setting("full", "What the fine-tuner is for: full (all weights), lora, ...")
    mode_options: dict[str, Any] = setting({}, "Options of the mode, as name=value.")
    checkpointing: bool = setting(True, "Run layers again in backward passes instead of keeping their activations.")
    gradients: str = setting(
        "keep", "keep the trajectory's gradient for a moment, or pass back twice: 1 copy less of what is trained."
    )
    snapshot_every: int = setting(50, "Visits between snapshots, from which a killed run resumes.")
    seed: int = setting(0, "Fixes the networks' start, all noise and the order of tasks.")
    data_seed: int = setting(0, "Fixes which rows are drawn and their order.")
    precision: str = setting("auto", "auto, fp32, autocast or bf16.")
    max_length: int = setting(2048, "Longest prompt plus answer, in tokens.")
    device: str | None = setting(None, "cpu, cuda, ... Default: the first GPU if there is one.")

    def __post_init__(self) -> None:
        """Collect everything that is out of range and say it at once."""
        wrong = [text for good, text in self._checks() if not good]
        choices = (("variant", VARIANTS), ("gradients", GRADIENTS), ("precision", tuple(PRECISIONS)))
        for name, known in choices:
            value = getattr(self, name)
            if value not in known:
                wrong.append(f"{name} must be one of {', '.join(known)}, got {value!r}{suggest(str(value), known)}")
        if wrong:
            raise ConfigError("; ".join(wrong) + ".")

    def _checks(self) -> list[tuple[bool, str]]:
        names = self.task_names
        whole = ("epochs", "epochs_per_restart", "batch_size", "micro_batch", "snapshot_every")
        checks = [
            (value is None or value >= 1, f"{name} must be at least 1, got {value}")
            for name in whole
            for value in [getattr(self, name)]
        ]
        ranges: tuple[tuple[str, Callable[[float], bool], str], ...] = (
            ("train_rows", lambda v: v >= 0, "at least 0 (all)"),
            ("lr_llm", lambda v: v >= 0, "at least 0"),
            ("momentum", lambda v: 0 <= v < 1, "of [0, 1)"),
            ("clip", lambda v: v > 0, "positive, or none for no limit"),
            ("lr_mlp", lambda v: v >= 0, "at least 0"),
            ("lr_update", lambda v: v > 0, "positive: a step of length 0 teaches nothing"),
            ("eps", lambda v: v > 0, "positive"),
        )
        for name, good, needed in ranges:
            value = getattr(self, name)
            checks.append(
                (value is None or (math.isfinite(value) and good(value)), f"{name} must be {needed}, got {value}")
            )
        checks += [
            (bool(names), "tasks must name at least one task, as in --tasks sst2,copa"),
            (len(set(names)) == len(names), f"tasks names a task twice: {self.tasks}"),
            (
                not (self.gradients == "twice" and self.micro_batch is not None),
                "micro_batch goes with gradients 'keep': the norm of a sum of gradients is not known from its parts",
            ),
            (self.precision != "fp16", "precision fp16 would need a scaled loss, or small gradients vanish: use bf16"),
            (
                self.normalise or self.variant == "paper",
                "the corrected variant differentiates the normalisation: leave normalise on",
            ),
        ]
        return checks

    @property
    def task_names(self) -> list[str]:
        """The tasks, in the order given."""
        return [name.strip() for name in self.tasks.split(",") if name.strip()]

    @property
    def rate(self) -> float:
        """Learning rate of the networks: given, or the variant's."""
        return RATES[self.variant] if self.lr_mlp is None else self.lr_mlp

    def as_dict(self) -> dict[str, Any]:
        """All settings."""
        return asdict(self)
