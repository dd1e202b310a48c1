"""MeZO as a reader of the paper would write it: fp64 lists of tensors, stored noise, no engine, no directions.

z_i ~ N(0, I);  rho_i = (L(w + eps z_i) - L(w - eps z_i)) / (2 eps)  or  (L(w + eps z_i) - L(w)) / eps
w <- w - lr * ((1/n) sum_i rho_i z_i + weight_decay * w), no decay for biases and norms
"""


def mezo_step(weights, loss, draw, *, lr, eps, n=1, sides=2, weight_decay=0.0):
    """One step in place.

    Args:
        weights: dict of name -> fp64 tensor.
        loss: dict of weights -> float.
        draw: (direction number, name) -> z, shaped like the tensor.

    Returns:
        The loss to log and the projected gradients.
    """
    z = [{name: draw(i, name) for name in weights} for i in range(n)]
    here = loss(weights) if sides == 1 else None
    rhos, probes = [], []
    for i in range(n):
        plus = loss({name: w + eps * z[i][name] for name, w in weights.items()})
        if sides == 2:
            minus = loss({name: w - eps * z[i][name] for name, w in weights.items()})
            rhos.append((plus - minus) / (2 * eps))
            probes += [plus, minus]
        else:
            rhos.append((plus - here) / eps)
            probes = [here]
    for name, w in weights.items():
        gradient = sum(rho * z[i][name] for i, rho in enumerate(rhos)) / n
        if not ("bias" in name or "norm" in name):
            gradient = gradient + weight_decay * w
        w -= lr * gradient
    return sum(probes) / len(probes), rhos
