"""Evolution strategies against MeZO at equal forwards: writes docs/methods/es.png.

Alignment (cosine squared with the gradient, times the number of parameters) of the estimates on a linear loss, and on a
quadratic as eps grows; both estimators written out in numpy.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

OUT = Path(__file__).parents[1] / "methods" / "es.png"
D, DRAWS = 400, 2000
rng = np.random.default_rng(0)
gradient = rng.normal(size=D)
gradient /= np.linalg.norm(gradient)
curvature = rng.exponential(size=D)
curvature /= np.linalg.norm(curvature)  # |H|_F = 1 = |grad|


def loss(x, bend):
    """A quadratic with a diagonal Hessian: (..., D) displacements -> (...) losses."""
    return x @ gradient + bend * (x * x) @ curvature / 2


def es(n, eps=1.0, bend=0.0):
    """n forwards."""
    z = rng.normal(size=(n, D))
    losses = loss(eps * z, bend)
    return (losses - losses.mean()) @ z


def mezo(n, eps=1.0, bend=0.0):
    """n forwards: n / 2 pairs."""
    z = rng.normal(size=(n // 2, D))
    return (loss(eps * z, bend) - loss(-eps * z, bend)) @ z


def alignment(estimate, *settings):
    """Mean of D cos^2."""
    made = [estimate(*settings) for _ in range(DRAWS)]
    return D * np.mean([(g @ gradient) ** 2 / (g @ g) for g in made])


def main():
    """Draw both panels."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.4), constrained_layout=True)
    forwards = np.array([2, 4, 6, 8, 12, 16, 24])
    left.plot(forwards, (forwards - 1) * D / (forwards + D - 2) / forwards, "C0", label="es: (n-1) d / (n+d-2)")
    left.plot(forwards, [alignment(es, n) / n for n in forwards], "C0o", label="es, drawn")
    half = forwards / 2
    left.plot(forwards, half * D / (half + D - 1) / forwards, "C1", label="MeZO: q d / (q+d-1), q = n/2")
    left.plot(forwards, [alignment(mezo, n) / n for n in forwards], "C1s", label="MeZO, drawn")
    left.set(xlabel="forwards n", ylabel="d E cos² per forward", title="linear loss", ylim=(0, 1.05))
    eps = np.geomspace(0.05, 10, 12)
    right.semilogx(eps, [alignment(es, 8, e, 1.0) / 8 for e in eps], "C0o-", label="es, n = 8")
    right.semilogx(eps, [alignment(mezo, 8, e, 1.0) / 8 for e in eps], "C1s-", label="MeZO, 4 pairs")
    right.set(xlabel="eps |H| / |grad|", title="quadratic loss", ylim=(0, 1.05))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8, loc="best")
    figure.savefig(OUT, dpi=110)


if __name__ == "__main__":
    main()
