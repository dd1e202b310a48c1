"""P-GAP as a reader of the paper would write it: fp64, whole matrices, all estimates at once, no engine, no directions.

Every k steps:  rho_j = (L(w + eps Q_j) - L(w - eps Q_j)) / (2 eps);  G = (1/h) sum_j rho_j Q_j;  G ~ U S V^T of rank r
Every step:     Z = Z_0 - (<S, Z_0> - xi sqrt(delta) |S|) / |S|^2 S;  Zf = U Z V^T on matrices, plain noise elsewhere
                p = (L(w + eps Zf) - L(w - eps Zf)) / (2 eps);  w <- w - lr p Zf
"""

import math

import torch


class PGAPTwin:
    def __init__(self, rank, h, k, horizon, delta_start=2.0, delta_end=0.0, matched=False):
        self.rank, self.h, self.k, self.horizon, self.matched = rank, h, k, horizon, matched
        self.delta_start, self.delta_end = delta_start, delta_end
        self.bases = {}

    def refresh(self, weights, loss, draw, eps):
        estimate = {name: torch.zeros_like(w) for name, w in weights.items()}
        for j in range(self.h):
            q = {name: draw("probe", name, tuple(w.shape), j) for name, w in weights.items()}
            plus = loss({name: w + eps * q[name] for name, w in weights.items()})
            minus = loss({name: w - eps * q[name] for name, w in weights.items()})
            rho = (plus - minus) / (2 * eps)
            for name in weights:
                estimate[name] += rho * q[name] / self.h
        for name, g in estimate.items():
            if g.dim() == 2:
                u, s, vt = torch.linalg.svd(g)
                u, s, v = u[:, : self.rank], s[: self.rank], vt.T[:, : self.rank]
                # the sign of a pair of vectors is free: the largest entry of the longer side's is positive
                longer = u if g.shape[0] >= g.shape[1] else v
                sign = torch.stack([column[column.abs().argmax()].sign() for column in longer.T])
                self.bases[name] = u * sign, s, v * sign

    def step(self, weights, loss, draw, step, *, lr, eps):
        """One step in place; returns the loss to log and the slope. `draw`: (what, name, shape, number) -> numbers."""
        if step % self.k == 0:
            self.refresh(weights, loss, draw, eps)
        delta = self.delta_start + (self.delta_end - self.delta_start) * min(step / self.horizon, 1.0)
        z = {}
        for name, w in weights.items():
            if w.dim() != 2:
                z[name] = draw("noise", name, tuple(w.shape), 0)
                continue
            u, s, v = self.bases[name]
            core = draw("core", name, (self.rank, self.rank), 0)
            xi = draw("xi", name, (1,), 0)
            length = math.sqrt(sum(value**2 for value in s.tolist()))
            inner = sum(core[i, i] * s[i] for i in range(self.rank))
            core = core - (inner - xi * math.sqrt(delta) * length) / length**2 * torch.diag(s)
            z[name] = u @ core @ v.T * (math.sqrt(w.numel()) / self.rank if self.matched else 1.0)
        plus = loss({name: w + eps * z[name] for name, w in weights.items()})
        minus = loss({name: w - eps * z[name] for name, w in weights.items()})
        p = (plus - minus) / (2 * eps)
        for name, w in weights.items():
            w -= lr * p * z[name]
        return (plus + minus) / 2, p
