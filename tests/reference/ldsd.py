"""LDSD as a reader would write it: fp64 dicts of tensors, stored noise, a stored mean, no engine, no directions.

v_k = mu + sigma u_k;  f_k = L(w + eps v_k);  v = the v_k of the smallest f_k
rho = (L(w + eps v) - L(w - eps v)) / (2 eps);  w <- w - lr rho v
c_k = f_k - mean of the other f_j;  mu <- (1 - decay) mu - lr_mu / (K sigma) sum_k c_k u_k
"""


def ldsd_step(
    weights,
    mu,
    loss,
    draw,
    *,
    lr,
    eps,
    k=5,
    sigma=1.0,
    lr_mu=1e-3,
    decay=0.0,
    normalise=False,
    released=False,
    only=None,
):
    """One step; weights and mu are changed in place.

    Args:
        weights: dict of name -> fp64 tensor.
        mu: dict of name -> fp64 tensor.
        loss: dict of weights -> float.
        draw: (direction number, name) -> standard normal, shaped like the tensor.
        only: names of the tensors that the step perturbs; all of them by default.

    Returns:
        The loss to log, and rho.
    """
    names = list(weights) if only is None else list(only)
    u = [{name: draw(i, name) for name in names} for i in range(k)]
    v = [{name: mu[name] + sigma * one[name] for name in names} for one in u]

    def at(direction, scale):
        return {name: w + scale * direction[name] if name in names else w for name, w in weights.items()}

    f = [loss(at(one, eps)) for one in v]
    best = min(range(k), key=lambda i: f[i])
    plus, minus = loss(at(v[best], eps)), loss(at(v[best], -eps))
    rho = (plus - minus) / (2 * eps)
    length = 1.0
    if normalise:
        length = sigma**2 * sum(weights[name].numel() for name in names)
        length /= sum(float(v[best][name].square().sum()) for name in names)
    for name in names:
        weights[name] -= lr * rho * length * v[best][name]
    noise = [{name: draw(k + i, name) for name in names} for i in range(k)] if released else u
    c = [f[i] - sum(f[j] for j in range(k) if j != i) / (k - 1) for i in range(k)] if k > 1 else [0.0]
    for name in names:
        g_mu = sum(c[i] * noise[i][name] for i in range(k)) / (k * sigma)
        mu[name] -= decay * mu[name] + lr_mu * g_mu
    return (plus + minus) / 2, rho
