"""A job: everything that a run works with, loaded and checked before any work starts."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zotune.core.ledger import Ledger, weights_hash
from zotune.core.site import canonical_name
from zotune.core.step import Method
from zotune.errors import ConfigError
from zotune.evaluation.assess import Assessor
from zotune.masked import MaskedScorer, encode_all_masked, find_masked_template
from zotune.methods import defaults, make_method
from zotune.models import load_any
from zotune.optim.optimizer import ZO
from zotune.optim.pairing import check_folding, check_pair, may_be_late
from zotune.optim.parameters import check_choices
from zotune.precision import Precision, choose_device, choose_precision
from zotune.rules import make_rule
from zotune.runs.config import TrainConfig
from zotune.runs.run_folder import RunFolder
from zotune.tasks.catalogue import find_task
from zotune.tasks.encoding import Encoded, encode_all, special_tokens, truncation
from zotune.tasks.generation import Generator
from zotune.tasks.objectives import Objective, check_objective, make_objective
from zotune.tasks.rewards import find_reward
from zotune.tasks.rows import SPLITS, choose_rows, load_rows, protocol_split
from zotune.tasks.scoring import OptionScorer, context_of
from zotune.tasks.task import Rows, Task, make_examples
from zotune.tuning import Mode, describe_mode, make_mode

LATE = 50  # steps between writes of what no query has written
EVAL_ROWS = 300  # held-out rows where none are asked for: a standard error of at most 0.029


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
    task: Task
    model: Any
    tokenizer: Any
    objective: Objective
    assessor: Assessor
    train: list[Encoded]
    heldout: list[Encoded]
    precision: Precision
    folder: RunFolder
    mode: Mode
    digest: str  # of the rows, as the task makes questions of them

    @property
    def scorer(self) -> Any:
        """What scores options: an OptionScorer or a MaskedScorer."""
        return self.assessor.scorer

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


@dataclass
class Loaded:
    """Rows and a model as it was loaded, on the CPU; nothing is attached to it yet."""

    task: Task
    rows: tuple[Rows, Rows]
    model: Any
    tokenizer: Any
    kind: str
    precision: Precision
    device: torch.device

    @property
    def digest(self) -> str:
        """SHA-256 of the questions and answers, in words: rows and template alike."""
        made = [make_examples(self.task, part, where=where) for part, where in zip(self.rows, SPLITS, strict=True)]
        return hashlib.sha256(repr(made).encode("utf-8", "surrogatepass")).hexdigest()


def prepare(config: TrainConfig, folder: RunFolder, listener: Listener) -> Job:
    """Load and check the task's rows and the model."""
    method = make_method(config.method, method_options(config))  # wrong options are found before the model is loaded
    refuse_examples(method)
    rule = make_rule(config.rule, config.rule_options)
    check_pair(method, rule)
    check_choices(config.noise, config.low_precision, config.engine)
    check_folding(config.fold_every, method, rule, [{"weight_decay": config.weight_decay}])
    make_mode(config.mode, config.mode_options)
    task = find_task(config.task)
    check_objective(config.objective or task.default_objective, task, config.reward)
    loaded = load(config, task, listener)
    return seat(loaded, loaded.model, config, folder, listener)


def refuse_examples(method: Method) -> None:
    """Raise a ConfigError for a method that a run cannot serve."""
    if "examples" in method.needs:
        raise ConfigError(
            f"method {method.name!r} needs a loss for each example, and the objectives of a run give one for the batch. Use "
            "zotune.ZO with a closure of your own, or another method."
        )


def load(config: TrainConfig, task: Task, listener: Listener) -> Loaded:
    """Draw the rows and load the model."""
    rows = draw_rows(config, task, listener)
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    listener.say(f"loading {config.model}")
    model, tokenizer, kind = load_any(config.model, dtype=precision.weights, say=listener.say)
    return Loaded(task, rows, model, tokenizer, kind, precision, device)


