"""A picture of a comparison."""

import os
from collections.abc import Sequence
from pathlib import Path

from zotune.baselines.compare import Row
from zotune.extras import require


def draw_comparison(rows: Sequence[Row], path: Path, title: str) -> None:
    """A bar for each row with its standard error, trained ones in another colour than the others, as a PNG.

    Args:
        rows: at least one, in the order in which they are drawn from the top.
        path: where the picture goes.
        title: its first line.
    """
    require("matplotlib", extra="plot", purpose="draw a comparison")
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - an optional library
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(8, 1.5 + 0.4 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.barh(
        range(len(rows)),
        [row.accuracy for row in rows],
        xerr=[row.standard_error for row in rows],
        color=["tab:orange" if row.forwards else "0.7" for row in rows],
        capsize=3,
    )
    names = [f"{row.what}\n{row.forwards:,.0f} forwards" if row.forwards else row.what for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel=f"held-out {rows[0].metric} (1 standard error)", title=title)
    axes.title.set_fontsize(10)
    axes.grid(alpha=0.3, axis="x")
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=120)
    os.replace(temporary, path)
