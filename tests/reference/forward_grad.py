"""Forward gradient as a reader of the paper would write it: fp64, stored noise, dual numbers carried along by hand.

z_i ~ N(0, I);  rho_i = dL(w)/dw . z_i;  w <- w - lr * ((1/n) sum_i rho_i z_i + weight_decay * w), no decay for biases and norms
"""

import torch


def dual_loss(w, t, x, y):
    """A small network's loss and its derivative along the tangents t, every line with the derivative of the line.

    hidden = tanh(x W^T + b) * s;  loss = mean (hidden V^T - y)^2
    """
    pre = x @ w["inner.weight"].T + w["inner.bias"]
    d_pre = x @ t["inner.weight"].T + t["inner.bias"]
    squashed = torch.tanh(pre)
    d_squashed = (1 - squashed**2) * d_pre
    hidden = squashed * w["final_norm.weight"]
    d_hidden = d_squashed * w["final_norm.weight"] + squashed * t["final_norm.weight"]
    error = hidden @ w["head.weight"].T - y
    d_error = d_hidden @ w["head.weight"].T + hidden @ t["head.weight"].T
    return float((error**2).mean()), float((2 * error * d_error).mean())


def forward_grad_step(weights, x, y, draw, *, lr, n=1, weight_decay=0.0):
    """One step in place. draw: (direction number, name) -> z. Returns the loss to log and the slopes."""
    z = [{name: draw(i, name) for name in weights} for i in range(n)]
    answers = [dual_loss(weights, z[i], x, y) for i in range(n)]
    rhos = [rho for _, rho in answers]
    for name, w in weights.items():
        gradient = sum(rho * z[i][name] for i, rho in enumerate(rhos)) / n
        if not ("bias" in name or "norm" in name):
            gradient = gradient + weight_decay * w
        w -= lr * gradient
    return answers[0][0], rhos
