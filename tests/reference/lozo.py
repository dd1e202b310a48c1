"""LOZO as a reader of the paper would write it: fp64, whole matrices, V and N kept, no engine, no directions.

V: n x r, new when the step is a multiple of the interval;  U: m x r, new every step;  plain noise on what is no matrix
c = (L(w + eps U V^T) - L(w - eps U V^T)) / (2 eps);   w <- w - lr c U V^T / r
with momentum: N <- N V_old^T V / n when V is new;  N <- beta N + (1 - beta) c U;  w <- w - lr N V^T / r
"""


class LOZOTwin:
    def __init__(self, rank, interval, momentum=0.0):
        self.rank, self.interval, self.momentum = rank, interval, momentum
        self.v, self.n = {}, {}

    def step(self, weights, loss, draw, step, *, lr, eps):
        """One step in place; returns the loss to log and the slope. `draw`: (what, name, shape) -> standard normals."""
        matrices = {name for name, w in weights.items() if w.dim() == 2}
        if step % self.interval == 0:
            for name in sorted(matrices):
                columns = weights[name].shape[1]
                new = draw("right", name, (columns, self.rank))
                if name in self.n:
                    self.n[name] = self.n[name] @ self.v[name].T @ new / columns
                self.v[name] = new
        u = {name: draw("left", name, (len(weights[name]), self.rank)) for name in matrices}
        z = {
            name: u[name] @ self.v[name].T if name in matrices else draw("noise", name, tuple(w.shape))
            for name, w in weights.items()
        }
        plus = loss({name: w + eps * z[name] for name, w in weights.items()})
        minus = loss({name: w - eps * z[name] for name, w in weights.items()})
        c = (plus - minus) / (2 * eps)
        for name, w in weights.items():
            if name not in matrices:
                w -= lr * c * z[name]
            elif self.momentum:
                old = self.n.get(name, 0.0)
                self.n[name] = self.momentum * old + (1 - self.momentum) * c * u[name]
                w -= lr * self.n[name] @ self.v[name].T / self.rank
            else:
                w -= lr * c * z[name] / self.rank
        return (plus + minus) / 2, c
