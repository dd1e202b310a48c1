"""Claims about MeZO that mutations must break."""

import torch
from torch import nn

from tests.reference.mezo import mezo_step
from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.optim.optimizer import ZO

SEED = 11


def quadratic(d=12):
    """A fp64 quadratic in two tensors, its loss and its gradient."""
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(d, d, dtype=torch.float64, generator=generator)
    a, b = root @ root.T / d, torch.randn(d, dtype=torch.float64, generator=generator)
    w = torch.randn(d, dtype=torch.float64, generator=generator)
    named = [("first.weight", nn.Parameter(w[:5].clone())), ("second.bias", nn.Parameter(w[5:].clone()))]

    def loss(values):
        x = torch.cat(list(values))
        return x @ a @ x / 2 + b @ x

    return named, lambda: loss([p for _, p in named]), a @ w + b


def realised(direction, named):
    return torch.cat([direction.realise(Site(n, tuple(p.shape)), torch.float64).flatten() for n, p in named])


def z_of_step(named, step=0, index=0, seed=SEED):
    return realised(Noise(stream(seed, "step", step, index)), named)


def check_quadratic_slope_is_exact(eps=0.1):
    """M1: on a quadratic rho = z.grad for any eps. Rounding of the losses (about 50) over eps: 50 * 2**-52 / eps."""
    named, closure, gradient = quadratic()
    opt = ZO(named, lr=0.0, eps=eps, seed=SEED)
    opt.step(closure)
    expected = float(z_of_step(named) @ gradient)
    rho = opt.last.estimate.info["rho"]
    assert abs(rho - expected) < 1e-12 * (1 + 1 / eps) * (1 + abs(expected)), f"rho {rho}, z.grad {expected}"
    assert torch.allclose(realised(opt.last.estimate.direction, named), expected * z_of_step(named), rtol=1e-11 / eps)


def check_logged_loss_is_the_mean_of_the_pair():
    """Contract 11, in fp64 where w + eps z and w - eps z are what the closure was asked at."""
    named, closure, _ = quadratic()
    seen = []
    opt = ZO(named, lr=0.0, eps=0.5, seed=SEED, engine="in_place")
    logged = opt.step(lambda: seen.append(float(closure())) or seen[-1])
    plus, minus = seen[-2:]
    assert abs(plus - minus) > 0.1  # else the mean and either side could not be told apart
    assert float(logged) == (plus + minus) / 2, f"logged {float(logged)}, pair {plus}, {minus}"


def twin_model():
    generator = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator) / 2

    x, y = draw(10, 5), draw(10, 2)
    named = [
        ("inner.weight", draw(6, 5)),
        ("inner.bias", draw(6)),
        ("final_norm.weight", draw(6)),
        ("head.weight", draw(2, 6)),
    ]

    def loss(w):
        hidden = torch.tanh(x @ w["inner.weight"].T + w["inner.bias"]) * w["final_norm.weight"]
        return float((hidden @ w["head.weight"].T - y).square().mean())

    return [(name, nn.Parameter(value)) for name, value in named], loss


def check_equals_the_readable_twin(n=1, sides=2, weight_decay=0.1, steps=20, noise="normal"):
    """20 steps in fp64 against plain loops. They round in another order: 20 steps of a few 2**-53, amplified by 1/eps."""
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    opt = ZO(
        named,
        lr=0.02,
        eps=1e-2,
        seed=SEED,
        weight_decay=weight_decay,
        noise=noise,
        method_options={"n": n, "sides": sides},
    )
    for step in range(steps):

        def draw(i, name, step=step):
            shape = tuple(twin[name].shape)
            return Noise(stream(SEED, "step", step, i), noise).realise(Site(name, shape), torch.float64)

        expected, rhos = mezo_step(twin, loss, draw, lr=0.02, eps=1e-2, n=n, sides=sides, weight_decay=weight_decay)
        logged = opt.step(lambda: loss(dict(named)))
        assert abs(float(logged) - expected) < 1e-11
        assert abs(opt.last.estimate.info["rho"] - rhos[-1]) < 1e-9
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-10, name
        assert float((p.detach() - start[name]).abs().max()) > 1e-3, "nothing moved, so nothing was compared"
