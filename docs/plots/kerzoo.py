"""Kernels of KerZOO, and what they do to the bias: writes docs/methods/kerzoo.png."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from zotune.methods.kerzoo import ORDERS, KerZOO

OUT = Path(__file__).parents[1] / "methods" / "kerzoo.png"
nodes, weights = np.polynomial.legendre.leggauss(40)
eps = np.geomspace(0.05, 2.0, 60)


def value(order, r):
    """K(r) on an array."""
    method = KerZOO(order=order)
    return np.array([method.kernel_at(x) for x in r])


def bias(order):
    """Relative bias on L = sin: Gaussian smoothing at radius r multiplies the slope by exp(-eps^2 r^2 / 2)."""
    k = value(order, nodes)
    return [abs(np.sum(weights / 2 * nodes * k * np.expm1(-((e * nodes) ** 2) / 2))) for e in eps]


def main():
    """Draw both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), constrained_layout=True)
    r = np.linspace(-1, 1, 401)
    right.loglog(eps, -np.expm1(-(eps**2) / 2), color="0.4", label="MeZO (slope 2)")
    for order, slope, color in zip(ORDERS, (2, 4, 6, 8), ("C0", "C1", "C2", "C3"), strict=True):
        left.plot(r, value(order, r), color=color, label=f"K{order}")
        right.loglog(eps, bias(order), color=color, label=f"K{order} (slope {slope})")
    left.axhline(0, color="0.8", lw=0.8)
    left.set(xlabel="r", ylabel="K(r)", title="kernels with E[r K] = 1")
    right.set(xlabel="eps", ylabel="relative bias", title="bias of the mean on L = sin", ylim=(1e-12, 3))
    left.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.1, 1.0))
    right.legend(frameon=False, fontsize=8)
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
