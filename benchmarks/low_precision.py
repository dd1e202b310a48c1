"""bf16 weights that learn: the same run with fp32 weights and with three ways of keeping bf16 weights.

    python benchmarks/low_precision.py --out runs/low_precision [--steps 300] [--picture FILE] [--json FILE]

Same noise, data, learning rate and eps. "plain" rounds each update to the nearest bf16, "stochastic" rounds it at random,
"carry" is zotune's default: 16 more bits beside each weight. Runs that are there already are not run again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from common import machine, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from zotune.runs.config import TrainConfig
from zotune.runs.job import Listener
from zotune.runs.training import train

VARIANTS = {
    "fp32": {"precision": "autocast"},
    "bf16 carry (default)": {"precision": "bf16", "low_precision": "carry"},
    # drawing its random bits makes a step several times as long, so this one is cut short
    "bf16 stochastic": {"precision": "bf16", "low_precision": "stochastic", "steps": 100},
    "bf16 plain": {"precision": "bf16", "low_precision": "plain"},
}


class Talk(Listener):
    def evaluated(self, line: dict[str, Any]) -> None:
        print(f"  step {line['step']}: accuracy {line['accuracy']:.3f}, loss {line['loss']:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--eps", type=float, default=1e-2)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--picture")
    parser.add_argument("--json")
    a = parser.parse_args()
    result: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine(), "runs": {}}
    for name, settings in VARIANTS.items():
        print(name)
        folder = Path(a.out) / name.replace(" ", "_")
        shared = {"model": a.model, "steps": a.steps, "lr": a.lr, "eps": a.eps, "eval_every": max(1, a.steps // 6)}
        config = TrainConfig(**{**shared, **settings, "out": str(folder)})
        outcome = train(config, Talk())
        metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        result["runs"][name] = {
            "steps": [m["step"] for m in metrics],
            "loss": [m["loss"] for m in metrics],
            "accuracy": [m["accuracy"] for m in metrics],
            "after": outcome["after"],
        }
    write(a.json, result)
    if a.picture:
        draw(result["runs"], Path(a.picture), a)


def draw(runs: dict[str, Any], path: Path, a: argparse.Namespace) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{a.model} on the demo task, MeZO, lr {a.lr:g}, eps {a.eps:g}, same noise and data")
    for axes, key in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for name, run in runs.items():
            axes.plot(run["steps"], run[key], "o-", label=name)
        axes.set(xlabel="step", ylabel=f"held-out {key}")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
