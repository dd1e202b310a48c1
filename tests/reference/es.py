"""One-sided evolution strategies as a reader would write them: fp64 dicts of tensors, stored noise, plain loops.

l_i = L(w + eps z_i);  c_i = (l_i - mean of the other l) / eps;  w <- w - lr (1/n) sum_i c_i z_i
"""


def es_step(weights, loss, draw, *, lr, eps, n, baseline="leave_one_out", shaping="none"):
    """One step in place.

    Args:
        weights: dict of name -> fp64 tensor.
        loss: dict of weights -> float.
        draw: (direction number, name) -> z, shaped like the tensor.

    Returns:
        The loss to log and the coefficients.
    """
    z = [{name: draw(i, name) for name in weights} for i in range(n)]
    losses = [loss({name: w + eps * z_i[name] for name, w in weights.items()}) for z_i in z]
    c = []
    for i, l_i in enumerate(losses):
        others = [l_j for j, l_j in enumerate(losses) if j != i]
        if shaping == "centered_ranks":  # losses here are all different
            c.append(sum(l_j < l_i for l_j in others) / (n - 1) - 0.5)
        elif baseline == "mean":
            c.append((l_i - sum(losses) / n) / eps)
        else:
            c.append((l_i - sum(others) / (n - 1)) / eps)
    for name, w in weights.items():
        w -= lr * sum(c_i * z_i[name] for c_i, z_i in zip(c, z, strict=True)) / n
    return sum(losses) / n, c
