"""Claims about LOZO that mutations must break."""

import math

import torch

from tests.checks.mezo import SEED, twin_model
from tests.reference.lozo import LOZOTwin
from tests.support.bare import bare_context, estimate_of, realised
from tests.support.resume import check_resumes
from zotune.core.direction import Noise
from zotune.core.low_rank import normal_matrix
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.methods.lozo import LOZO, Lazy
from zotune.optim.optimizer import ZO

GRID = 2.0**-20  # factors are rounded to 22 bits or more of their largest number; a few products of them add up
SHAPES = {"a": (12, 9), "b": (12, 9), "bias": (12,)}


def weights(shapes=None):
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in (shapes or SHAPES).items()}


def factors(name, step, *, rank, interval, seed=SEED, shape=(12, 9), kind="normal"):
    """U and V of a step from the streams that the method documents, of the run's kind of noise."""
    site = Site(name, shape)
    u = normal_matrix(stream(seed, "step", step, 0), site, "left", (shape[0], rank), kind)
    return u, normal_matrix(stream(seed, "run", "lozo", step // interval), site, "right", (shape[1], rank), kind)


def check_probes_and_estimate_are_the_papers(rank=3, step=7, interval=5):
    """Points +-eps U V^T; estimate c U V^T / r on matrices, c z elsewhere. eps 0.5: exact, so that bits can be compared."""
    tensors, asked = weights(), []
    slopes = {name: torch.randn_like(tensor) for name, tensor in tensors.items()}

    def loss(w):
        return sum(float((slopes[name] * w[name]).sum()) for name in w)

    method = LOZO(rank=rank, interval=interval)
    made, estimate, _ = estimate_of(method, tensors, loss, step=step, seed=SEED, eps=0.5, asked=asked)
    plus, minus = (realised(point, tensors) for point in asked)
    expected, product = [], {}
    for name in tensors:
        if name == "bias":
            product[name] = Noise(stream(SEED, "step", step, 1)).realise(Site(name, (12,)), torch.float64)
        else:
            u, v = factors(name, step, rank=rank, interval=interval)
            product[name] = u @ v.T
        assert (plus[name] - 0.5 * product[name]).abs().max() < GRID * product[name].abs().max(), name
        assert torch.equal(plus[name], -minus[name])
    c = sum(float((slopes[name] * product[name]).sum()) for name in tensors)
    assert abs(estimate.info["rho"] - c) < 1e-5 * (1 + abs(c))
    expected = [c * product[name] / (1 if name == "bias" else rank) for name in tensors]
    expected = torch.cat([tensor.flatten() for tensor in expected])
    assert (made - expected).norm() < 1e-5 * expected.norm()


def check_v_is_kept_for_the_interval(interval=4, rank=2):
    """Row spaces of two steps are equal exactly inside an interval; U is new in every step."""
    tensors, source = weights(), Lazy(rank=rank, interval=interval)
    seen = []
    for step in range(3 * interval):
        ctx = bare_context(tensors, lambda w: 0.0, step=step, seed=SEED)
        seen.append(realised(source.draw(ctx), tensors)["a"])
    for step in range(1, 3 * interval):
        both = torch.linalg.svdvals(torch.cat([seen[step - 1], seen[step]]))
        same = bool(both[rank] < 1e-5 * both[0])
        assert same == (step % interval != 0), f"step {step}: V {'kept' if same else 'changed'}"
        assert not torch.allclose(seen[step], seen[step - 1]), f"step {step} repeats its direction"


def check_tensors_of_equal_shape_have_their_own_noise():
    tensors = weights()
    made = realised(Lazy(rank=2).draw(bare_context(tensors, lambda w: 0.0, seed=SEED)), tensors)
    for a, b in ((made["a"], made["b"]), (made["a"].T, made["b"].T)):
        both = torch.linalg.svdvals(torch.cat([a, b]))  # of rank 4, unless they share the factor on this side
        assert both[3] > 1e-2 * both[0], "two matrices of equal shape share a factor"


def draws(weights_now, step, interval, noise="normal"):
    def draw(what, name, shape):
        site = Site(name, tuple(weights_now[name].shape))
        if what == "noise":
            return Noise(stream(SEED, "step", step, 1), noise).realise(site, torch.float64)
        key = stream(SEED, "step", step, 0) if what == "left" else stream(SEED, "run", "lozo", step // interval)
        return normal_matrix(key, site, what, shape, noise)

    return draw


def check_equals_the_readable_twin(momentum=0.0, steps=20, noise="normal"):
    """20 steps in fp64, V renewed twice. The factors' 22 bits (and N's fp32) are all that differs: 1e-6 of a move each."""
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    reference = LOZOTwin(rank=2, interval=7, momentum=momentum)
    options = {"rank": 2, "interval": 7, "momentum": momentum}
    opt = ZO(named, "lozo", lr=0.02, eps=1e-2, seed=SEED, noise=noise, method_options=options)
    for step in range(steps):
        expected, c = reference.step(twin, loss, draws(twin, step, 7, noise), step, lr=0.02, eps=1e-2)
        logged = opt.step(lambda: loss(dict(named)))
        assert abs(float(logged) - expected) < 1e-5 * abs(expected)
        assert abs(opt.last.estimate.info["rho"] - c) < 1e-4 * (1 + abs(c))
    for name, p in named:
        moved = (twin[name] - start[name]).norm()
        assert (p.detach() - twin[name]).norm() < 2e-5 * moved, name
        assert moved > 1e-2, "nothing moved, so nothing was compared"


def check_momentum_is_the_dense_mean_inside_an_interval(rank=2, beta=0.9):
    """While V is kept, N V^T / r is beta times the last one plus (1 - beta) c U V^T / r. fp32 N: 2**-24 of it a step."""
    tensors = {"a": torch.zeros(12, 9, dtype=torch.float64)}
    slope = torch.randn(12, 9, dtype=torch.float64)
    method, expected = LOZO(rank=rank, interval=100, momentum=beta), torch.zeros(12 * 9, dtype=torch.float64)
    for step in range(6):
        made, estimate, _ = estimate_of(
            method, tensors, lambda w: float((slope * w["a"]).sum()), step=step, seed=SEED, eps=0.5
        )
        u, v = factors("a", step, rank=rank, interval=100)
        expected = beta * expected + (1 - beta) * estimate.info["rho"] * (u @ v.T).flatten() / rank
        assert (made - expected).norm() < 1e-5 * expected.norm(), f"step {step}"


def check_momentum_is_taken_over_to_a_new_v(rank=2, beta=0.9):
    """N V_old^T V / n, with V_old of the interval that N was made in, also if steps in between were refused."""
    tensors = {"a": torch.zeros(12, 9, dtype=torch.float64)}
    method, slope = LOZO(rank=rank, interval=3, momentum=beta), torch.randn(12, 9, dtype=torch.float64)

    def loss(w):
        return float((slope * w["a"]).sum())

    for step in (0, 1):
        estimate_of(method, tensors, loss, step=step, seed=SEED)
    before = method._mean["a"].double().clone()
    refused = bare_context(tensors, lambda w: math.nan, step=2, seed=SEED)
    assert not method.estimate(refused).is_finite()  # and observe is not called
    made, estimate, _ = estimate_of(method, tensors, loss, step=6, seed=SEED)  # two intervals on
    _, old = factors("a", 1, rank=rank, interval=3)
    u, v = factors("a", 6, rank=rank, interval=3)
    expected = beta * before @ (old.T @ v) / 9 + (1 - beta) * estimate.info["rho"] * u
    assert (method._mean["a"].double() - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (made - (expected @ v.T / rank).flatten()).norm() < 1e-5 * made.norm()


def check_refused_steps_teach_nothing():
    tensors, method = weights(), LOZO(rank=2, momentum=0.9)
    estimate_of(method, tensors, lambda w: float(w["a"].sum()), step=0)
    before = method.state_dict()
    estimate = method.estimate(bare_context(tensors, lambda w: math.inf, step=1))
    assert not estimate.is_finite()
    after = method.state_dict()
    assert after["mean"].keys() == before["mean"].keys()
    assert all(torch.equal(before["mean"][name], after["mean"][name]) for name in ("a", "b"))


def check_resume(path, stop=5, steps=12):
    """Weights of a resumed run equal those of an uninterrupted one, bit for bit, with N in the state."""

    def begin():
        named, loss = twin_model()
        options = {"rank": 2, "interval": 4, "momentum": 0.9}
        return named, loss, ZO(named, "lozo", lr=0.02, eps=1e-2, seed=SEED, method_options=options)

    check_resumes(path, begin, stop, steps)


def estimates(count, interval, *, rank=2, shape=(4, 3)):
    """Estimates of a linear loss of one matrix, the matrix's gradient, and V of the first interval."""
    slope = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tensors, method = {"w": torch.zeros_like(slope)}, LOZO(rank=rank, interval=interval)

    def loss(w):
        return float((slope * w["w"]).sum())

    made = [estimate_of(method, tensors, loss, step=step, seed=SEED)[0] for step in range(count)]
    return torch.stack(made), slope, factors("w", 0, rank=rank, interval=interval, shape=shape)[1]
