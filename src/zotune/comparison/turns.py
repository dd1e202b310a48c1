"""What each contestant of a comparison does when it is its turn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from zotune.baselines import Row, Usage, linear_probe, measure, train_first_order
from zotune.baselines.first_order import can_checkpoint, forward_equivalents
from zotune.comparison.contestants import Contestant, Ground
from zotune.evaluation.assess import numbers
from zotune.evaluation.evaluate import Evaluation, fit_prior_correction, prior_corrected
from zotune.runs.asking import demonstrated
from zotune.runs.job import Job, Listener, make_optimizer
from zotune.runs.training import take_steps
from zotune.tasks.encoding import Encoded

Entry = dict[str, Any]


class CompareListener(Listener):
    """What a comparison tells, beside what a run does."""

    def contestant(self, what: str, steps: int) -> None:
        """A contestant's turn begins; steps of training, 0 if there is none."""

    def finished(self, entry: Entry) -> None:
        """It is over, and written down; the entry holds `failed` or the held-out numbers."""


@dataclass(frozen=True)
class Outcome:
    """What a contestant reached, and what it took to get there."""

    line: dict[str, Any]
    correct: Tensor | None = None  # (N,) bool
    forwards: float = 0.0
    usage: Usage | None = None
    check_forwards: int = 0
    """Forwards that the engine spent on checking itself, not among `forwards`."""

    @classmethod
    def of(cls, evaluation: Evaluation, forwards: float = 0.0, usage: Usage | None = None) -> "Outcome":
        """From an evaluation of options."""
        return cls(numbers(evaluation), Row.of("", evaluation).correct, forwards, usage)


@dataclass(frozen=True)
class Asked:
    """What a contestant's function gets."""

    job: Job
    ground: Ground
    contestant: Contestant
    demonstrations: int
    listener: CompareListener


def _progress(asked: Asked, what: str) -> Callable[[int, int], None]:
    return lambda done, total: asked.listener.evaluating(done, total, what)


def _plain(asked: Asked) -> Evaluation:
    """Of the untouched model, which two contestants ask for."""
    if asked.ground.plain is None:
        asked.ground.plain = asked.job.assessor.options(asked.job.heldout, _progress(asked, "held out"))
    return asked.ground.plain


def _assess(asked: Asked, heldout: Sequence[Encoded], what: str = "held out") -> Outcome:
    assessor = asked.job.assessor
    if asked.job.task.kind == "generation":
        return Outcome(assessor.line(heldout, _progress(asked, what)))
    return Outcome.of(assessor.options(heldout, _progress(asked, what)))


def _zero_shot(asked: Asked) -> Outcome:
    if asked.job.task.kind == "generation":
        return _assess(asked, asked.job.heldout)
    return Outcome.of(_plain(asked))


def _prior_corrected(asked: Asked) -> Outcome:
    job = asked.job
    plain = _plain(asked)
    with measure(asked.job.scorer.device) as usage:
        fit = job.assessor.options(job.train, _progress(asked, "training rows"))
        bias = fit_prior_correction(fit.scores, fit.labels)
    return Outcome.of(prior_corrected(plain, bias), _passes(job), usage)


def _in_context(asked: Asked) -> Outcome:
    return _assess(asked, demonstrated(asked.job, asked.listener, asked.demonstrations), "held out, in context")


def _probe(asked: Asked) -> Outcome:
    job = asked.job
    found = linear_probe(
        job.scorer, job.train, job.heldout, batch_size=job.config.batch_size, seed=job.config.data_seed
    )
    return Outcome.of(found.evaluation, found.forwards, found.usage)


def _passes(job: Job) -> float:
    """Forward passes over batches of training rows that read each of them once."""
    return float(-(-len(job.train) // job.config.batch_size))


def _zeroth_order(asked: Asked) -> Outcome:
    job = asked.job
    job.folder.path.mkdir(parents=True, exist_ok=True)
    job.folder.ledger.unlink(missing_ok=True)  # of a killed comparison: this contestant begins again
    opt = make_optimizer(job)
    with measure(job.scorer.device) as usage:
        for _ in take_steps(job, opt, asked.listener):
            pass
    if opt.ledger is not None:
        opt.ledger.close()
    return replace(
        _assess(asked, job.heldout),
        forwards=float(opt.forwards),
        usage=usage,
        check_forwards=opt.engine.check_forwards,
    )


class Lowers:
    """A scorer whose loss is the objective of the run, so that first-order training lowers what the others lower."""

    def __init__(self, job: Job) -> None:
        self.model, self.autocast, self.device = job.scorer.model, job.scorer.autocast, job.scorer.device
        self.scores, self.loss, self.weight = job.scorer.scores, job.objective.loss, job.objective.weight


def _first_order(asked: Asked) -> Outcome:
    job, config = asked.job, asked.job.config
    each = forward_equivalents(job.model, can_checkpoint(job.model))
    run = train_first_order(
        Lowers(job),
        job.train,
        mode=config.mode,
        steps=config.steps,
        batch_size=config.batch_size,
        lr=job.lr,
        weight_decay=config.weight_decay,
        checkpointing=can_checkpoint(job.model),
        micro_batch=config.micro_batch,
        seed=config.data_seed,
        progress=lambda step, loss: asked.listener.step(step, loss, round(step * each)),
    )
    return replace(_assess(asked, job.heldout), forwards=run.forwards, usage=run.usage)


ASKED: dict[str, Callable[[Asked], Outcome]] = {
    "zero-shot": _zero_shot,
    "prior-corrected": _prior_corrected,
    "in-context": _in_context,
    "probe": _probe,
}


def runner(contestant: Contestant) -> Callable[[Asked], Outcome]:
    """What a contestant does: from what it is given to what it reached."""
    return ASKED.get(contestant.name, _first_order if contestant.first_order else _zeroth_order)
