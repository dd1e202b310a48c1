"""Small models on a CPU: zeroth-order training beside its baselines, on six tasks, with one budget of forward passes.

    python benchmarks/tasks.py --data-root FOLDER [--forwards 400] [--seeds 0] [--rows 300] [--tasks sst2 rte ...]

FOLDER holds <task>/train.jsonl and <task>/validation.jsonl for sst2, rte, cb, copa, agnews and trec. Each task and seed is
a `zotune compare` in --runs, so what was killed goes on with the next contestant; after each contestant the numbers are
written to docs/tasks.json, and the table to docs/tasks_results.md. A seed draws the rows, their order and all noise.

Learning rates are given, not searched: mezo and es estimate the same gradient, so they start from the same one.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import machine, write

from zotune.cli.comparison_display import ComparisonDisplay
from zotune.comparison.comparing import compare
from zotune.errors import ConfigError
from zotune.runs.config import TrainConfig
from zotune.tasks.catalogue import find_task

TASKS = ("sst2", "rte", "cb", "copa", "agnews", "trec")
LEFT_OUT = ("correct", "interval", "memory_how", "what")


class Collector(ComparisonDisplay):
    """Writes the results down after each contestant."""

    def __init__(self, results: "Results", task: str, seed: int) -> None:
        super().__init__()
        self._results, self._task, self._seed = results, task, seed

    def finished(self, entry: dict[str, Any]) -> None:
        super().finished(entry)
        self._results.add(self._task, self._seed, entry)


class Results:
    """docs/tasks.json and docs/tasks_results.md."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.json, self.markdown = Path(arguments.json), Path(arguments.markdown)
        settings = {
            key: getattr(arguments, key)
            for key in (
                "model",
                "forwards",
                "rows",
                "train_rows",
                "batch_size",
                "schedule",
                "eps",
                "precision",
                "demonstrations",
            )
        }
        self.held: dict[str, Any] = {"settings": settings, "runs": {}}
        if self.json.is_file():
            self.held = json.loads(self.json.read_text())
            if self.held["settings"] != settings:
                raise ConfigError(
                    f"{self.json} holds results with other settings ({self.held['settings']}, now {settings}). Give others "
                    "for --json and --markdown, or the same settings."
                )
        self.held["commands"] = list(dict.fromkeys([*self.held.get("commands", []), _command()]))
        self.held["machine"] = machine()

    def add(self, task: str, seed: int, entry: dict[str, Any]) -> None:
        run = self.held["runs"].setdefault(task, {}).setdefault(str(seed), {})
        kept = {key: value for key, value in entry.items() if key not in LEFT_OUT}
        before = {key: value for key, value in run.get(entry["what"], {}).items() if key != "threads"}
        if before != kept:
            run[entry["what"]] = {**kept, "threads": torch.get_num_threads()}
            write(str(self.json), self.held)
            self.markdown.write_text(markdown(self.held))


def _command() -> str:
    """The command line, without where the rows lie on this machine."""
    words = ["python", "benchmarks/tasks.py", *sys.argv[1:]]
    hidden = [f"{word.split('=')[0]}=FOLDER" if word.startswith("--data-root=") else word for word in words]
    return " ".join(
        "FOLDER" if before == "--data-root" else word for before, word in zip(["", *hidden], hidden, strict=False)
    )


