"""A step of each engine against two plain forwards and against the literal four-pass loop.

    python benchmarks/speed.py [--model smollm2-135m] [--rounds 7] [--loss last|all] [--json FILE]

All candidates of a column run interleaved in one process, in rotating order. A ratio is taken inside each round, to two
`torch.inference_mode` forwards with the same loss code; the table shows the median and the range over rounds.
"""

import argparse
import sys
import time
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import torch
from common import DTYPES, SHAPES, load, machine, make_closure, write
from literal_mezo import LiteralMeZO

import zotune

Candidate = Callable[[], Any]


def candidates(model: Any, closure: Candidate, engines: list[str]) -> dict[str, Candidate]:
    def two_forwards() -> None:
        with torch.inference_mode():
            for _ in range(2):
                closure().item()

    made: dict[str, Candidate] = {"two forwards": two_forwards}
    for engine in engines:
        opt = zotune.ZO(model.named_parameters(), lr=0.0, eps=1e-2, engine=engine)
        made[f"zotune {engine}"] = lambda opt=opt: opt.step(closure)
    literal = LiteralMeZO(model, lr=0.0, eps=1e-2)
    made["literal four-pass loop"] = lambda: literal.step(closure)
    return made


def measure(made: dict[str, Candidate], rounds: int) -> dict[str, list[float]]:
    for candidate in made.values():
        candidate()  # warm up: compile, allocate, look at the model
    seconds: dict[str, list[float]] = {name: [] for name in made}
    names = list(made)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            made[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loss", choices=("last", "all"), default="last")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--engines", nargs="+", default=["layerwise", "in_place"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine(), "columns": {}}
    print(f"{'shape':7} {'dtype':5} {'candidate':24} {'ms':>9} {'ratio':>7}  range")
    for dtype, shape in product(arguments.dtypes, arguments.shapes):
        model = load(arguments.model, DTYPES[dtype], arguments.device)
        closure = make_closure(model, SHAPES[shape], arguments.loss)
        seconds = measure(candidates(model, closure, arguments.engines), arguments.rounds)
        column = {}
        for name, values in seconds.items():
            ratios = [value / base for value, base in zip(values, seconds["two forwards"], strict=True)]
            column[name] = {
                "ms": 1e3 * median(values),
                "ratio": median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
            c = column[name]
            print(
                f"{shape:7} {dtype:5} {name:24} {c['ms']:9.1f} {c['ratio']:7.2f}  {c['low']:.2f} .. {c['high']:.2f}",
                flush=True,
            )
        result["columns"][f"{shape} {dtype}"] = column
    write(arguments.json, result)


if __name__ == "__main__":
    main()
