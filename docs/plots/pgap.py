"""How far the alignment of P-GAP turns directions towards the gradient: docs/methods/pgap.png.

Twelve 48 x 48 matrices with random gradients and h = 10 probes, on a linear loss in fp64. For each rank: the mean of
cos^2(Zf, gradient) over that of plain noise, 1 / (number of parameters), with delta = 2.

    python docs/plots/pgap.py
"""

import math
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MATRICES, SIDE, PROBES, DELTA = 12, 48, 10, 2.0
RANKS = (1, 2, 4, 8, 16, 48)
SIGNS = {"shared sign": 1, "a sign per matrix (default)": MATRICES}
TRIALS, DRAWS = 300, 16


def trial(generator: torch.Generator) -> dict[tuple[str, int], float]:
    """Mean cos^2 of a few directions by sign rule and rank, in units of plain noise, for one set of bases."""
    gradient = torch.randn(MATRICES, SIDE, SIDE, dtype=torch.float64, generator=generator)
    q = torch.randn(PROBES, MATRICES, SIDE, SIDE, dtype=torch.float64, generator=generator)
    estimate = torch.einsum("j,jabc->abc", (q * gradient).sum(dim=(1, 2, 3)), q) / PROBES
    u, s, vt = torch.linalg.svd(estimate)
    seen = u.transpose(1, 2) @ gradient @ vt.transpose(1, 2)  # the gradient between all singular vectors
    found = {}
    for rank in RANKS:
        unit = torch.diag_embed(s[:, :rank] / s[:, :rank].norm(dim=1, keepdim=True))
        z = torch.randn(DRAWS, MATRICES, rank, rank, dtype=torch.float64, generator=generator)
        for name, count in SIGNS.items():
            xi = torch.randint(0, 2, (DRAWS, count), generator=generator).double() * 2 - 1
            along = (z * unit).sum(dim=(2, 3)) - xi * math.sqrt(DELTA)
            zf = z - along[:, :, None, None] * unit
            slope = (zf * seen[:, :rank, :rank]).sum(dim=(1, 2, 3))
            cos2 = slope**2 / zf.square().sum(dim=(1, 2, 3)) / gradient.square().sum()
            found[name, rank] = float(cos2.mean()) * gradient.numel()
    return found


def main() -> None:
    """Measure, print and draw."""
    generator = torch.Generator().manual_seed(0)
    trials = [trial(generator) for _ in range(TRIALS)]
    figure, axes = plt.subplots(figsize=(6.2, 3.4), layout="constrained")
    for name in SIGNS:
        samples = torch.tensor([[one[name, rank] for rank in RANKS] for one in trials])
        mean, error = samples.mean(dim=0), samples.std(dim=0) / math.sqrt(TRIALS)
        axes.errorbar(RANKS, mean, yerr=error, marker="o", capsize=3, label=name)
        print(name, {rank: f"{m:.2f} +- {e:.2f}" for rank, m, e in zip(RANKS, mean, error, strict=True)})
    axes.axhline(1.0, color="grey", linewidth=1, linestyle="--", label="plain noise, or random bases")
    axes.set(xscale="log", xlabel="rank", ylabel="mean cos² with the gradient\n(plain noise = 1)", xticks=RANKS)
    axes.set_xticklabels([str(rank) for rank in RANKS])
    axes.minorticks_off()
    axes.legend(frameon=False)
    axes.set_title("12 matrices of 48 × 48, h = 10, delta = 2", fontsize=10)
    figure.savefig(Path(__file__).parents[1] / "methods" / "pgap.png", dpi=130)


if __name__ == "__main__":
    main()
