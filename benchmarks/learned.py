"""Does a learned optimizer help? ZO Fine-tuners learned on some tasks, used on others, beside their controls.

    python benchmarks/learned.py --data-root FOLDER [--model smollm2-135m] [--learn-on agnews copa] [--tasks sst2 trec]
                                 [--forwards 400] [--seeds 0 1 2] [--estimate]

FOLDER holds <task>/train.jsonl and <task>/validation.jsonl. Two fine-tuners are learned (as published, and corrected) in
--runs; then every contestant trains on each task at equal forward passes. Learning rates are tuned for each contestant on the
first task, with rows and noise of another seed. A learned profile must beat its own controls, not only MeZO:

    mezo                equal scales
    untrained           the networks before learning: a random profile
    published           learned as published
    published-shuffled  the same networks dealt out at random among the tensors
    corrected           learned with the budget differentiated and less noise; it began with equal scales
    corrected-shuffled  the same for these
    rms                 scales in proportion to the root mean square of each tensor: simple statistics
    adaptive            gradient energy over curvature, found in the run itself (method adaptive_scales with explore=2:
                        with SmolLM2's 11 kinds of tensors its scales differ after 44 steps, 110 forwards)

Finished runs stay in the JSON and are not run again; learning resumes too. --estimate measures forward passes and says how
long all of it takes. The table and the picture go next to the JSON, as .md and .png.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import machine
from learned_report import report

from zotune.core.site import canonical_name
from zotune.errors import ClosureError
from zotune.finetuner.folder import save_folder
from zotune.finetuner.networks import FEATURES, HIDDEN, Networks
from zotune.finetuner.profile import moments
from zotune.learn.config import LearnConfig
from zotune.learn.learning import learn
from zotune.methods import METHODS
from zotune.runs.config import TrainConfig
from zotune.runs.job import Job, Listener, Loaded, draw_rows, load, make_optimizer, seat
from zotune.runs.run_folder import RunFolder, write_json
from zotune.runs.training import assess_with_prior, take_steps
from zotune.tasks.catalogue import find_task
from zotune.tasks.objectives import closure_for

TUNING_SEED = 100
VISIT = 8  # MeZO steps' worth of a visit (measured with SmolLM2-135M: 4.1 s of CPU time where a step takes 0.5)
SHUFFLE = 1


def contestants(runs: Path, batch: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name -> method and its options."""
    found: dict[str, tuple[str, dict[str, Any]]] = {
        "mezo": ("mezo", {}),
        "untrained": ("zo_finetuner", {"networks": "untrained", "batch": batch}),
    }
    for name in ("published", "corrected", "rms"):
        options = {"finetuner": str(runs / name), "batch": batch}
        found[name] = ("zo_finetuner", options)
        if name != "rms":
            found[f"{name}-shuffled"] = ("zo_finetuner", {**options, "shuffle": SHUFFLE})
    if "adaptive_scales" in METHODS:
        found["adaptive"] = ("adaptive_scales", {"explore": 2})
    return found


