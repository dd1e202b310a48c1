"""A job: everything that a run works with, loaded and checked before any work starts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotune.config import TrainConfig
from zotune.core.errors import ConfigError
from zotune.core.ledger import Ledger, weights_hash
from zotune.core.registry import options_of
from zotune.core.site import canonical_name
from zotune.methods import defaults, make_method
from zotune.models import load_model
from zotune.optimizer import ZO
from zotune.precision import Precision, choose_device, choose_precision
from zotune.rules import make_rule
from zotune.run_folder import RunFolder
from zotune.tasks.catalogue import find_task
from zotune.tasks.encoding import Encoded, encode_all
from zotune.tasks.rows import choose_rows, load_rows
from zotune.tasks.scoring import OptionScorer
from zotune.tasks.task import make_examples
from zotune.tuning import Mode, describe_mode, make_mode


class Listener:
    """What a run tells; the command line draws it. Every method may be left alone."""

    def say(self, message: str) -> None:
        """Something slow begins, or something notable was found."""

    def plan(self, facts: dict[str, str]) -> None:
        """What is about to be done, before it is done."""

    def evaluating(self, done: int, total: int, what: str) -> None:
        """Progress of an evaluation, in examples."""

    def step(self, step: int, loss: float, forwards: int) -> None:
        """A step was taken."""

    def evaluated(self, line: dict[str, Any]) -> None:
        """Held-out numbers at some step."""


@dataclass
class Job:
    """Everything that a run works with, loaded and checked."""

    config: TrainConfig
    model: Any
    tokenizer: Any
    scorer: OptionScorer
    train: list[Encoded]
    heldout: list[Encoded]
    precision: Precision
    folder: RunFolder
    mode: Mode

    @property
    def lr(self) -> float:
        """The learning rate before the schedule: given, or the mode's."""
        return self.mode.lr if self.config.lr is None else self.config.lr


def method_options(config: TrainConfig) -> dict[str, Any]:
    """The method's options; a `horizon` that nobody gave is the length of the run."""
    options = dict(config.method_options)
    if defaults(config.method).get("horizon", 0) is None:
        options.setdefault("horizon", config.steps)
    return options


def prepare(config: TrainConfig, folder: RunFolder, listener: Listener) -> Job:
    """Load and check the task's rows and the model."""
    make_method(config.method, method_options(config))  # wrong options are found before the model is loaded
    make_rule(config.rule, config.rule_options)
    task, mode = find_task(config.task), make_mode(config.mode, config.mode_options)
    rows = load_rows(task, data_folder=None if config.data is None else _folder(config.data), say=listener.say)
    train_rows = choose_rows(rows["train"], config.train_rows, seed=config.data_seed)
    heldout_rows = choose_rows(rows["validation"], config.eval_rows, seed=config.data_seed)
    examples = make_examples(task, train_rows, where="train"), make_examples(task, heldout_rows, where="validation")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    listener.say(f"loading {config.model}")
    model, tokenizer = load_model(config.model, dtype=precision.weights, say=listener.say)
    model = mode.attach(model, config.seed).to(device)
    encoded = [encode_all(part, tokenizer, config.max_length) for part in examples]
    scorer = OptionScorer(model, pad_id=tokenizer.pad_token_id, autocast=precision.autocast)
    return Job(config, model, tokenizer, scorer, encoded[0], encoded[1], precision, folder, mode)


def make_optimizer(job: Job) -> ZO:
    """The optimizer of a run, with its ledger."""
    config = job.config
    named = [(canonical_name(name), tensor) for name, tensor in job.model.named_parameters()]
    return ZO(
        named,
        config.method,
        lr=job.lr,
        eps=job.mode.eps if config.eps is None else config.eps,
        weight_decay=config.weight_decay,
        seed=config.seed,
        rule=config.rule,
        engine=config.engine,
        noise=config.noise,
        low_precision=config.low_precision,
        method_options=method_options(config),
        rule_options=config.rule_options,
        ledger=Ledger(
            job.folder.ledger, describe_base(config.model, job.precision.weights, named, job.mode, config.seed)
        ),
    )


def describe_base(
    model: str, dtype: torch.dtype | None, named: Sequence[tuple[str, Tensor]], mode: Mode, seed: int
) -> dict[str, Any]:
    """What a ledger's header says of the weights that a run began with: enough to find them again, and to refuse others."""
    frozen = [(name, tensor) for name, tensor in named if not tensor.requires_grad]
    described: dict[str, Any] = {
        "model": model,
        "dtype": str(dtype).removeprefix("torch."),
        "weights": weights_hash((name, tensor) for name, tensor in named if tensor.requires_grad),
    }
    if mode.name != "full":
        described |= {"mode": describe_mode(mode, seed), "frozen": weights_hash(frozen)}
    return described


def plan(job: Job, opt: ZO) -> dict[str, str]:
    """What a run will do and cost, in words, before it starts."""
    config, group = job.config, opt.param_groups[0]
    extra = opt.weights.extra_bytes()
    lr_source = job.mode.source if config.lr is None else "given"
    eps_source = "default for these weights: MeZO's 1e-3, or 1e-2 for bf16" if job.mode.eps is None else job.mode.source
    eps_source = eps_source if config.eps is None else "given"
    sites = [slot.site for slot in opt.weights]
    forwards = opt.method.forwards_for(sites)
    kept = [opt.method.extra_bytes(sites), opt.rule.extra_bytes(sites)]
    return {
        "model": f"{config.model}, {sum(p.numel() for p in job.model.parameters()):,} parameters",
        "trained": f"{job.mode.name}: {opt.weights.numel:,} parameters in {len(opt.weights.slots)} tensors",
        "task": f"{config.task}: {len(job.train)} training rows, {len(job.heldout)} held out",
        "method": f"{_named(opt.method)}, {opt.method.paper}; rule {_named(opt.rule)}",
        "forwards": f"{forwards:g} a step, {forwards * config.steps:g} in all, batch {config.batch_size}",
        "lr, eps": f"{group['lr']:g} ({lr_source}), {config.schedule}; {group['eps']:g} ({eps_source})",
        "precision": job.precision.reason,
        "extra memory": f"method: {opt.method.extra_state}{_mib(kept[0])}; rule: {opt.rule.extra_state}{_mib(kept[1])}; "
        f"carried low-order bits: {extra / 2**20:.0f} MiB; engine {opt.engine.name}: {opt.engine.extra_memory}",
        "loss": job.scorer.loss_reason,
        "run folder": str(job.folder.path),
    }


def _named(made: Any) -> str:
    options = ", ".join(f"{key}={value}" for key, value in options_of(made).items())
    return f"{made.name} ({options})" if options else str(made.name)


def _mib(count: int) -> str:
    return f" ({count / 2**20:.1f} MiB)" if count else ""


def _folder(path: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}; --data needs one with train.jsonl and validation.jsonl.")
    return folder
