"""GRZO as a reader of the paper would write it: fp64 dicts of tensors, stored directions, plain loops.

z_i = u * (r_i s_i^T);  delta_i = L_i(w + eps z_i) - L_i(w - eps z_i);  a_i = delta_i / std(delta)
w <- w - lr / (2 eps B) sum_i a_i z_i

What is multiplied with z_i is rounded to 20 bits of the largest, which keeps sums of signs exact; the paper does not round.
"""

from math import floor, log2


def grzo_step(weights, losses, u, signs, *, lr, eps, normalise=True):
    """One step in place.

    Args:
        weights: dict of name -> fp64 tensor.
        losses: dict of weights -> list of B floats.
        u: name -> the shared direction, shaped like the tensor.
        signs: (example, name) -> (signs of the rows (m,), signs of the columns (n,)).

    Returns:
        The loss to log.
    """
    count = len(losses(weights))
    delta, total = [], 0.0
    z = []
    for i in range(count):
        z_i = {}
        for name, w in weights.items():
            rows, columns = signs(i, name)
            z_i[name] = u(name) * rows.outer(columns).reshape(w.shape)
        plus = losses({name: w + eps * z_i[name] for name, w in weights.items()})[i]
        minus = losses({name: w - eps * z_i[name] for name, w in weights.items()})[i]
        delta.append(plus - minus)
        total += plus + minus
        z.append(z_i)
    mean = sum(delta) / count
    spread = (sum((d - mean) ** 2 for d in delta) / count) ** 0.5
    a = [d / (spread if normalise else 1.0) / (2 * eps * count) for d in delta]
    unit = 2.0 ** (floor(log2(max(abs(x) for x in a))) + 1 - 20)
    for name, w in weights.items():
        w -= lr * sum(round(x / unit) * unit * z_i[name] for x, z_i in zip(a, z, strict=True))
    return total / (2 * count)
