"""Block-wise MeZO as a reader of its paper would write it: fp64 dicts of tensors, one block after the other."""


def blockwise_step(weights, loss, draw, blocks, *, lr, eps, each=False):
    """One step in place.

    Args:
        weights: dict of name -> fp64 tensor.
        loss: dict of weights -> float.
        draw: name -> z, shaped like the tensor.
        blocks: lists of names, in order.
        each: move a block before the next one is probed.

    Returns:
        The loss to log and the slopes of the blocks.
    """
    rhos, means = [], []
    for block in blocks:
        z = {name: draw(name) for name in block}
        plus = loss({name: w + eps * z[name] if name in block else w for name, w in weights.items()})
        minus = loss({name: w - eps * z[name] if name in block else w for name, w in weights.items()})
        rhos.append((plus - minus) / (2 * eps))
        means.append((plus + minus) / 2)
        if each:
            for name in block:
                weights[name] = weights[name] - lr * rhos[-1] * z[name]
    if not each:
        for block, rho in zip(blocks, rhos, strict=True):
            for name in block:
                weights[name] = weights[name] - lr * rho * draw(name)
    return means[0] if each else sum(means) / len(means), rhos
