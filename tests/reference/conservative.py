"""ZO-SGD-Cons as a reader of its paper would write it: fp64 dicts of tensors, stored noise, three whole candidates."""


def conservative_step(weights, loss, draw, *, lr, eps, of=lambda g: g):
    """One step in place.

    Args:
        weights: dict of name -> fp64 tensor.
        loss: dict of weights -> float.
        draw: name -> z, shaped like the tensor.
        of: what the rule makes of the estimate: itself, or its sign.

    Returns:
        The loss to log and which candidate won: 0 for staying, 1 for the step, -1 for its opposite.
    """
    z = {name: draw(name) for name in weights}
    here = loss(weights)
    plus = loss({name: w + eps * z[name] for name, w in weights.items()})
    minus = loss({name: w - eps * z[name] for name, w in weights.items()})
    rho = (plus - minus) / (2 * eps)
    candidates = {
        0: weights,
        1: {name: w - lr * of(rho * z[name]) for name, w in weights.items()},
        -1: {name: w + lr * of(rho * z[name]) for name, w in weights.items()},
    }
    losses = {0: here, 1: loss(candidates[1]), -1: loss(candidates[-1])}
    best = min(losses, key=losses.get)  # the first of equals
    for name in weights:
        weights[name] = candidates[best][name].clone()
    return here, best
