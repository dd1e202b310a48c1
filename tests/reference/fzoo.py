"""FZOO as a reader of the paper would write it: fp64 dicts of tensors, stored signs, plain loops.

l_i = L(w + eps u_i);  g = 1/(eps n) sum_i (l_i - L(w)) u_i;  w <- w - lr g / sigma, sigma^2 = 1/(n-1) sum_i (l_i - mean)^2
"""


def fzoo_step(weights, loss, draw, *, lr, eps, n, normalise=True, released=False):
    """One step in place.

    Args:
        weights: dict of name -> fp64 tensor.
        loss: dict of weights -> float.
        draw: (direction number, name) -> u, shaped like the tensor.
        released: as the released code has it: lr / (n sigma) sum_i (l_i - L(w)) u_i, sigma with 1/n.

    Returns:
        The loss to log and sigma.
    """
    u = [{name: draw(i, name) for name in weights} for i in range(n)]
    here = loss(weights)
    losses = [loss({name: w + eps * u_i[name] for name, w in weights.items()}) for u_i in u]
    mean = sum(losses) / n
    squares = sum((l_i - mean) ** 2 for l_i in losses)
    sigma = (squares / n if released else squares / (n - 1)) ** 0.5
    for name, w in weights.items():
        g = sum((l_i - here) * u_i[name] for l_i, u_i in zip(losses, u, strict=True)) / n
        if not released:
            g = g / eps
        if normalise:
            g = g / sigma
        w -= lr * g
    return here, sigma
