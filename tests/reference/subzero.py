"""SubZero as a reader of the paper would write it: fp64, whole matrices, Gram-Schmidt by hand, no engine, no directions.

U, V = orthonormalised Gaussian columns, new when the step is a multiple of the interval;  Z ~ N(0, I), r x r
Zt = sqrt(mn)/r U Z V^T on matrices, plain noise elsewhere
rho = (L(w + eps Zt) - L(w - eps Zt)) / (2 eps)  or  (L(w + eps Zt) - L(w)) / eps;   w <- w - lr * mean of rho Zt
"""

import math

import torch


def gram_schmidt(columns):
    """Orthonormal columns that span the same spaces; twice, so that rounding does not build up."""
    for _ in range(2):
        done = []
        for column in columns.T:
            for earlier in done:
                column = column - (earlier @ column) * earlier
            done.append(column / column.norm())
        columns = torch.stack(done, dim=1)
    return columns


def most_nearly_square(shape):
    numel = shape[0] * shape[1]
    rows = max(k for k in range(1, numel + 1) if numel % k == 0 and k * k <= numel)
    return rows, numel // rows


class SubZeroTwin:
    """Holds the bases between steps, as the paper's algorithm does."""

    def __init__(self, rank, interval, thin=8, n=1, sides=2):
        self.rank, self.interval, self.thin, self.n, self.sides = rank, interval, thin, n, sides
        self.bases = {}

    def direction(self, weights, draw, i):
        """Zt as a dict of tensors.

        Args:
            draw: (what, name, shape, direction number) -> standard normals.
        """
        z = {}
        for name, w in weights.items():
            if w.dim() != 2:
                z[name] = draw("noise", name, tuple(w.shape), i)
                continue
            u, v = self.bases[name]
            core = draw("core", name, (self.rank, self.rank), i)
            scale = math.sqrt(w.numel()) / self.rank
            z[name] = (scale * u @ core @ v.T).reshape(w.shape)
        return z

    def step(self, weights, loss, draw, step, *, lr, eps):
        """One step in place; returns the loss to log and the slopes."""
        if step % self.interval == 0:
            for name, w in weights.items():
                if w.dim() == 2:
                    thin = min(w.shape) <= self.thin * self.rank
                    m, n = most_nearly_square(w.shape) if thin else w.shape
                    self.bases[name] = tuple(
                        gram_schmidt(draw(side, name, (rows, self.rank), 0))
                        for side, rows in (("left", m), ("right", n))
                    )
        z = [self.direction(weights, draw, i) for i in range(self.n)]
        here = loss(weights)
        rhos, probes = [], []
        for each in z:
            plus = loss({name: w + eps * each[name] for name, w in weights.items()})
            if self.sides == 2:
                minus = loss({name: w - eps * each[name] for name, w in weights.items()})
                rhos.append((plus - minus) / (2 * eps))
                probes += [plus, minus]
            else:
                rhos.append((plus - here) / eps)
                probes = [here]
        for name, w in weights.items():
            w -= lr * sum(rho * each[name] for rho, each in zip(rhos, z, strict=True)) / self.n
        return sum(probes) / len(probes), rhos
