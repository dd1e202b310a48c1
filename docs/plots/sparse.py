"""What a nominal density trains, and what it does to the usable learning rate: writes docs/methods/sparse.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from zotune.optim.optimizer import ZO

OUT = Path(__file__).parents[1] / "methods" / "sparse.png"
STEPS, D = 600, 200
RATES = np.geomspace(6e-4, 0.2, 10)


def final_loss(lr, density, interval):
    """The loss after STEPS pairs on |w|^2 / 2 that starts at D / 2."""
    w = nn.Parameter(torch.ones(D, dtype=torch.float64))
    options = {"density": density, "interval": interval}
    opt = ZO([("w", w)], "sparse", lr=float(lr), eps=1e-3, seed=1, engine="in_place", method_options=options)
    for _ in range(STEPS):
        if not float(opt.step(lambda: w.square().sum() / 2)) < 1e4:
            return np.nan
    return float(w.detach().square().sum() / 2)


def main():
    """Draw both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), constrained_layout=True)
    ratio = np.linspace(0, 1, 201)
    cdf = torch.distributions.Normal(0.0, 1.0).cdf(torch.from_numpy(ratio))
    left.plot(ratio, cdf, color="0.4", label="released code: normal < ratio")
    left.plot(ratio, ratio, color="C0", label="here: uniform < ratio")
    left.set(xlabel="ratio asked for", ylabel="share of numbers", title="ratio of a mask")
    left.legend(frameon=False, fontsize=8)
    for density, color in ((1.0, "0.4"), (0.5, "C1"), (0.25, "C0"), (0.1, "C2")):
        ends = [final_loss(lr, density, 50) for lr in RATES]
        right.loglog(RATES, ends, "o-", ms=3, color=color, label=f"density {density:g}, best {np.nanmin(ends):.2g}")
        print(density, [f"{lr:.2g}: {end:.3g}" for lr, end in zip(RATES, ends, strict=True)])
    right.axhline(D / 2, color="0.8", lw=0.8)
    right.set(
        xlabel="lr",
        ylabel=f"loss after {STEPS} steps",
        title="|w|²/2, 200 numbers, a mask for 50 steps",
        ylim=(3, 300),
    )
    right.legend(frameon=False, fontsize=8)
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
