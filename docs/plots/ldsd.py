"""How well LDSD's mean finds a gradient that stays, and what short forms of it lose: writes docs/methods/ldsd.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from zotune.core.context import Context, as_losses
from zotune.core.site import Site
from zotune.methods.ldsd import LDSD

OUT = Path(__file__).parents[1] / "methods" / "ldsd.png"
K, LOOKS = 5, (10, 20, 50, 100, 200, 500, 1000, 2000)
RUNS = {
    "fp32": {},
    "bf16": {"mean": "bf16"},
    "int8": {"mean": "int8"},
    "released update": {"variant": "released"},
}


def law(steps, d):
    """cos(mu, -grad) after some steps, derived."""
    return 1 / np.sqrt(1 + d / (np.asarray(steps) * (K - 1)))


def cosines(d, looks=LOOKS, seed=0, **options):
    """cos(mu, -g) after the steps of `looks`, at a gradient g that stays."""
    g = torch.randn(d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    site, weights, found = Site("weight", (d,)), torch.zeros(d), []
    method = LDSD(k=K, lr_mu=1.0, **options)

    def ask(points):
        return as_losses([float(g @ point.realise(site, torch.float64)) for point in points])

    for step in range(max(looks)):
        ctx = Context(
            step=step, seed=seed, hyperparameters={"eps": 1.0}, sites=[site], ask=ask, weight=lambda _: weights
        )
        method.observe(ctx, method.estimate(ctx))
        if step + 1 in looks:
            method.state_dict()  # with all that was learned
            mu = method._mu.realise(site, torch.float64)
            found.append(-float(mu @ g / (mu.norm() * g.norm())))
    return np.array(found)


def main():
    """Draw, and print the numbers of the page."""
    d = 1000
    figure, axes = plt.subplots(figsize=(6.2, 3.6), constrained_layout=True)
    steps = np.geomspace(LOOKS[0], LOOKS[-1], 80)
    axes.semilogx(steps, law(steps, d), "k", lw=1, label="1/sqrt(1 + d/(T(K-1)))")
    for (name, options), mark in zip(RUNS.items(), "osv^", strict=True):
        found = cosines(d, **options)
        axes.semilogx(LOOKS, found, mark, label=name, ms=9 - 2 * "osv^".index(mark), mfc="none")
        print(f"{name}: " + ", ".join(f"T {t} {c:.4f} ({law(t, d):.4f})" for t, c in zip(LOOKS, found, strict=True)))
    axes.set(
        xlabel="steps T", ylabel="cos(mu, -grad)", title=f"a gradient that stays, d = {d}, K = {K}", ylim=(-0.1, 1)
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
