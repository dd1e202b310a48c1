"""What rounding does: drift of weights that are walked back in place, and noise of the slope in bf16 forwards.

    python benchmarks/rounding.py [--json FILE]

Drift: 1,000 cycles of the literal `+eps, -2 eps, +eps` walk, no update, on one matrix of the model. Slope: the projected
gradient along the same directions in bf16 and under bf16 autocast, against fp32.
"""

import argparse
import sys
from typing import Any

import torch
from common import load, machine, make_closure, write
from literal_mezo import LiteralMeZO

import zotune

MATRIX = "model.layers.15.mlp.down_proj.weight"
CYCLES, DIRECTIONS = 1000, 6


def drift(weight: torch.Tensor, dtype: torch.dtype) -> float:
    """Relative distance of a matrix from itself after the walks."""
    holder = torch.nn.ParameterList([weight.to(dtype, copy=True)])
    before = holder[0].detach().clone().float()
    walker = LiteralMeZO(holder, lr=0.0, eps=1e-3)
    for seed in range(CYCLES):
        for factor in (1, -2, 1):
            walker._perturb(seed, factor)
    return float((holder[0].detach().float() - before).norm() / before.norm())


def slopes(model: Any, eps: float, autocast: bool) -> torch.Tensor:
    """Projected gradients along the first directions of seed 0, (DIRECTIONS,)."""
    plain = make_closure(model, (8, 64), "all")

    def closure() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return plain()

    opt = zotune.ZO(model.named_parameters(), lr=0.0, eps=eps)
    found = []
    for _ in range(DIRECTIONS):
        opt.step(closure)
        assert opt.last is not None
        found.append(opt.last.estimate.info["rho"])
    return torch.tensor(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--json")
    a = parser.parse_args()
    fp32, bf16 = load(a.model, torch.float32, "cpu"), load(a.model, torch.bfloat16, "cpu")
    result: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine(), "drift": {}, "slope": []}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
        result["drift"][name] = drift(fp32.get_parameter(MATRIX).detach(), dtype)
        print(f"drift after {CYCLES} cycles, {name}: {result['drift'][name]:.2g} of the norm", flush=True)
    for eps in (1e-2, 1e-3, 1e-4):
        true = slopes(fp32, eps, autocast=False)
        row: dict[str, float] = {"eps": eps, "rms slope": float(true.square().mean().sqrt())}
        for name, model, autocast in (("bf16", bf16, False), ("autocast", fp32, True)):
            error = slopes(model, eps, autocast) - true
            row[name] = float(error.square().mean().sqrt()) / row["rms slope"]
        result["slope"].append(row)
        print(
            f"eps {eps:g}: rms slope {row['rms slope']:.1f}, error bf16 {row['bf16']:.0%}, autocast {row['autocast']:.0%}",
            flush=True,
        )
    write(a.json, result)


if __name__ == "__main__":
    main()
