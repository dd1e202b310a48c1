"""KerZOO as a reader of the paper would write it: fp64 dicts of tensors, stored noise, no engine, no directions.

rho_i = (L(w + eps r_i z_i) - L(w - eps r_i z_i)) / (2 eps);  w <- w - lr (1/n) sum_i rho_i K(r_i) z_i
"""

KERNELS = {  # as printed, with 105/64 instead of the paper's 195/64 in K5
    1: lambda r: 3 * r,
    3: lambda r: 15 / 4 * r * (5 - 7 * r**2),
    5: lambda r: 105 / 64 * r * (99 * r**4 - 126 * r**2 + 35),
}


def kerzoo_step(weights, loss, draw, radius, *, lr, eps, n=1, order=3, a=1.0):
    """One step in place, one radius a direction.

    Args:
        weights: dict of name -> fp64 tensor.
        loss: dict of weights -> float.
        draw: (direction number, name) -> z, shaped like the tensor.
        radius: direction number -> r in [-1, 1], in units of a.

    Returns:
        The loss to log and the projected gradients.
    """
    steps, probes, rhos = {name: 0.0 for name in weights}, [], []
    for i in range(n):
        z = {name: draw(i, name) for name in weights}
        r = a * radius(i)
        plus = loss({name: w + eps * r * z[name] for name, w in weights.items()})
        minus = loss({name: w - eps * r * z[name] for name, w in weights.items()})
        rho = (plus - minus) / (2 * eps)
        for name in weights:
            steps[name] = steps[name] + rho * KERNELS[order](r / a) / a * z[name] / n
        probes += [plus, minus]
        rhos.append(rho / a)  # the library reports the slope per unit of a * eps
    for name, w in weights.items():
        w -= lr * steps[name]
    return sum(probes) / len(probes), rhos


def released_step(weights, loss, draw, radius, *, lr, eps, step, n=3, horizon=4000):
    """One step of the released estimator in place: radius(i, name) in [-1, 1], 15 r (5 - 7 r^2) whatever the interval."""
    a = max(1 - step / horizon, 1e-4)
    steps, probes, rhos = {name: 0.0 for name in weights}, [], []
    for i in range(n):
        z = {name: draw(i, name) for name in weights}
        r = {name: a * radius(i, name) for name in weights}
        plus = loss({name: w + eps * r[name] * z[name] for name, w in weights.items()})
        minus = loss({name: w - eps * r[name] * z[name] for name, w in weights.items()})
        rho = (plus - minus) / (2 * eps)
        for name in weights:
            steps[name] = steps[name] + rho * 15 * r[name] * (5 - 7 * r[name] ** 2) * z[name] / n
        probes += [plus, minus]
        rhos.append(rho)
    for name, w in weights.items():
        w -= lr * steps[name]
    return sum(probes) / len(probes), rhos


def averaging_weights(steps):
    """Weights of the iterates c_1 ... c_t in the released code's x_t = c_t / beta + (1 - 1/beta) x_{t-1}, beta = 1 + t/6.

    `steps` updates have been made; the first has t = 0 completed steps, hence beta = 1 and x = c.
    """
    weights = []
    for completed in range(steps):
        beta = 1 + completed / 6
        weights = [w * (1 - 1 / beta) for w in weights] + [1 / beta]
    return weights
