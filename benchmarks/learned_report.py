"""The table and the picture of benchmarks/learned.py, from its JSON."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PAIRS = (  # what each claim has to beat
    ("untrained", "mezo", "a random profile against equal scales"),
    ("published", "untrained", "what was learned as published, against the networks before learning"),
    ("published", "published-shuffled", "the same networks on their own tensors, against on random ones"),
    ("corrected", "mezo", "what the corrected form learned, against where it began"),
    ("corrected", "corrected-shuffled", "the same networks on their own tensors, against on random ones"),
    ("rms", "mezo", "simple statistics against equal scales"),
    ("adaptive", "mezo", "scales found in the run, exploring paid for, against equal scales"),
)
Entries = list[dict[str, Any]]


def report(path: Path, lrs: Sequence[float], picture: bool = True) -> None:
    """Write PATH's .md, and .png if wanted; runs that are not there yet are left out."""
    held = json.loads(path.read_text())
    final = [e for e in held["entries"] if e["stage"] == "final"]
    if not final:
        return
    tasks = list(dict.fromkeys(e["task"] for e in final))
    names = list(dict.fromkeys(e["contestant"] for e in final))
    lines = [_title(held), "", *_table(final, held["entries"], tasks, names, lrs), "", *_pairs(final, tasks), ""]
    lines += _learning(held["entries"])
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    if picture:
        _draw(final, tasks, names, path.with_suffix(".png"))


def _title(held: dict[str, Any]) -> str:
    s = held["settings"]
    return (
        f"# Learned optimizers on {', '.join(s['tasks'])}\n\n{s['model']}; learned on {', '.join(s['learn_on'])}; "
        f"{s['forwards']} forward passes of {s['batch_size']}; {s['rows']} held-out rows, drawn by each seed; learning rate of "
        f"each contestant tuned on {s['tasks'][0]} with rows and noise of another seed. Losses are means over seeds ± one "
        "standard error. Made by benchmarks/learned.py."
    )


def _table(final: Entries, every: Entries, tasks: list[str], names: list[str], lrs: Sequence[float]) -> list[str]:
    heads = "".join(f" {task} loss | {task} accuracy |" for task in tasks)
    lines = [f"| contestant | lr |{heads}", "|---|---|" + "---|---|" * len(tasks)]
    bars = [e for e in every if e["stage"] == "bars"]
    for name, pick in (("zero-shot", lambda e: e), ("prior-corrected", lambda e: e.get("prior_corrected", {}))):
        cells = "".join(
            f" {_spread([pick(e)['loss'] for e in bars if e['task'] == task and pick(e)])} |"
            f" {_spread([pick(e)['accuracy'] for e in bars if e['task'] == task and pick(e)])} |"
            for task in tasks
        )
        lines.append(f"| {name} | |{cells}")
    for name in names:
        own = [e for e in final if e["contestant"] == name]
        cells = "".join(
            f" {_spread([e['loss'] for e in own if e['task'] == task])} |"
            f" {_spread([e['accuracy'] for e in own if e['task'] == task])} |"
            for task in tasks
        )
        edge = " (edge of the grid)" if own[0]["lr"] in (min(lrs), max(lrs)) and len(lrs) > 1 else ""
        lines.append(f"| {name} | {own[0]['lr']:g}{edge} |{cells}")
    return lines


def _pairs(final: Entries, tasks: list[str]) -> list[str]:
    lines = ["Differences of held-out loss, same task, rows and noise (less than 0: the first is better):", ""]
    lines += ["| | mean difference | lower in | |", "|---|---|---|---|"]
    for one, other, what in PAIRS:
        found = _differences(final, one, other)
        if len(found) > 1:
            middle, error = mean(found), stdev(found) / math.sqrt(len(found))
            verdict = "not resolved" if abs(middle) < 2 * error else "better" if middle < 0 else "worse"
            lower = f"{sum(difference < 0 for difference in found)} of {len(found)} runs"
            lines.append(f"| {one} - {other} ({what}) | {middle:+.3f} ± {error:.3f} | {lower} | {verdict} |")
    return lines


def _differences(final: Entries, one: str, other: str) -> list[float]:
    """Of runs that differ in the contestant alone."""
    held = {(e["contestant"], e["task"], e["seed"]): e["loss"] for e in final}
    return [
        loss - held[other, task, seed]
        for (name, task, seed), loss in held.items()
        if name == one and (other, task, seed) in held
    ]


def _learning(entries: Entries) -> list[str]:
    found = next((e for e in entries if e["stage"] == "learning"), None)
    if found is None:
        return []
    lines = [
        "How far the networks moved while they learned (largest change of a network's 449 numbers), and what they do:",
        "",
    ]
    lines += ["| | median | 95th percentile | most | scale² 10 % | median | 90 % | noise energy on ten tensors |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for name in ("published", "corrected"):
        d, q = found[name]["distance"], found[name]["squared"]
        lines.append(
            f"| {name} | {d['median']:.1e} | {d['p95']:.1e} | {d['most']:.1e} | {q['p10']:.2g} | {q['median']:.2g} | "
            f"{q['p90']:.2g} | {found[name]['energy_of_ten']:.0%} |"
        )
    return lines


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    error = f" ± {stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{mean(values):.3f}{error}"


def _draw(final: Entries, tasks: list[str], names: list[str], path: Path) -> None:
    figure = Figure(figsize=(5 * len(tasks), 0.45 * len(names) + 1.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, task in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        mezo = {e["seed"]: e["loss"] for e in final if e["contestant"] == "mezo" and e["task"] == task}
        for row, name in enumerate(names):
            own = [e for e in final if e["contestant"] == name and e["task"] == task and e["seed"] in mezo]
            gaps = [min(e["loss"] - mezo[e["seed"]], 1.0) for e in own]
            axes.plot(gaps, [row] * len(gaps), "o", color="tab:blue", alpha=0.5)
            if gaps:
                axes.plot([mean(gaps)], [row], "|", color="black", markersize=14)
        axes.axvline(0.0, color="0.6", linewidth=0.8)
        axes.set(
            title=task,
            xlabel="loss above MeZO's, same seed (1: or more)",
            yticks=range(len(names)),
            yticklabels=names,
        )
        axes.invert_yaxis()
    figure.savefig(path, dpi=120)
