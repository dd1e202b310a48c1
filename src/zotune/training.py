"""Train on a prompted classification task: the main job.

Every part of a run is a function of its settings: which rows are drawn, their order, the noise, the schedule. So a
killed run resumes from its last snapshot plus the ledger's lines, and ends with the bits of an uninterrupted run.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from zotune.config import TrainConfig
from zotune.core.errors import DataError
from zotune.core.ledger import check_header, has_header, read_ledger, weights_hash
from zotune.evaluate import Evaluation, evaluate, fit_prior_correction, prior_corrected
from zotune.job import Job, Listener, make_optimizer, plan, prepare
from zotune.optimizer import ZO
from zotune.replaying import replay
from zotune.report import draw_curves
from zotune.run_folder import RunFolder, write_json
from zotune.tasks.encoding import Encoded
from zotune.tasks.scoring import OptionScorer

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def train(config: TrainConfig, listener: Listener | None = None) -> dict[str, Any]:
    """Run, or resume, and return what is written to `results.json`.

    Raises:
        ZotuneError: anything wrong with settings, model or data, before any work starts.
    """
    listener = listener or Listener()
    folder = RunFolder(config.out)
    resumed = folder.claim(config.as_dict())
    if resumed and folder.results.is_file():
        listener.say(
            f"{folder.path} holds the finished run; nothing to do. Name another folder with --out for a new one."
        )
        results: dict[str, Any] = json.loads(folder.results.read_text(encoding="utf-8"))
        return results
    job = prepare(config, folder, listener)
    opt = make_optimizer(job)
    listener.plan(plan(job, opt))
    metrics = folder.read_metrics()
    if resumed:
        _resume(job, opt, listener)
        metrics = [line for line in metrics if line["step"] <= opt.step_number]
    before = _baselines(job, opt, metrics, listener)
    _run(job, opt, metrics, listener)
    return _finish(job, opt, before, metrics, listener)


def batch_at(step: int, count: int, size: int, seed: int) -> list[int]:
    """Which rows make the batch of a step: walks through a new permutation each epoch; a function of its arguments."""
    chosen: list[int] = []
    position = step * size
    while len(chosen) < size:
        epoch, offset = divmod(position + len(chosen), count)
        order = np.random.default_rng([seed, epoch]).permutation(count)
        chosen += order[offset : offset + size - len(chosen)].tolist()
    return chosen


def closure_for(scorer: OptionScorer, batch: Sequence[Encoded], micro_batch: int | None) -> Callable[[], Tensor]:
    """The loss of a batch, as a 0-d tensor; in micro-batches the mean over examples stays the same."""
    size = micro_batch or len(batch)
    parts = [batch[start : start + size] for start in range(0, len(batch), size)]

    def closure() -> Tensor:
        if len(parts) == 1:
            return scorer.loss(parts[0])
        total = scorer.loss(parts[0]).double() * len(parts[0])
        for part in parts[1:]:
            total = total + scorer.loss(part).double() * len(part)
        return total / total.new_tensor(len(batch))  # by a tensor: CUDA divides by a number as by its reciprocal

    return closure


def _run(job: Job, opt: ZO, metrics: list[dict[str, Any]], listener: Listener) -> None:
    config, first = job.config, opt.step_number
    while (step := opt.step_number) < config.steps:
        for group in opt.param_groups:
            group["lr"] = job.lr * SCHEDULES[config.schedule](step / config.steps)
        batch = [job.train[i] for i in batch_at(step, len(job.train), config.batch_size, config.data_seed)]
        loss = opt.step(closure_for(job.scorer, batch, config.micro_batch))
        assert loss is not None
        if step == first:
            listener.say(
                f"engine {opt.engine.name}: {opt.engine.reason} ({opt.engine.check_forwards} forwards spent on checking)"
            )
        listener.step(opt.step_number, float(loss), opt.forwards)
        if opt.step_number % config.eval_every == 0 or opt.step_number == config.steps:
            _evaluate_now(job, opt, metrics, listener)
        if opt.step_number % config.snapshot_every == 0 and opt.step_number < config.steps:
            _snapshot(job, opt, listener)


def _snapshot(job: Job, opt: ZO, listener: Listener) -> None:
    try:
        if opt.ledger is not None:
            opt.ledger.sync()
        job.folder.save_snapshot(opt)
    except OSError as error:  # a snapshot only saves time: the ledger has every step
        listener.say(f"no snapshot of step {opt.step_number}: {error}. The ledger holds the run; training goes on.")


def _resume(job: Job, opt: ZO, listener: Listener) -> None:
    if not has_header(job.folder.ledger):
        return
    ledger = read_ledger(job.folder.ledger)
    assert opt.ledger is not None
    check_header(ledger.header, {**opt.describe(), "base": opt.ledger.base}, job.folder.ledger)
    job.folder.load_snapshot(opt)
    listener.say(f"resuming: snapshot of step {opt.step_number}, {len(ledger.entries)} steps in the ledger")
    replay(opt, ledger.entries, progress=lambda step: listener.say(f"replayed step {step}") if step % 50 == 0 else None)


def _baselines(job: Job, opt: ZO, metrics: list[dict[str, Any]], listener: Listener) -> dict[str, Any]:
    """Held-out accuracy before training, as it is and prior-corrected. A resumed run finds them in its metrics."""
    if not metrics:
        if opt.step_number:
            raise DataError(
                f"{job.folder.metrics} has lost the evaluation of the untrained model, which cannot be made again at step "
                f"{opt.step_number}. Start again in another folder; `zotune replay` rebuilds these weights."
            )
        fit = evaluate(
            job.scorer, job.train, batch_size=2 * job.config.batch_size, progress=_progress(listener, "training rows")
        )
        before = evaluate(
            job.scorer, job.heldout, batch_size=2 * job.config.batch_size, progress=_progress(listener, "held out")
        )
        bias = fit_prior_correction(fit.scores, fit.labels)
        corrected = prior_corrected(before, bias)
        line = {**_line(0, 0, before), "prior_corrected": _numbers(corrected), "bias": bias.tolist()}
        metrics.append(line)
        job.folder.write_metrics(metrics)
        listener.evaluated(line)
    return metrics[0]


def _evaluate_now(job: Job, opt: ZO, metrics: list[dict[str, Any]], listener: Listener) -> None:
    progress = _progress(listener, "held out")
    now = evaluate(job.scorer, job.heldout, batch_size=2 * job.config.batch_size, progress=progress)
    line = _line(opt.step_number, opt.forwards, now)
    metrics.append(line)
    job.folder.write_metrics(metrics)
    listener.evaluated(line)


def _finish(
    job: Job, opt: ZO, before: dict[str, Any], metrics: list[dict[str, Any]], listener: Listener
) -> dict[str, Any]:
    if metrics[-1]["step"] != opt.step_number:  # killed between the last step and its evaluation
        _evaluate_now(job, opt, metrics, listener)
    listener.say("saving")
    job.folder.save_model(job.model, job.tokenizer)
    digest = weights_hash((name, slot.tensor) for name, slot in opt.weights.slots.items())
    if opt.ledger is not None:
        opt.ledger.end(opt.step_number, digest)
        opt.ledger.close()
    ledger = read_ledger(job.folder.ledger)
    draw_curves(ledger, metrics, job.folder.curves, title=f"{job.config.model} on {job.config.task}, {opt.method.name}")
    results = {
        "before": {key: before[key] for key in ("accuracy", "standard_error", "loss")},
        "prior_corrected": before["prior_corrected"],
        "after": {key: metrics[-1][key] for key in ("accuracy", "standard_error", "loss")},
        "heldout_rows": len(job.heldout),
        "steps": opt.step_number,
        "refused_steps": opt.refused,
        "forwards": opt.forwards,
        "weights": digest,
        "settings": job.config.as_dict(),
        "versions": ledger.header["versions"],
    }
    write_json(job.folder.results, results)
    job.folder.snapshot.unlink(missing_ok=True)
    return results


def _line(step: int, forwards: int, evaluation: Evaluation) -> dict[str, Any]:
    return {"step": step, **_numbers(evaluation), "time": round(time.time(), 1)}


def _numbers(evaluation: Evaluation) -> dict[str, float]:
    return {
        "accuracy": evaluation.accuracy,
        "standard_error": evaluation.standard_error,
        "loss": evaluation.mean_loss,
    }


def _progress(listener: Listener, what: str) -> Callable[[int, int], None]:
    return lambda done, total: listener.evaluating(done, total, what)
