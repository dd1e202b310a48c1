"""A job: everything that a run works with, loaded and checked before any work starts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zotune.config import TrainConfig
from zotune.core.errors import ConfigError
from zotune.core.ledger import Ledger, weights_hash
from zotune.models import load_model
from zotune.optimizer import ZO
from zotune.precision import Precision, choose_device, choose_precision
from zotune.run_folder import RunFolder
from zotune.tasks.catalogue import find_task
from zotune.tasks.encoding import Encoded, encode_all
from zotune.tasks.rows import choose_rows, load_rows
from zotune.tasks.scoring import OptionScorer
from zotune.tasks.task import make_examples


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


def prepare(config: TrainConfig, folder: RunFolder, listener: Listener) -> Job:
    """Load and check the task's rows and the model."""
    task = find_task(config.task)
    rows = load_rows(task, data_folder=None if config.data is None else _folder(config.data), say=listener.say)
    train_rows = choose_rows(rows["train"], config.train_rows, seed=config.data_seed)
    heldout_rows = choose_rows(rows["validation"], config.eval_rows, seed=config.data_seed)
    examples = make_examples(task, train_rows, where="train"), make_examples(task, heldout_rows, where="validation")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    listener.say(f"loading {config.model}")
    model, tokenizer = load_model(config.model, dtype=precision.weights, say=listener.say)
    model.to(device)
    encoded = [encode_all(part, tokenizer, config.max_length) for part in examples]
    scorer = OptionScorer(model, pad_id=tokenizer.pad_token_id, autocast=precision.autocast)
    return Job(config, model, tokenizer, scorer, encoded[0], encoded[1], precision, folder)


def make_optimizer(job: Job) -> ZO:
    """The optimizer of a run, with its ledger."""
    config = job.config
    named = list(job.model.named_parameters())
    trained = [(name, tensor) for name, tensor in named if tensor.requires_grad]
    base = {
        "model": config.model,
        "dtype": str(trained[0][1].dtype).removeprefix("torch."),
        "weights": weights_hash(trained),
    }
    return ZO(
        named,
        config.method,
        lr=config.lr,
        eps=config.eps,
        weight_decay=config.weight_decay,
        seed=config.seed,
        rule=config.rule,
        engine=config.engine,
        noise=config.noise,
        low_precision=config.low_precision,
        method_options=config.method_options,
        rule_options=config.rule_options,
        ledger=Ledger(job.folder.ledger, base),
    )


def plan(job: Job, opt: ZO) -> dict[str, str]:
    """What a run will do and cost, in words, before it starts."""
    config, group = job.config, opt.param_groups[0]
    extra = opt.weights.extra_bytes()
    lr_source = "MeZO's for full tuning of OPT, Table 16" if config.lr == 1e-6 else "given"
    eps_source = "given" if config.eps is not None else "default for these weights: MeZO's 1e-3, or 1e-2 for bf16"
    options = ", ".join(f"{key}={value}" for key, value in opt.describe()["method"].items() if key != "name")
    return {
        "model": f"{config.model}, {sum(p.numel() for p in job.model.parameters()):,} parameters",
        "trained": f"{opt.weights.numel:,} parameters in {len(opt.weights.slots)} tensors",
        "task": f"{config.task}: {len(job.train)} training rows, {len(job.heldout)} held out",
        "method": f"{opt.method.name} ({options}), {opt.method.paper}; rule {opt.rule.name}",
        "forwards": f"{opt.method.forwards:g} a step, {opt.method.forwards * config.steps:g} in all, batch {config.batch_size}",
        "lr, eps": f"{group['lr']:g} ({lr_source}), {config.schedule}; {group['eps']:g} ({eps_source})",
        "precision": job.precision.reason,
        "extra memory": f"method: {opt.method.extra_state}; rule: {opt.rule.extra_state}; "
        f"carried low-order bits: {extra / 2**20:.0f} MiB; engine {opt.engine.name}: {opt.engine.extra_memory}",
        "loss": job.scorer.loss_reason,
        "run folder": str(job.folder.path),
    }


def _folder(path: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}; --data needs one with train.jsonl and validation.jsonl.")
    return folder
