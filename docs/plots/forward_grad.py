"""Error of a central difference against eps, and of forward mode, in fp32 and bf16: writes docs/methods/forward_grad.png."""

import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from zotune.optim.optimizer import ZO

OUT = Path(__file__).parents[1] / "methods" / "forward_grad.png"
EPS = np.geomspace(1e-5, 1.0, 16)
DIRECTIONS = 20


def network(dtype):
    """A network of 21,000 weights in a dtype, and its loss; the same numbers, rounded."""
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(64, 64), nn.Tanh())], nn.Linear(64, 8))
    x, y = torch.randn(64, 64), torch.randint(0, 8, (64,))
    model, x = model.bfloat16().to(dtype), x.bfloat16().to(dtype)  # values that every dtype holds
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return model, lambda: nn.functional.cross_entropy(model(x).to(kept), y)


def slopes(dtype, method, eps=1e-2):
    """The slopes along the first directions of seed 0, (DIRECTIONS,)."""
    model, closure = network(dtype)
    opt = ZO(model.named_parameters(), method, lr=0.0, eps=float(eps), noise="rademacher")
    found = []
    for _ in range(DIRECTIONS):
        opt.step(closure)
        found.append(opt.last.estimate.info["rho"])
    return np.array(found)


def main():
    """Draw: rms error over rms slope."""
    warnings.simplefilter("ignore")  # of small eps in bf16: that is the point
    exact = slopes(torch.float64, "forward_grad")
    size = np.sqrt(np.mean(exact**2))
    figure, axis = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for dtype, color in ((torch.float32, "C0"), (torch.bfloat16, "C1")):
        name = str(dtype).removeprefix("torch.")
        errors = [np.sqrt(np.mean((slopes(dtype, "mezo", eps) - exact) ** 2)) / size for eps in EPS]
        forward = np.sqrt(np.mean((slopes(dtype, "forward_grad") - exact) ** 2)) / size
        axis.loglog(EPS, errors, "o-", ms=3, color=color, label=f"central difference, {name}")
        axis.axhline(forward, color=color, ls="--", label=f"forward mode, {name}: {forward:.1e}")
        print(
            name, f"forward {forward:.2e}", [f"{eps:.1e}: {error:.1e}" for eps, error in zip(EPS, errors, strict=True)]
        )
    axis.set(xlabel="eps", ylabel="rms error / rms slope", ylim=(1e-8, 1e3))
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
