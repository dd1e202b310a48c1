"""The commands. Heavy libraries are imported inside them, so that `--help` answers at once."""

from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from zotune.cli.compare import compare
from zotune.cli.finetuner import import_finetuner
from zotune.cli.learn import learn
from zotune.cli.settings import say_unused, with_settings
from zotune.errors import ConfigError
from zotune.runs.config import TrainConfig, load_config

app = typer.Typer(
    name="zotune",
    help="Fine-tune language models with forward passes only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
@with_settings
def train(recipe: Path | None, given: dict[str, Any]) -> None:
    """Fine-tune a model on a task. The same command resumes a killed run."""
    config = load_config(recipe, given)
    from zotune.cli.display import Display, show_results
    from zotune.runs.training import train as run

    with Display(config.steps) as display:
        results = run(config, display)
    show_results(results, Path(config.out))


# How a run trains and where it is kept; `evaluate` does neither.
OF_TRAINING = (
    "out", "mode", "mode_options", "method", "method_options", "rule", "rule_options", "steps", "lr", "eps", "weight_decay",
    "schedule", "eval_every", "snapshot_every", "seed", "fold_every", "low_precision", "engine", "noise",
)  # fmt: skip


@app.command()
@partial(with_settings, hidden=set(OF_TRAINING) - {"out"})
def evaluate(
    recipe: Path | None,
    given: dict[str, Any],
    demonstrations: Annotated[int, typer.Option(help="Also ask with so many solved examples before; MeZO: 32.")] = 0,
    calibrate: Annotated[bool, typer.Option(help="Also take off what the model thinks without the question.")] = False,
    harness: Annotated[
        str | None,
        typer.Option(help="Ask lm-evaluation-harness instead: names of its tasks or YAML files, separated by commas."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="With --harness: rows per task, for trying out.")] = None,
) -> None:
    """Accuracy (or F1, reward) on held-out rows, beside the prior-corrected baseline; nothing is trained."""
    if harness is not None:
        from zotune.cli.harness import evaluate_with_harness

        if calibrate:
            raise ConfigError("--calibrate does not go with --harness, whose tasks say how they are scored.")
        evaluate_with_harness(recipe, given, harness, shots=demonstrations or None, limit=limit)
        return
    if limit is not None:
        raise ConfigError("--limit goes with --harness. Here --eval-rows says how many held-out rows are asked.")
    say_unused("evaluate", given, OF_TRAINING)
    config = load_config(recipe, given)
    config = replace(
        config, **{f.name: getattr(TrainConfig(), f.name) for f in fields(config) if f.name in OF_TRAINING}
    )
    from zotune.cli.display import Display, show_evaluation
    from zotune.runs.asking import ask
    from zotune.runs.job import prepare
    from zotune.runs.run_folder import RunFolder, trained_folder, trained_on
    from zotune.tasks.catalogue import TASKS, find_task
    from zotune.tasks.task import refuse_overlap

    config = replace(config, model=trained_folder(config.model))
    # of zotune's own tasks alone: to know another, a file that a downloaded folder names would have to be run
    if (other := TASKS.get(trained_on(config.model) or "")) is not None:
        refuse_overlap(other, find_task(config.task))
    with Display(0) as display:
        job = prepare(config, RunFolder(config.out), display)
        rows = ask(job, display, demonstrations=demonstrations, calibrate=calibrate)
    show_evaluation(rows, config, len(job.heldout))


@app.command()
def replay(
    base: Annotated[str, typer.Option(help="The model that the run started from: hub id, folder, .gguf or alias.")],
    ledger: Annotated[Path, typer.Option(help="The run's ledger.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for the rebuilt model; must not exist.")],
) -> None:
    """Rebuild trained weights from base weights and a ledger: no data, no forward pass."""
    from zotune.cli.display import Display
    from zotune.runs.rebuild import rebuild

    with Display(0) as display:
        outcome = rebuild(base, ledger, out, display)
    typer.echo(outcome)


app.command()(compare)
app.command()(learn)
app.command(name="import-finetuner")(import_finetuner)


@app.command()
def methods() -> None:
    """The methods: paper, forwards per step, extra memory."""
    from zotune.cli.display import show_methods

    show_methods()


@app.command()
def tasks() -> None:
    """The tasks: kind, objective, where rows come from."""
    from zotune.cli.display import show_tasks

    show_tasks()


@app.command()
def doctor() -> None:
    """Versions, devices, and which optional features are off, and why."""
    from zotune.cli.doctor import show_doctor

    show_doctor()


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Fine-tune language models with forward passes only."""
    if show:
        from zotune.version import __version__

        typer.echo(f"zotune {__version__}")
        raise typer.Exit()
