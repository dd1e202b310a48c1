"""`zotune evaluate --harness TASK`: lm-evaluation-harness asks a trained folder, a hub model or the packaged one."""

from pathlib import Path
from typing import Any

from zotune.errors import ConfigError
from zotune.runs.config import TrainConfig, load_config

RESULTS = "harness.json"
MEANT = ("model", "precision", "device", "batch_size", "out")  # settings that mean something to the harness


def evaluate_with_harness(
    recipe: Path | None, given: dict[str, Any], tasks: str, shots: int | None, limit: int | None
) -> None:
    """Print the harness's table; with --out, write its results into that folder.

    Args:
        recipe: a YAML recipe, of which model, precision, device and batch size count.
        given: settings from the command line.
        tasks: names or YAML files, separated by commas.
        shots: solved examples before each question; None for what each task says.
        limit: rows per task; None for all.

    Raises:
        MissingExtraError: lm-eval is not installed.
        ConfigError: settings that the harness would not look at, or no such task.
    """
    if strange := sorted(set(given) - set(MEANT)):
        raise ConfigError(
            f"--{strange[0].replace('_', '-')} does not go with --harness, whose tasks bring their own rows and prompts. "
            f"What counts is {', '.join(MEANT)}."
        )
    results = _ask(
        load_config(recipe, given), [task.strip() for task in tasks.split(",") if task.strip()], shots, limit
    )
    from zotune.cli.console import console
    from zotune.evaluation.harness import harness_table
    from zotune.runs.run_folder import write_json

    console.print(harness_table(results), highlight=False, soft_wrap=True, markup=False)
    if limit is not None:
        console.print(f"Only the first {limit} rows of each task were asked: not numbers to report.", highlight=False)
    if "out" in given:
        folder = Path(given["out"])
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RESULTS, results)
        console.print(f"Results: {folder / RESULTS}", highlight=False, soft_wrap=True)


def _ask(config: TrainConfig, tasks: list[str], shots: int | None, limit: int | None) -> dict[str, Any]:
    from zotune.evaluation.harness import PURPOSE, evaluate_harness
    from zotune.extras import require

    require("lm_eval", extra="eval", purpose=PURPOSE)  # before a model is loaded for nothing
    from zotune.cli.display import Display
    from zotune.models import load_any
    from zotune.precision import choose_device, choose_precision
    from zotune.runs.run_folder import trained_folder, trained_on

    device, name = choose_device(config.device), trained_folder(config.model)
    precision = choose_precision(config.precision, device)
    with Display(0) as display:
        display.say(f"loading {name}; {precision.reason}")
        model, tokenizer, _ = load_any(name, dtype=precision.weights, say=display.say)
    results = evaluate_harness(
        model.to(device),
        tokenizer,
        tasks,
        limit=limit,
        shots=shots,
        batch_size=config.batch_size,
        autocast=precision.autocast,
        trained_on=trained_on(name),
    )
    return {**results, "zotune_model": name, "zotune_precision": precision.reason}
