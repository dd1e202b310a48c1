"""Alignment of PIZO's directions against the size of the pool: writes docs/methods/pizo.png.

Linear loss, many parameters: only the projections y_i of the pool on the gradient matter, and they are standard normals.
With weights w on the sorted pool, E cos^2 = E (w.y)^2 / (d |w|^2).
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

OUT = Path(__file__).parents[1] / "methods" / "pizo.png"
POOLS = np.array([2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24])
SAMPLES = 100_000


def moments(pool):
    """(E y^2 of the guiding vector, its |v|^2/d, E y^2 of the greedy one)."""
    y = np.sort(np.random.default_rng(pool).normal(size=(SAMPLES, pool)), axis=1)
    elite = pool // 2
    guiding = y[:, :elite].mean(axis=1) - y[:, elite:].mean(axis=1)
    return (guiding**2).mean(), 1 / elite + 1 / (pool - elite), (y[:, 0] ** 2).mean()


def main():
    """Draw both panels."""
    second, length, greedy = np.array([moments(pool) for pool in POOLS]).T
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), constrained_layout=True)
    left.plot(POOLS, second, "C0o-", label="guiding")
    left.plot(POOLS, greedy, "C1s-", label="greedy")
    left.axhline(1, color="C2", label="MeZO; evolution strategy")
    left.set(
        xlabel="pool M", ylabel="step along the gradient, MeZO = 1", title="E y² at equal learning rate", ylim=(0, 4.3)
    )
    right.plot(POOLS, second / length / (POOLS + 2), "C0o-", label="guiding, M + 2 forwards")
    right.plot(POOLS, greedy / (POOLS + 1), "C1s-", label="greedy, M + 1 forwards")
    right.axhline(0.5, color="C2", label="MeZO, 2 forwards")
    right.plot(POOLS, (POOLS - 1) / POOLS, "C3^-", label="evolution strategy (leave one out), M forwards")
    right.set(xlabel="pool M", ylabel="d E cos² per forward", title="alignment at equal forwards", ylim=(0, 1.45))
    for axes in (left, right):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(OUT, dpi=110)
    for pool, a, b, c in zip(POOLS, second, length, greedy, strict=True):
        print(f"M {pool:2d}: guiding E y^2 {a:.3f}, d E cos^2 {a / b:.2f}, per forward {a / b / (pool + 2):.3f}; "
              f"greedy {c:.2f}, per forward {c / (pool + 1):.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
