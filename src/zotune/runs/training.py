"""Train on a prompted task: the main job.

Every part of a run is a function of its settings: which rows are drawn, their order, the noise, the schedule. So a
killed run resumes from its last snapshot plus the ledger's lines, and ends with the bits of an uninterrupted run.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from zotune.core.ledger import check_header, has_header, read_ledger, weights_hash
from zotune.errors import DataError
from zotune.evaluation.assess import numbers
from zotune.evaluation.evaluate import fit_prior_correction, prior_corrected
from zotune.optim.optimizer import ZO
from zotune.optim.replaying import replay
from zotune.runs.config import SCHEDULES, TrainConfig
from zotune.runs.job import Job, Listener, make_optimizer, prepare
from zotune.runs.plan import plan
from zotune.runs.report import draw_curves
from zotune.runs.run_folder import ROWS, RunFolder, read_json, write_json
from zotune.tasks.objectives import SignalWatch, closure_for


def train(config: TrainConfig, listener: Listener | None = None) -> dict[str, Any]:
    """Run, or resume, and return what is written to `results.json`.

    Raises:
        ZotuneError: anything wrong with settings, model or data, before any work starts.
    """
    listener = listener or Listener()
    folder = RunFolder(config.out)
    if folder.begun(config.as_dict()) and folder.results.is_file():
        listener.say(
            f"{folder.path} holds the finished run; nothing to do. Name another folder with --out for a new one."
        )
        return read_json(folder.results)
    job = prepare(config, folder, listener)
    opt = make_optimizer(job)
    listener.plan(plan(job, opt))
    with folder.claimed({**config.as_dict(), ROWS: job.digest}) as resumed:
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


def take_steps(job: Job, opt: ZO, listener: Listener) -> Iterator[int]:
    """Take the steps that are left, yielding the number of steps taken after each."""
    config, watch = job.config, SignalWatch()
    while (step := opt.step_number) < config.steps:
        for group in opt.param_groups:
            group["lr"] = job.lr * SCHEDULES[config.schedule](step / config.steps)
        batch = [job.train[i] for i in batch_at(step, len(job.train), config.batch_size, config.data_seed)]
        loss = opt.step(closure_for(job.objective, batch, config.micro_batch))
        assert opt.last is not None
        if opt.step_number == config.steps:
            opt.fold()
        if advice := watch.step(opt.last.losses):
            listener.say(advice)
        listener.step(opt.step_number, float(loss), opt.forwards)
        yield opt.step_number


def _run(job: Job, opt: ZO, metrics: list[dict[str, Any]], listener: Listener) -> None:
    config, first = job.config, opt.step_number + 1
    for step in take_steps(job, opt, listener):
        if step == first:
            listener.say(
                f"engine {opt.engine.name}: {opt.engine.reason} ({opt.engine.check_forwards} forwards spent on checking)"
            )
        if step % config.eval_every == 0 or step == config.steps:
            _evaluate_now(job, opt, metrics, listener)
        if step % config.snapshot_every == 0 and step < config.steps:
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
    if opt.step_number > len(ledger.entries):
        raise DataError(
            f"{job.folder.ledger} has lost steps: it holds {len(ledger.entries)}, and {job.folder.snapshot.name} is of step "
            f"{opt.step_number}. Remove the snapshot to go on from the ledger's last step."
        )
    listener.say(f"resuming: snapshot of step {opt.step_number}, {len(ledger.entries)} steps in the ledger")
    replay(opt, ledger.entries, progress=lambda step: listener.say(f"replayed step {step}") if step % 50 == 0 else None)


def _baselines(job: Job, opt: ZO, metrics: list[dict[str, Any]], listener: Listener) -> dict[str, Any]:
    """Held-out numbers before training, as it is and prior-corrected. A resumed run finds them in its metrics."""
    if not metrics:
        if opt.step_number:
            raise DataError(
                f"{job.folder.metrics} has lost the evaluation of the untrained model, which cannot be made again at step "
                f"{opt.step_number}. Start again in another folder; `zotune replay` rebuilds these weights."
            )
        line = {**_stamp(0, 0), **assess_with_prior(job, listener)}
        metrics.append(line)
        job.folder.write_metrics(metrics)
        listener.evaluated(line)
    return metrics[0]


def assess_with_prior(job: Job, listener: Listener) -> dict[str, Any]:
    """Held-out numbers of the model as it is; with `prior_corrected` beside them where all rows have the same options."""
    if job.task.kind != "classification":
        return job.assessor.line(job.heldout, _progress(listener, "held out"))
    fit = job.assessor.options(job.train, _progress(listener, "training rows"))
    plain = job.assessor.options(job.heldout, _progress(listener, "held out"))
    if missing := sorted(set(range(fit.scores.shape[1])) - set(fit.labels.tolist())):
        listener.say(
            f"no prior-corrected baseline: no training row has option {', '.join(map(str, missing))}, so its bias is unknown"
        )
        return numbers(plain)
    bias = fit_prior_correction(fit.scores, fit.labels)
    corrected = prior_corrected(plain, bias)
    return {**numbers(plain), "prior_corrected": numbers(corrected), "bias": bias.tolist()}


def _evaluate_now(job: Job, opt: ZO, metrics: list[dict[str, Any]], listener: Listener) -> None:
    with opt.folded():
        now = job.assessor.line(job.heldout, _progress(listener, "held out"))
    line = {**_stamp(opt.step_number, opt.forwards), **now}
    metrics.append(line)
    job.folder.write_metrics(metrics)
    listener.evaluated(line)


def _finish(
    job: Job, opt: ZO, before: dict[str, Any], metrics: list[dict[str, Any]], listener: Listener
) -> dict[str, Any]:
    opt.fold()  # of a run that was killed after its last step; else nothing is pending here
    if metrics[-1]["step"] != opt.step_number:  # killed between the last step and its evaluation
        _evaluate_now(job, opt, metrics, listener)
    listener.say("saving")
    job.folder.save_model(job.model, job.tokenizer)
    digest = weights_hash((name, slot.tensor) for name, slot in opt.weights.slots.items())
    if opt.ledger is not None:
        opt.ledger.end(opt.describe, opt.step_number, digest)
        opt.ledger.close()
    ledger = read_ledger(job.folder.ledger)
    draw_curves(ledger, metrics, job.folder.curves, title=f"{job.config.model} on {job.config.task}, {opt.method.name}")
    results = {
        "before": _result(before),
        "prior_corrected": before.get("prior_corrected"),
        "after": _result(metrics[-1]),
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


def _result(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics without when it was taken."""
    return {
        key: value for key, value in line.items() if key not in ("step", "forwards", "time", "prior_corrected", "bias")
    }


def _stamp(step: int, forwards: int) -> dict[str, Any]:
    return {"step": step, "forwards": forwards, "time": round(time.time(), 1)}


def _progress(listener: Listener, what: str) -> Callable[[int, int], None]:
    return lambda done, total: listener.evaluating(done, total, what)
