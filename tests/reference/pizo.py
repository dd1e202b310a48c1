"""PIZO as a reader of the paper would write it: fp64 dicts of tensors, stored noise, no engine, no directions.

l_i = L(w + eps z_i);  order = stable argsort of l, smallest first
guiding: v = mean of the first s z's - mean of the others, s = floor(alpha M);  greedy: v = the first z
rho = (L(w + eps v) - L(w - eps v)) / (2 eps);  w <- w - lr rho v
"""

import math


def pizo_step(weights, loss, draw, *, lr, eps, variant="guiding", pool=4, alpha=0.5):
    """One step in place; `draw`: (direction number, name) -> z. Returns the loss to log, rho, and the pool's losses."""
    z = [{name: draw(i, name) for name in weights} for i in range(pool)]
    losses = [loss({name: w + eps * one[name] for name, w in weights.items()}) for one in z]
    order = sorted(range(pool), key=lambda i: losses[i])
    if variant == "greedy":
        v = z[order[0]]
    else:
        s = math.floor(alpha * pool)
        elite, others = order[:s], order[s:]
        v = {
            name: sum(z[i][name] for i in elite) / len(elite) - sum(z[i][name] for i in others) / len(others)
            for name in weights
        }
    plus = loss({name: w + eps * v[name] for name, w in weights.items()})
    minus = loss({name: w - eps * v[name] for name, w in weights.items()})
    rho = (plus - minus) / (2 * eps)
    for name, w in weights.items():
        w -= lr * rho * v[name]
    return (plus + minus) / 2, rho, losses
