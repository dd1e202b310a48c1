"""The rules as a reader of their papers would write them: fp64 dicts of tensors, one whole gradient at a time.

Each takes (w, g, memory, options) of one tensor and returns what lr multiplies; `memory` is a dict that starts empty.
"""


def mezo_gradient(weights, loss, draw, eps):
    """rho z of one step, and the loss to log. `draw`: name -> z."""
    z = {name: draw(name) for name in weights}
    plus = loss({name: w + eps * z[name] for name, w in weights.items()})
    minus = loss({name: w - eps * z[name] for name, w in weights.items()})
    rho = (plus - minus) / (2 * eps)
    return {name: rho * z[name] for name in weights}, (plus + minus) / 2


def sgd(g, memory):
    return g


def sign(g, memory):
    return (g > 0).to(g.dtype) - (g < 0).to(g.dtype)


def momentum(g, memory, beta=0.9):
    memory["m"] = beta * memory.get("m", 0) + g
    return memory["m"]


def momentum_replayed(g, memory, beta=0.9, window=32):
    memory["past"] = [*memory.get("past", []), g][-window:]
    return sum(beta ** (len(memory["past"]) - 1 - i) * old for i, old in enumerate(memory["past"]))


def adam(g, memory, beta1=0.9, beta2=0.999, delta=1e-8):
    memory["t"] = t = memory.get("t", 0) + 1
    memory["m"] = beta1 * memory.get("m", 0) + (1 - beta1) * g
    memory["v"] = beta2 * memory.get("v", 0) + (1 - beta2) * g**2
    return (memory["m"] / (1 - beta1**t)) / ((memory["v"] / (1 - beta2**t)) ** 0.5 + delta)


def adamm(g, memory, beta1=0.9, beta2=0.999, delta=1e-10):
    memory["m"] = beta1 * memory.get("m", 0) + (1 - beta1) * g
    memory["v"] = beta2 * memory.get("v", 0) + (1 - beta2) * g**2
    memory["max"] = memory["v"].maximum(memory.get("max", 0 * g))
    return memory["m"] / (memory["max"] ** 0.5 + delta)


def jaguar(g, memory, beta=0.9):
    """g is None on tensors that were not probed."""
    memory["a"] = memory.get("a", 0) if g is None else beta * memory.get("a", 0) + (1 - beta) * g
    return sign(memory["a"], memory)


TWINS = {
    "sgd": sgd,
    "sign": sign,
    "momentum": momentum,
    "momentum_replayed": momentum_replayed,
    "adam": adam,
    "adamm": adamm,
    "jaguar": jaguar,
}


def rule_step(name, weights, gradient, memories, *, lr, weight_decay=0.0, **options):
    """One step in place: decoupled weight decay, none for biases and norms, then the rule."""
    for site, w in weights.items():
        step = TWINS[name](gradient[site], memories.setdefault(site, {}), **options)
        if not ("bias" in site or "norm" in site):
            w *= 1 - lr * weight_decay
        w -= lr * step