def seat(loaded: Loaded, model: Any, config: TrainConfig, folder: RunFolder, listener: Listener) -> Job:
    """Attach the mode to a model, encode the rows for it, and make what scores and what is lowered."""
    task, tokenizer, precision = loaded.task, loaded.tokenizer, loaded.precision
    mode = make_mode(config.mode, config.mode_options)
    model = mode.attach(model, config.seed).to(loaded.device)
    max_length = min(config.max_length, context_of(model) or config.max_length)
    encoded, scorer = FAMILIES[loaded.kind](task, loaded.rows, model, tokenizer, precision, max_length)
    for name, part in zip(("training", "held-out"), encoded, strict=True):
        if truncation(part).examples:
            listener.say(f"{name} rows: {truncation(part)} (max_length {max_length})")

    def generator() -> Generator:
        return Generator(model, tokenizer, autocast=precision.autocast)

    objective = make_objective(config.objective, task, scorer, generator, config.reward)
    reward = find_reward(task, config.reward) if task.reward or config.reward else None
    assessor = Assessor(task, scorer, generator, reward, 2 * config.batch_size)
    return Job(
        config,
        task,
        model,
        tokenizer,
        objective,
        assessor,
        encoded[0],
        encoded[1],
        precision,
        folder,
        mode,
        loaded.digest,
    )


def draw_rows(config: TrainConfig, task: Task, listener: Listener) -> tuple[Rows, Rows]:
    """Training and held-out rows of a run."""
    rows = load_rows(task, data_folder=None if config.data is None else _folder(config.data), say=listener.say)
    if config.protocol == "mezo":
        drawn = protocol_split(
            task, rows, seed=config.data_seed, num_train=config.train_rows, num_eval=config.eval_rows or 1000
        )
        listener.say(f"rows drawn as by MeZO's code: {drawn.counts}; dev rows are not used")
        return drawn.train, drawn.eval
    held_out = EVAL_ROWS if config.eval_rows is None else config.eval_rows or None
    return (
        choose_rows(rows["train"], config.train_rows or None, seed=config.data_seed),
        choose_rows(rows["validation"], held_out, seed=config.data_seed),
    )


Encodings = tuple[list[Encoded], list[Encoded]]


def _causal(
    task: Task, rows: tuple[Rows, Rows], model: Any, tokenizer: Any, precision: Precision, max_length: int
) -> tuple[Encodings, OptionScorer]:
    examples = [make_examples(task, part, where=where) for part, where in zip(rows, SPLITS, strict=True)]
    train, heldout = (encode_all(part, tokenizer, max_length, **special_tokens(tokenizer)) for part in examples)
    return (train, heldout), OptionScorer(model, pad_id=tokenizer.pad_token_id, autocast=precision.autocast)


def _masked(
    task: Task, rows: tuple[Rows, Rows], model: Any, tokenizer: Any, precision: Precision, max_length: int
) -> tuple[Encodings, MaskedScorer]:
    template = find_masked_template(task.name)
    scorer = MaskedScorer(
        model, mask_id=tokenizer.mask_token_id, pad_id=tokenizer.pad_token_id, autocast=precision.autocast
    )
    longest = min(max_length, scorer.longest or max_length)
    train, heldout = (encode_all_masked(template, part, tokenizer, longest) for part in rows)
    return (train, heldout), scorer


FAMILIES: dict[str, Any] = {"causal": _causal, "masked": _masked}


def make_optimizer(job: Job) -> ZO:
    """The optimizer of a run, with its ledger.

    Raises:
        ConfigError: the method cannot train these tensors.
    """
    config = job.config
    named = [(canonical_name(name), tensor) for name, tensor in job.model.named_parameters()]
    eps = job.mode.eps if config.eps is None else config.eps
    engine = config.engine
    if engine == "auto" and job.objective.generates:
        engine = "in_place"  # an answer takes many forwards: perturb once, not in each of them
    opt = ZO(
        job.mode.groups(named, eps) or named,
        config.method,
        lr=job.lr,
        eps=eps,
        weight_decay=config.weight_decay,
        seed=config.seed,
        rule=config.rule,
        engine=engine,
        noise=config.noise,
        low_precision=config.low_precision,
        method_options=method_options(config),
        rule_options=config.rule_options,
        fold_every=config.fold_every or _late(config),
        smooth=job.objective.differentiable,  # rounding flips predictions, and scores jump
        ledger=Ledger(
            job.folder.ledger, describe_base(config.model, job.precision.weights, named, job.mode, config.seed)
        ),
    )
    opt.method.check_sites([slot.site for slot in opt.weights])
    return opt


def _late(config: TrainConfig) -> int:
    """Everything that reads the weights in a run asks for them folded, so dense moves can wait for the next query."""
    method, rule = make_method(config.method, method_options(config)), make_rule(config.rule, config.rule_options)
    return LATE if may_be_late(method, rule, [{"weight_decay": config.weight_decay}]) else 0


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
    if mode != make_mode("full"):
        described |= {"mode": describe_mode(mode, seed), "frozen": weights_hash(frozen)}
    return described


def _folder(path: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}; --data needs one with train.jsonl and validation.jsonl.")
    return folder
