"""JAGUAR as a reader would write it: fp64 dicts of tensors, stored noise, no engine, no directions.

S: ceil(ratio * tensors) tensors;  z ~ N(0, I) on S;  rho = (L(w + eps z) - L(w - eps z)) / (2 eps);  g = rho z on S
w <- w - lr g on S;  or with the accumulator: a <- beta a + (1 - beta) g on S,  w <- w - lr sign(a) on all tensors
"""


def jaguar_step(weights, chosen, loss, draw, *, lr, eps, n=1, share=1.0, accumulator=None, beta=0.9):
    """One step in place.

    Args:
        weights: dict of name -> fp64 tensor.
        chosen: names of the step's tensors.
        loss: dict of weights -> float.
        draw: (direction number, name) -> z.
        share: what the estimate is divided by.
        accumulator: dict of name -> fp64 tensor for JAGUAR SignSGD; None for SGD.

    Returns:
        The loss to log, and the last rho.
    """
    g, losses = {name: 0.0 for name in chosen}, []
    for i in range(n):
        z = {name: draw(i, name) for name in chosen}
        plus = loss({name: w + eps * z[name] if name in z else w for name, w in weights.items()})
        minus = loss({name: w - eps * z[name] if name in z else w for name, w in weights.items()})
        rho = (plus - minus) / (2 * eps)
        losses += [plus, minus]
        for name in chosen:
            g[name] = g[name] + rho * z[name] / (n * share)
    for name, w in weights.items():
        if accumulator is None:
            if name in g:
                w -= lr * g[name]
            continue
        if name in g:
            accumulator[name] = beta * accumulator[name] + (1 - beta) * g[name]
        w -= lr * accumulator[name].sign()
    return sum(losses) / len(losses), rho
