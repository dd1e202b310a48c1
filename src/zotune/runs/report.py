"""Pictures of a run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zotune.core.ledger import LedgerFile
from zotune.extras import require


def draw_curves(ledger: LedgerFile, metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and held-out accuracy against forward passes, as a PNG; the baselines are drawn as lines.

    Args:
        ledger: what the run wrote.
        metrics: evaluations; the first one is of the untrained model and holds `prior_corrected`.
        path: where the picture goes.
        title: its first line.
    """
    require("matplotlib", extra="plot", purpose="draw curves")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    total, answers = metrics[-1]["forwards"], np.cumsum([len(entry.losses) for entry in ledger.entries])
    forwards = answers * (total / answers[-1]) if len(answers) else answers  # a slope is one forward and two numbers
    losses = np.array([entry.loss for entry in ledger.entries])
    spent = [line["forwards"] for line in metrics]
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    left, right = figure.subplots(1, 2)
    left.plot(forwards, losses, color="0.8", linewidth=0.8, label="batch")
    left.plot(forwards, _smooth(losses), color="tab:blue", label="batch, running mean of 20 steps")
    left.plot(spent, [line["loss"] for line in metrics], "o-", color="tab:orange", label="held out")
    metric, corrected = metrics[0]["metric"], metrics[0].get("prior_corrected")
    left.set(xlabel="forward passes", ylabel="loss")
    values = [line[metric] for line in metrics]
    error = [line["standard_error"] for line in metrics]
    right.errorbar(
        spent, values, yerr=error, fmt="o-", color="tab:orange", capsize=3, label="held out (1 standard error)"
    )
    right.axhline(values[0], color="0.5", linestyle=":", label="zero-shot")
    if corrected is not None:
        for axes, key in ((left, "loss"), (right, metric)):
            axes.axhline(corrected[key], color="tab:green", linestyle="--", label="prior-corrected, untrained")
    right.set(xlabel="forward passes", ylabel=metric)
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)


def _smooth(values: np.ndarray, window: int = 20) -> np.ndarray:
    """Mean of the last `window` values (fewer at the start); refused steps do not count."""
    good = np.where(np.isfinite(values), values, 0.0)
    count = np.isfinite(values).astype(float)
    total, number = np.cumsum(good), np.cumsum(count)
    total[window:] -= total[:-window].copy()
    number[window:] -= number[:-window].copy()
    return total / np.maximum(number, 1)
