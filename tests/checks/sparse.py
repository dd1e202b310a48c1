"""Claims about sparse MeZO that mutations must break."""

import math

import torch
from torch import nn

from tests.checks.engines import make
from tests.checks.mezo import SEED, twin_model
from tests.reference.sparse import mask_of, sparse_step
from tests.support.bare import estimate_of
from tests.support.models import CASES, bits, snapshot
from zotune.core.direction import Noise
from zotune.core.masked import Masked
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.methods.sparse import Sparse, SparseNoise
from zotune.optim.optimizer import ZO

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


def masked(density, number=0, inner=None):
    return Masked(inner or Noise(stream(SEED, "inner")), stream(SEED, "run", "mask", number), {}, density)


def kept(direction, site):
    return direction.realise(site) != 0  # the noise's table holds no 0


def check_density(density):
    """C7: the share that is kept is the share that was asked for: binomial, 3 standard deviations (fixed seed)."""
    site = Site("layers.0.weight", (500, 800))
    share = float(kept(masked(density), site).double().mean())
    exact = round(density * 65536) / 65536
    assert abs(exact - density) <= 2**-17
    sigma = math.sqrt(exact * (1 - exact) / site.numel)
    assert abs(share - exact) <= 3 * sigma, f"density {share}, asked for {density}, sigma {sigma}"


def check_masks_are_independent():
    """Equal shapes, and intervals that follow each other: both kept with probability density^2, 4 standard deviations."""
    one = kept(masked(0.3), Site("layers.0.weight", (300, 500)))
    other = kept(masked(0.3), Site("layers.1.weight", (300, 500)))
    later = kept(masked(0.3, number=1), Site("layers.0.weight", (300, 500)))
    neighbours = one.view(-1)[1:] & one.view(-1)[:-1]  # two halves of one random word, or two words
    p = 0.3**2
    for both in (one & other, one & later, neighbours):
        share = float(both.double().mean())
        # neighbours overlap in pairs: their variance is p (1 + 2 * 0.3 - 3 p) / N, less than twice p (1 - p) / N
        assert abs(share - p) < 4 * math.sqrt(2 * p * (1 - p) / both.numel()), f"{share}, independent: {p}"


def check_the_mask_does_not_see_the_noise():
    """Kept numbers have the variance of the noise, and a mean of 0: 4 standard errors."""
    site = Site("layers.0.weight", (500, 800))
    z = masked(0.25).realise(site, FP64)
    z = z[z != 0]
    assert abs(float(z.mean())) < 4 / math.sqrt(z.numel())
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt(2 / z.numel())


def run(dtype=FP32, steps=3, n=1, density=0.3, interval=1000, engine="in_place", **settings):
    """Steps on bare tensors, and what the closure saw: (names -> bits before, per step: bits in each query, bits after)."""
    case = CASES["mlp"](dtype)
    options = {"density": density, "n": n, "interval": interval}
    opt = make(case, engine, method="sparse", method_options=options, lr=1e-2, **settings)
    seen, before = [], snapshot(case)

    def closure():
        seen.append(snapshot(case))
        return case.closure()

    after = []
    for _ in range(steps):
        opt.step(closure)
        after.append(snapshot(case))
    assert opt.refused == 0
    return opt, before, seen, after


def moved(before, after):
    return torch.cat([(before[name] != after[name]).flatten() for name in before])


