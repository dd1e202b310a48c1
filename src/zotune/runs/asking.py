"""Ways of asking an untrained or trained model: as it is, prior-corrected, calibrated, with demonstrations."""

from typing import Any

from zotune.errors import ConfigError
from zotune.evaluation.assess import numbers
from zotune.evaluation.evaluate import evaluate_calibrated
from zotune.runs.job import Job, Listener
from zotune.runs.training import assess_with_prior
from zotune.tasks.demonstrations import with_demonstrations
from zotune.tasks.encoding import Encoded, encode_all, special_tokens, truncation
from zotune.tasks.scoring import OptionScorer, context_of
from zotune.tasks.task import Example, calibration_example

Rows = dict[str, dict[str, Any]]


def ask(job: Job, listener: Listener, *, demonstrations: int = 0, calibrate: bool = False) -> Rows:
    """Held-out numbers, a row for each way of asking.

    Args:
        job: from `prepare`; nothing is trained.
        listener: is told of progress.
        demonstrations: solved training examples before each question (MeZO shows 32), drawn by `data_seed`; 0 for none.
        calibrate: also take from each option what the model thinks of it without the question.

    Raises:
        ConfigError: demonstrations or calibration are asked of a masked model, or calibration of a generation task.
    """
    _check(job, demonstrations, calibrate)
    plain = assess_with_prior(job, listener)
    rows = {"as it is": plain}
    if "prior_corrected" in plain:
        rows["prior-corrected"] = plain["prior_corrected"]
    if calibrate:
        rows["calibrated"] = _calibrated(job)
    if demonstrations:
        rows[f"{demonstrations} demonstrations"] = in_context(job, listener, demonstrations)
    return rows


def in_context(job: Job, listener: Listener, count: int) -> dict[str, Any]:
    """Held-out numbers with solved training examples before each question, one set for all."""
    encoded = demonstrated(job, listener, count)
    return job.assessor.line(encoded, lambda done, total: listener.evaluating(done, total, "held out, in context"))


def demonstrated(job: Job, listener: Listener, count: int) -> list[Encoded]:
    """The held-out rows behind solved training examples."""
    asked = with_demonstrations(_words(job.heldout), _words(job.train), count=count, seed=job.config.data_seed)
    encoded = _encode(job, asked)
    if truncation(encoded).examples:
        listener.say(f"with demonstrations: {truncation(encoded)}")
    return encoded


def _calibrated(job: Job) -> dict[str, Any]:
    calibration = _encode(job, [calibration_example(job.task, example) for example in _words(job.heldout)])
    batch = job.assessor.batch_size
    return numbers(evaluate_calibrated(job.scorer, job.heldout, calibration, batch_size=batch))


def _check(job: Job, demonstrations: int, calibrate: bool) -> None:
    if (demonstrations or calibrate) and not isinstance(job.scorer, OptionScorer):
        raise ConfigError("demonstrations and calibration are for causal models; this one fills in masks.")
    if calibrate and job.task.kind == "generation":
        raise ConfigError(f"task {job.task.name!r} has no options to calibrate; leave calibration out.")


def _encode(job: Job, examples: list[Example]) -> list[Encoded]:
    longest = min(job.config.max_length, context_of(job.model) or job.config.max_length)
    return encode_all(examples, job.tokenizer, longest, **special_tokens(job.tokenizer))


def _words(encoded: list[Encoded]) -> list[Example]:
    return [one.example for one in encoded if one.example is not None]
