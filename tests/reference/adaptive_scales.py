"""Adaptive scales as a reader would write them: fp64, stored noise, plain loops; blocks are tensors."""

from statistics import median


class Twin:
    def __init__(self, sizes, *, power=1.0, explore=4, memory=8.0, rounds=2, limit=10.0, floor=1e-3):
        self.sizes = dict(sorted(sizes.items()))  # group -> numbers
        self.given = (power, explore, memory, rounds, limit, floor)
        self.times = dict.fromkeys(self.sizes, 0)
        self.energy, self.curve = dict.fromkeys(self.sizes, 0.0), dict.fromkeys(self.sizes, 0.0)
        self.square = dict.fromkeys(self.sizes, 0.0)
        self.turn = self.number = 0

    def curvature(self):
        if min(self.times.values()) < self.given[3]:
            return None
        bound = {}
        for k, t in self.curve.items():
            n = min(self.times[k], self.given[2])
            bound[k] = max(t, 0.0) + (max(self.square[k] - t**2, 0.0) / (n - 1)) ** 0.5
        mean = sum(bound.values()) / sum(self.sizes.values())
        return {k: max(t, self.given[5] * mean * self.sizes[k]) for k, t in bound.items()}

    def squares(self):
        power, _, _, _, limit, _ = self.given
        curve = self.curvature()
        if curve is None:
            return dict.fromkeys(self.sizes, 1.0)
        ratio = {k: self.energy[k] / curve[k] for k in self.sizes}
        middle = median(ratio.values())
        raw = {k: min(max(r / middle, 1 / limit), limit) ** power for k, r in ratio.items()}
        size = sum(raw[k] * curve[k] for k in raw) / sum(curve.values())
        return {k: r / size for k, r in raw.items()}

    def step(self, weights, loss, draw, *, lr, eps):
        """One step in place."""
        _, explore, memory, _, _, _ = self.given
        squares, u = self.squares(), {k: draw(k) for k in weights}
        if (self.number + 1) % explore:
            v = {k: squares[k] ** 0.5 * u[k] for k in weights}
            plus, minus = (loss({k: w + s * eps * v[k] for k, w in weights.items()}) for s in (1, -1))
            for k, w in weights.items():
                w -= lr * (plus - minus) / (2 * eps) * v[k]
        else:
            k = list(self.sizes)[self.turn % len(self.sizes)]
            h = eps * (sum(self.sizes.values()) / self.sizes[k]) ** 0.5
            plus, minus, here = (loss({**weights, k: weights[k] + s * h * u[k]}) for s in (1, -1, 0))
            r, curve, boost = (plus - minus) / (2 * h), self.curvature(), 1.0
            if curve is not None:
                boost = min(len(curve), sum(squares[j] * curve[j] for j in curve) / (squares[k] * curve[k]))
            weights[k] -= lr * boost * squares[k] * r * u[k]
            self.times[k] += 1
            share = 1 / min(self.times[k], memory)
            self.energy[k] += share * (r * r - self.energy[k])
            second = (plus - 2 * here + minus) / h**2
            self.curve[k] += share * (second - self.curve[k])
            self.square[k] += share * (second**2 - self.square[k])
            self.turn += 1
        self.number += 1