def markdown(held: dict[str, Any]) -> str:
    """Accuracies by contestant and task, then what they cost."""
    settings, made, runs = held["settings"], held["machine"], held["runs"]
    tasks = [task for task in TASKS if task in runs]
    labels = list(dict.fromkeys(what for task in tasks for run in runs[task].values() for what in run))
    seeds = sorted({int(seed) for task in tasks for seed in runs[task]})
    commands = " and ".join(f"`{command}`" for command in held["commands"])
    lines = [
        "# Tasks on a CPU",
        "",
        f"{settings['model']}, {settings['forwards']:g} forward passes of {settings['batch_size']} examples for each trained "
        f"contestant, {settings['train_rows']} training rows, at most {settings['rows']} held out, precision "
        f"{settings['precision']}, schedule {settings['schedule']} (AdamW: always linear), seeds {', '.join(map(str, seeds))}. "
        "Accuracy ± one standard error, the mean where there are several seeds; learning rates were given, not searched.",
        "",
        f"Made by {commands} on {made['cpu']}, {made['threads']} threads, torch {made['torch']}, transformers "
        f"{made['transformers']}, zotune {made['zotune']} ({made['commit']}).",
        "",
        f"| | {' | '.join(tasks)} |",
        "|" + "---|" * (len(tasks) + 1),
    ]
    for what in labels:
        lines.append(f"| {what} | {' | '.join(_accuracy(runs[task], what) for task in tasks)} |")
    lines += [
        "",
        "Forward-equivalents, and seconds and peak memory beside the model in the median over tasks and seeds:",
        "",
    ]
    lines += ["| | forward-equivalents | seconds | MiB |", "|---|---|---|---|"]
    for what in labels:
        found = [
            run[what] for task in tasks for run in runs[task].values() if what in run and "failed" not in run[what]
        ]
        lines.append(f"| {what} | {' | '.join(_median(found, *column) for column in COLUMNS)} |")
    broken = [
        f"{what} on {task}, seed {seed}: {entry['failed']}"
        for task in tasks
        for seed, run in runs[task].items()
        for what, entry in run.items()
        if "failed" in entry
    ]
    return "\n".join([*lines, *(["", "Broke off:", "", *(f"- {line}" for line in broken)] if broken else [])]) + "\n"


COLUMNS = (("forwards", 1.0), ("seconds", 1.0), ("memory", 2.0**20))


def _accuracy(seeds: dict[str, Any], what: str) -> str:
    found = [run[what] for run in seeds.values() if what in run and "failed" not in run[what]]
    if not found:
        return "-"
    mean = sum(entry["accuracy"] for entry in found) / len(found)
    error = math.sqrt(sum(entry["standard_error"] ** 2 for entry in found)) / len(found)
    return f"{mean:.3f} ± {error:.3f}"


def _median(found: list[dict[str, Any]], key: str, unit: float) -> str:
    values = [entry[key] / unit for entry in found if entry[key] is not None]
    return f"{median(values):,.0f}" if values else "-"


def contestants(arguments: argparse.Namespace, task: str) -> list[str]:
    options = ["prior-corrected"] if find_task(task).kind == "classification" else []
    trained = [f"{name}@{getattr(arguments, f'{name}_lr'):g}" for name in ("mezo", "es", "adamw")]
    return ["zero-shot", *options, "in-context", *trained]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--forwards", type=float, default=400)
    parser.add_argument("--rows", type=int, default=300, help="held out")
    parser.add_argument("--train-rows", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--demonstrations", type=int, default=8)
    parser.add_argument("--mezo-lr", type=float, default=3e-5)
    parser.add_argument("--es-lr", type=float, default=3e-5)
    parser.add_argument("--adamw-lr", type=float, default=1e-5)
    parser.add_argument("--eps", type=float, default=1e-3)
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--runs", type=Path, default=Path("runs/tasks"))
    parser.add_argument("--json", default="docs/tasks.json")
    parser.add_argument("--markdown", default="docs/tasks_results.md")
    arguments = parser.parse_args()
    if missing := [task for task in arguments.tasks if not (arguments.data_root / task).is_dir()]:
        raise ConfigError(
            f"--data-root has no folder for {', '.join(missing)}; add them, or leave the tasks out of --tasks."
        )
    results = Results(arguments)
    base = TrainConfig(
        model=arguments.model, batch_size=arguments.batch_size, eps=arguments.eps, schedule=arguments.schedule,
        train_rows=arguments.train_rows, eval_rows=arguments.rows, precision=arguments.precision, device="cpu",
    )  # fmt: skip
    for seed in arguments.seeds:
        for task in arguments.tasks:
            config = replace(
                base, task=task, data=str(arguments.data_root / task), seed=seed, data_seed=seed,
                out=str(arguments.runs / task / f"seed{seed}"),
            )  # fmt: skip
            print(f"== {task}, seed {seed}", flush=True)
            display = Collector(results, task, seed)
            with display:
                entries = compare(
                    config,
                    contestants(arguments, task),
                    forwards=arguments.forwards,
                    demonstrations=arguments.demonstrations,
                    listener=display,
                )
            for entry in entries:  # also what an earlier run had finished, if its numbers got lost since
                results.add(task, seed, entry)
    print(results.markdown.read_text())


if __name__ == "__main__":
    main()
