"""The ZO Fine-tuner's downstream step as a reader would write it: fp64, stored noise, one torch module per tensor.

sigma_i = |net_i(mean, var, l+, l-, sigma_i before)|;  nf = sqrt(sum w_i / sum w_i sigma_i^2)
v_i = nf sigma_i u_i;  rho = (L(w + eps v) - L(w - eps v)) / (2 eps);  w <- w - lr rho v
"""

import torch
from torch import nn


def as_module(networks, i):
    """Network number i as the modules that released files hold."""
    module = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 1))
    module.load_state_dict(
        {
            "0.weight": networks.w1[i],
            "0.bias": networks.b1[i],
            "2.weight": networks.w2[i][None],
            "2.bias": networks.b2[i][None],
        }
    )
    return module


class Twin:
    """Remembers what the method remembers: the last sigmas and the last pair of losses."""

    def __init__(self, modules, batch=16, world_size=1, normalise=True):
        self.modules = modules  # name -> nn.Sequential, evaluated in fp32
        self.sigma = {name: 1.0 for name in modules}
        self.losses = (0.0, 0.0)
        self.rows = 15 * batch * world_size
        self.normalise = normalise

    def factors(self, weights):
        """nf sigma_i of each tensor, and sigma_i."""
        sigma, w = {}, {}
        for name, tensor in weights.items():
            x = [float(tensor.mean()), float(tensor.var()), *self.losses, self.sigma[name]]
            with torch.no_grad():
                sigma[name] = abs(float(self.modules[name](torch.tensor(x, dtype=torch.float32))))
            w[name] = self.rows * tensor.shape[1] if "embed" in name else tensor.numel()
        nf = (sum(w.values()) / sum(w[name] * sigma[name] ** 2 for name in w)) ** 0.5 if self.normalise else 1.0
        return {name: nf * sigma[name] for name in sigma}, sigma

    def step(self, weights, loss, draw, *, lr, eps):
        """One step in place; returns the loss to log and rho."""
        factors, sigma = self.factors(weights)
        v = {name: factors[name] * draw(name) for name in weights}
        plus = loss({name: w + eps * v[name] for name, w in weights.items()})
        minus = loss({name: w - eps * v[name] for name, w in weights.items()})
        rho = (plus - minus) / (2 * eps)
        for name, w in weights.items():
            w -= lr * rho * v[name]
        self.sigma, self.losses = sigma, (plus, minus)
        return (plus + minus) / 2, rho
