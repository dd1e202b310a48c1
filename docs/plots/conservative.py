"""MeZO and the conservative method at equal forwards on a quadratic: writes docs/methods/conservative.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import nn

from zotune.optim.optimizer import ZO

OUT = Path(__file__).parents[1] / "methods" / "conservative.png"
FORWARDS, D = 1500, 100
RATES = np.geomspace(1e-3, 0.2, 9)


def final_loss(lr, method, rule):
    """The loss after FORWARDS forward passes on |w|^2 / 2 that starts at D / 2."""
    w = nn.Parameter(torch.ones(D, dtype=torch.float64))
    opt = ZO([("w", w)], method, lr=float(lr), eps=1e-3, seed=1, rule=rule, engine="in_place")
    while opt.forwards < FORWARDS:
        loss = float(opt.step(lambda: w.square().sum() / 2))
        if not loss < 1e4:
            return np.nan
    return float(w.detach().square().sum() / 2)


def main():
    """Draw both rules."""
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.6), constrained_layout=True, sharey=True)
    for panel, rule in zip(panels, ("sgd", "sign"), strict=True):
        for method, color in (("mezo", "0.4"), ("conservative", "C0")):
            ends = [final_loss(lr, method, rule) for lr in RATES]
            panel.loglog(RATES, ends, "o-", ms=3, color=color, label=f"{method}, best {np.nanmin(ends):.2g}")
            print(rule, method, [f"{lr:.2g}: {end:.3g}" for lr, end in zip(RATES, ends, strict=True)])
        panel.axhline(D / 2, color="0.8", lw=0.8)
        panel.set(xlabel="lr", title=f"rule {rule}")
        panel.legend(frameon=False, fontsize=8)
    panels[0].set(ylabel=f"loss after {FORWARDS} forwards", ylim=(0.05, 500))
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