class Results:
    """The JSON file: settings, and an entry for each finished run."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, json.loads(json.dumps(settings))
        self.entries: list[dict[str, Any]] = []
        if path.is_file():
            before = json.loads(path.read_text())
            changed = [key for key in self.settings if before["settings"].get(key) != self.settings[key]]
            if changed:
                sys.exit(
                    f"{path} holds results with other settings ({', '.join(changed)}). Name another file with --json."
                )
            self.entries = before["entries"]

    def find(self, **key: Any) -> dict[str, Any] | None:
        return next((e for e in self.entries if all(e.get(k) == v for k, v in key.items())), None)

    def add(self, entry: dict[str, Any]) -> dict[str, Any]:
        self.entries.append(entry)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"settings": self.settings, "machine": machine(), "entries": self.entries})
        return entry


class Arena:
    """One model, put back to its start before every run."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.runs = arguments, Path(arguments.runs)
        self.loaded: Loaded | None = None
        self.start: dict[str, torch.Tensor] = {}

    def config(self, task: str, seed: int, **more: Any) -> TrainConfig:
        a = self.arguments
        return TrainConfig(
            out=str(self.runs / "run"), model=a.model, task=task, data=str(Path(a.data_root) / task), seed=seed,
            data_seed=seed, batch_size=a.batch_size, train_rows=a.train_rows, eval_rows=a.rows, precision=a.precision,
            device="cpu", **more,
        )  # fmt: skip

    def job(self, config: TrainConfig) -> Job:
        task = find_task(config.task)
        if self.loaded is None:
            self.loaded = load(config, task, Listener())
            self.start = {name: p.detach().clone() for name, p in self.loaded.model.named_parameters()}
        loaded = replace(self.loaded, task=task, rows=draw_rows(config, task, Listener()))
        with torch.no_grad():
            for name, parameter in loaded.model.named_parameters():
                parameter.copy_(self.start[name])
        return seat(loaded, loaded.model, config, RunFolder(config.out), Listener())

    def run(self, method: str, options: dict[str, Any], task: str, seed: int, lr: float) -> dict[str, Any]:
        """Train and evaluate; a run that diverges has an infinite loss."""
        config = self.config(task, seed, lr=lr, method=method, method_options=options, steps=1)
        job = self.job(config)
        job.folder.path.mkdir(parents=True, exist_ok=True)
        job.folder.ledger.unlink(missing_ok=True)
        opt = make_optimizer(job)
        steps = int(self.arguments.forwards // opt.method.forwards_for([slot.site for slot in opt.weights]))
        job.config = replace(config, steps=max(1, steps))
        began = time.perf_counter()
        try:
            for _ in take_steps(job, opt, Listener()):
                pass
            seconds = time.perf_counter() - began
            line = job.assessor.line(job.heldout)
        except ClosureError:
            seconds, line = time.perf_counter() - began, {"loss": math.inf, "accuracy": 0.0}
        if opt.ledger is not None:
            opt.ledger.close()
        loss = line["loss"] if math.isfinite(line["loss"]) else math.inf
        return {
            "loss": min(loss, 1e9),
            "accuracy": line["accuracy"],
            "forwards": opt.forwards,
            "seconds": round(seconds, 2),
        }

    def bars(self, task: str, seed: int) -> dict[str, Any]:
        """Before training, as it is and, where all rows have the same options, with a prior fitted on the training rows."""
        line = assess_with_prior(self.job(self.config(task, seed)), Listener())
        kept = {key: line[key] for key in ("loss", "accuracy")}
        corrected = line.get("prior_corrected")
        return {**kept, **({} if corrected is None else {"prior_corrected": {key: corrected[key] for key in kept}})}

    def seconds_of_a_step(self, task: str) -> tuple[float, float]:
        """CPU time of a MeZO step and of a plain forward: what others do on this machine does not count."""
        job = self.job(self.config(task, TUNING_SEED, lr=0.0))
        job.folder.path.mkdir(parents=True, exist_ok=True)
        job.folder.ledger.unlink(missing_ok=True)
        closure, opt = closure_for(job.objective, job.train[: self.arguments.batch_size], None), make_optimizer(job)
        taken = []
        with torch.no_grad():
            for run in (lambda: opt.step(closure), closure):
                run()
                began = time.process_time()
                run()
                run()
                taken.append((time.process_time() - began) / 2)
        return taken[0], taken[1]


class Told(Listener):
    """A line for every visit's hundredth, and what is said."""

    def say(self, message: str) -> None:
        print(message, flush=True)

    def step(self, step: int, loss: float, forwards: int) -> None:
        if step % 10 == 0:
            print(f"visit {step}, loss {loss:.3f}", flush=True)


def learn_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Both fine-tuners and the folder of simple statistics; what was there stays. Returns how far the networks moved."""
    runs = Path(arguments.runs)
    shared = {
        "model": arguments.model, "tasks": ",".join(arguments.learn_on), "data": arguments.data_root, "device": "cpu",
        "batch_size": arguments.batch_size, "precision": arguments.precision, "epochs": arguments.epochs,
        "epochs_per_restart": arguments.epochs_per_restart, "train_rows": arguments.learn_rows, "snapshot_every": 20,
    }  # fmt: skip
    facts = {}
    for name, variant, lr_update in (
        ("published", "paper", 1e-6),
        ("corrected", "corrected", arguments.lrs[len(arguments.lrs) // 2]),
    ):
        config = LearnConfig(out=str(runs / name), variant=variant, lr_update=lr_update, **shared)
        facts[name] = learn(config, Told())["learned"]
    return facts


def statistics_folder(arena: Arena, folder: Path) -> None:
    """Networks that always answer the root mean square of their tensor."""
    if folder.exists():
        return
    arena.job(arena.config(arena.arguments.tasks[0], TUNING_SEED))
    names = [canonical_name(name) for name in arena.start]
    sizes = [math.sqrt(m * m + v) for m, v in (moments(p) for p in arena.start.values())]
    n = len(names)
    made = Networks(
        tuple(names), torch.zeros(n, HIDDEN, len(FEATURES)), torch.zeros(n, HIDDEN), torch.zeros(n, HIDDEN),
        torch.tensor(sizes),
    )  # fmt: skip
    save_folder(folder, made, {"networks": "root mean square of each tensor"})


def estimate(arena: Arena, count: int) -> None:
    """Say how long everything takes on one free thread of this machine."""
    a = arena.arguments
    seconds = {task: arena.seconds_of_a_step(task) for task in dict.fromkeys([*a.learn_on, *a.tasks])}
    rounds = a.epochs * -(-a.learn_rows // a.batch_size)
    learning = 2 * rounds * VISIT * sum(seconds[task][0] for task in a.learn_on)
    reading = {task: seconds[task][1] / a.batch_size for task in a.tasks}  # of one row
    of_run = {task: seconds[task][0] * a.forwards / 2 + reading[task] * a.rows for task in a.tasks}
    runs = count * (len(a.lrs) * of_run[a.tasks[0]] + len(a.seeds) * sum(of_run.values()))
    bars = len(a.seeds) * sum(reading[task] * (a.rows + a.train_rows) for task in a.tasks)
    for task, (step, forward) in seconds.items():
        print(f"{task}: {step:.2f} s a step of MeZO, {1 / forward:.2f} plain forwards of {a.batch_size} a second")
    total = (learning + runs + bars) / 60
    print(
        f"learning {learning / 60:.0f} min, {count} contestants {runs / 60:.0f} min, bars {bars / 60:.0f} min: "
        f"{total:.0f} min on one thread"
    )


def tune(arena: Arena, results: Results, name: str, method: str, options: dict[str, Any]) -> float:
    """The learning rate with the lowest held-out loss on the first task, with rows and noise of another seed."""
    task, found = arena.arguments.tasks[0], {}
    for lr in arena.arguments.lrs:
        key = {"stage": "tuning", "contestant": name, "task": task, "seed": TUNING_SEED, "lr": lr}
        entry = results.find(**key) or results.add({**key, **arena.run(method, options, task, TUNING_SEED, lr)})
        found[lr] = entry["loss"]
        print(f"{name:18} tuning {task}: lr {lr:g} loss {entry['loss']:.4f}", flush=True)
    return min(found, key=lambda lr: found[lr])


def compete(arena: Arena, results: Results) -> None:
    a = arena.arguments
    for task in a.tasks:
        for seed in a.seeds:
            key = {"stage": "bars", "task": task, "seed": seed}
            if results.find(**key) is None:
                results.add({**key, **arena.bars(task, seed)})
    chosen = contestants(arena.runs, a.batch_size)
    rates = {name: tune(arena, results, name, *what) for name, what in chosen.items()}
    for seed in a.seeds:  # seed by seed, so that a run cut short compares all contestants
        for task in a.tasks:
            for name, what in chosen.items():
                key = {"stage": "final", "contestant": name, "task": task, "seed": seed, "lr": rates[name]}
                if results.find(**key) is None:
                    entry = results.add({**key, **arena.run(*what, task, seed, rates[name])})
                    print(
                        f"{name:18} {task} seed {seed}: loss {entry['loss']:.4f}, acc {entry['accuracy']:.3f}",
                        flush=True,
                    )
                    report(results.path, a.lrs, picture=False)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--learn-on", nargs="+", default=["agnews", "copa"])
    parser.add_argument("--tasks", nargs="+", default=["sst2", "trec"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--lrs", nargs="+", type=float, default=[3e-6, 1e-5, 3e-5, 1e-4])
    parser.add_argument("--forwards", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--train-rows", type=int, default=200)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--epochs-per-restart", type=int, default=2)
    parser.add_argument("--learn-rows", type=int, default=64)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", default="runs/learned")
    parser.add_argument("--json", default="docs/results/learned.json")
    parser.add_argument("--estimate", action="store_true", help="only say how long it takes")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse(words)
    torch.set_num_threads(arguments.threads)
    settings = {
        key: value
        for key, value in vars(arguments).items()
        if key not in ("json", "runs", "estimate", "threads", "data_root")
    }
    results = Results(Path(arguments.json), settings)
    arena = Arena(arguments)
    if arguments.estimate:
        estimate(arena, len(contestants(arena.runs, arguments.batch_size)))
        return
    facts = learn_all(arguments)
    if results.find(stage="learning") is None:
        results.add({"stage": "learning", **{name: {k: f[k] for k in f if k != "scales"} for name, f in facts.items()}})
    statistics_folder(arena, Path(arguments.runs) / "rms")
    compete(arena, results)
    report(results.path, arguments.lrs)


if __name__ == "__main__":
    main()
