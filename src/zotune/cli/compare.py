"""`zotune compare`: ways of doing a task in one table."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from zotune.cli.settings import say_unused, with_settings
from zotune.runs.config import load_config

UNUSED = ("steps", "eval_every", "snapshot_every")  # --forwards says how long


@partial(with_settings, hidden=UNUSED)
def compare(
    recipe: Path | None,
    given: dict[str, Any],
    contestants: Annotated[
        str | None,
        typer.Option(
            "--with",
            help="Contestants, separated by commas: zero-shot, prior-corrected, in-context, probe, any method, adamw, "
            "adamw-lora; with a mode and a learning rate as in mezo:lora@1e-4. Default: the usual ones for the task.",
            show_default=False,
        ),
    ] = None,
    forwards: Annotated[float, typer.Option(help="Forward passes (or equivalents) for each trained contestant.")] = 400,
    demonstrations: Annotated[int, typer.Option(help="Solved rows before each question of in-context.")] = 8,
) -> None:
    """Zeroth-order methods beside zero-shot, in-context, a probe and AdamW: same rows, same budget. Resumes when killed."""
    say_unused("compare", given, UNUSED)
    config = load_config(recipe, given)
    from zotune.baselines import comparison_table
    from zotune.cli.comparison_display import ComparisonDisplay
    from zotune.cli.console import console
    from zotune.comparison.comparing import compare as run
    from zotune.comparison.comparing import failures, rows_of

    names = None if contestants is None else [name for name in contestants.split(",") if name.strip()]
    display = ComparisonDisplay()
    with display:
        entries = run(config, names, forwards=forwards, demonstrations=demonstrations, listener=display)
    console.print(comparison_table(rows_of(entries)))
    for line in failures(entries):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"Folder: {config.out}  (comparison.md, comparison.png)", highlight=False, soft_wrap=True)
