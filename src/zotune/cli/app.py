"""The commands. Heavy libraries are imported inside them, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from zotune.cli.finetuner import import_finetuner
from zotune.cli.settings import with_settings
from zotune.config import load_config

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
    from zotune.training import train as run

    with Display(config.steps) as display:
        results = run(config, display)
    show_results(results, Path(config.out))


@app.command()
def evaluate(
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file, or smollm2-135m.")] = "smollm2-135m",
    task: Annotated[str, typer.Option(help="Task.")] = "vader_movie",
    data: Annotated[str | None, typer.Option(help="Folder with train.jsonl and validation.jsonl.")] = None,
    train_rows: Annotated[int, typer.Option(help="Training rows on which the prior correction is fitted.")] = 500,
    eval_rows: Annotated[int, typer.Option(help="Held-out rows.")] = 300,
    batch_size: Annotated[int, typer.Option(help="Examples per forward pass; changes nothing but speed.")] = 32,
    data_seed: Annotated[int, typer.Option(help="Fixes which rows are drawn.")] = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32, autocast, bf16 or fp16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
) -> None:
    """Accuracy on held-out rows, beside the prior-corrected baseline (one bias per option, weights untouched)."""
    config = load_config(
        None,
        {
            "model": model, "task": task, "data": data, "train_rows": train_rows, "eval_rows": eval_rows,
            "batch_size": batch_size, "data_seed": data_seed, "precision": precision, "device": device,
        },
    )  # fmt: skip
    from zotune.cli.display import Display, show_evaluation
    from zotune.evaluate import evaluate as score
    from zotune.evaluate import fit_prior_correction, prior_corrected
    from zotune.job import prepare
    from zotune.run_folder import RunFolder, trained_on
    from zotune.tasks.catalogue import find_task
    from zotune.tasks.task import refuse_overlap

    if (other := trained_on(model)) is not None:
        refuse_overlap(find_task(other), find_task(task))
    with Display(0) as display:
        job = prepare(config, RunFolder(config.out), display)
        fit = score(job.scorer, job.train, batch_size=batch_size, progress=display.counter("training rows"))
        plain = score(job.scorer, job.heldout, batch_size=batch_size, progress=display.counter("held out"))
    show_evaluation(plain, prior_corrected(plain, fit_prior_correction(fit.scores, fit.labels)), config)


@app.command()
def replay(
    base: Annotated[str, typer.Option(help="The model that the run started from: hub id, folder, .gguf or alias.")],
    ledger: Annotated[Path, typer.Option(help="The run's ledger.jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder for the rebuilt model; must not exist.")],
) -> None:
    """Rebuild trained weights from base weights and a ledger: no data, no forward pass."""
    from zotune.cli.display import Display
    from zotune.rebuild import rebuild

    with Display(0) as display:
        outcome = rebuild(base, ledger, out, display)
    typer.echo(outcome)


app.command(name="import-finetuner")(import_finetuner)


@app.command()
def methods() -> None:
    """The methods: paper, forwards per step, extra memory."""
    from zotune.cli.display import show_methods

    show_methods()


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