def mask_on(opt, step, interval=1000, density=0.3):
    source = stream(opt.seed, "run", "mask", step // interval)
    return torch.cat([mask_of(source, slot.site, density).flatten() for slot in opt.weights])


def check_probe_and_update_have_one_mask(n=1, interval=1000):
    """C7: in each query and in the update, the numbers that change are those of the mask, for each of n directions. fp64."""
    opt, before, seen, after = run(FP64, steps=4, n=n, interval=interval)
    for step, end in enumerate(after):
        expected = mask_on(opt, step, interval)
        start = before if step == 0 else after[step - 1]
        queries = seen[1:][2 * n * step : 2 * n * (step + 1)]  # the engine looked at the model once
        for query in queries:
            assert torch.equal(moved(start, query), expected), "a probe has another mask"
        assert torch.equal(moved(start, end), expected), "the update has another mask"


def check_masked_numbers_keep_their_bits(dtype=FP32, n=1):
    """Signed zeros too: 5 steps with one mask move nothing else."""
    weight = nn.Parameter(torch.zeros(40, 50).to(dtype))
    weight.data.view(-1)[::3] = -0.0
    weight.data.view(-1)[1::3] = 0.5
    named, before = [("a.weight", weight)], bits(weight)
    opt = ZO(named, "sparse", lr=1e-2, eps=0.5, seed=SEED, engine="in_place", method_options={"density": 0.3, "n": n})
    for _ in range(5):
        opt.step(lambda: (weight.float() - 1).square().sum())
    changed = bits(weight) != before
    mask = mask_of(stream(SEED, "run", "mask", 0), Site("a.weight", (40, 50)), 0.3)
    assert not bool((changed & ~mask).any()), "a masked number changed"
    assert float(changed[mask].double().mean()) > 0.95


def check_equals_the_readable_twin(n=1, interval=4, steps=20):
    """20 steps in fp64 against plain loops over 5 masks: a few 2**-53 a step, amplified by 1/eps = 100."""
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    options = {"density": 0.5, "interval": interval, "n": n}
    opt = ZO(named, "sparse", lr=0.02, eps=1e-2, seed=SEED, method_options=options)
    for step in range(steps):
        sites = {name: Site(name, tuple(w.shape)) for name, w in twin.items()}
        masks = {name: mask_of(stream(SEED, "run", "mask", step // interval), sites[name], 0.5) for name in twin}

        def draw(i, name, step=step, sites=sites):
            return Noise(stream(SEED, "step", step, i)).realise(sites[name], FP64)

        expected = sparse_step(twin, loss, draw, masks, lr=0.02, eps=1e-2, n=n)
        assert abs(float(opt.step(lambda: loss(dict(named)))) - expected) < 1e-10
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-10, name
        assert float((p.detach() - start[name]).abs().max()) > 1e-3, "nothing moved, so nothing was compared"


def check_moments(count, n=1, density=0.4):
    """On a linear loss with gradient b: E g = m * b, and E|g|^2 = (|m| + n + 1)/n |m * b|^2 for Gaussian z, to 5 sigma."""
    torch.manual_seed(0)
    weights = {"a.weight": torch.zeros(5, 6, dtype=FP64), "b.bias": torch.zeros(7, dtype=FP64)}
    b = {name: torch.randn_like(w) for name, w in weights.items()}

    def loss(w):
        return sum(float((w[name] * b[name]).sum()) for name in w)

    method, made = Sparse(density=density, n=n), []
    for step in range(count):
        made.append(estimate_of(method, weights, loss, step=step % 1000, seed=0, kind="gaussian", eps=0.5)[0])
    source = stream(0, "run", "mask", 0)
    mask = torch.cat([mask_of(source, Site(name, tuple(w.shape)), density).flatten() for name, w in weights.items()])
    expected = mask * torch.cat([b[name].flatten() for name in weights])
    made, size, norm = torch.stack(made), int(mask.sum()), float(expected.square().sum())
    assert bool((made[:, ~mask] == 0).all())
    error = made.mean(dim=0) - expected
    # each number has variance (b_k^2 + |m b|^2) / n over `count` steps
    sigma = ((expected.square() + norm) / (n * count)).sqrt()
    assert bool((error.abs() < 5 * sigma).all()), float((error.abs() / sigma).max())
    squares = made.square().sum(dim=1) / norm
    predicted = (size + n + 1) / n
    assert abs(float(squares.mean()) - predicted) < 5 * float(squares.std()) / math.sqrt(count)


def check_the_source_has_unit_variance():
    """E z^2 = 1 over mask and noise: each kept number has z^2 / density; 4 standard errors, Var z^2 = 3 / density - 1."""
    site = Site("a.weight", (400, 500))

    class Ctx:
        step = 0
        sites = (site,)

        def stream(self, *purpose):
            return stream(SEED, *purpose)

        def gaussian(self):
            return Noise(stream(SEED, "z"))

    z = SparseNoise(density=0.2).draw(Ctx()).realise(site, FP64)
    assert abs(float(z.square().mean()) - 1) < 4 * math.sqrt((3 / 0.2 - 1) / z.numel())
    assert abs(float((z != 0).double().mean()) - 0.2) < 0.01
