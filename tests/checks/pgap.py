"""Claims about P-GAP that mutations must break."""

import math

import torch

from tests.checks.mezo import SEED, twin_model
from tests.reference.pgap import PGAPTwin
from tests.support.bare import bare_context, estimate_of, realised
from tests.support.resume import check_resumes
from zotune.core.direction import Noise
from zotune.core.low_rank import normal_matrix, signs
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.methods.pgap import PGAP
from zotune.optim.optimizer import ZO

SHAPES = {"a": (14, 11), "b": (14, 11), "wide": (6, 20), "bias": (14,)}
# Factors are rounded to 22 bits or more of their largest number; a product of two and a sum of r of them add up
GRID = 2.0**-20


def problem(shapes=None, seed=3):
    """A linear loss: (weights at 0, the loss, its gradient)."""
    generator = torch.Generator().manual_seed(seed)
    slopes = {
        name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in (shapes or SHAPES).items()
    }
    here = {name: torch.zeros_like(slope) for name, slope in slopes.items()}
    return here, (lambda w: sum(float((slopes[name] * w[name]).sum()) for name in w)), slopes


def bases_of(method):
    return {name: tuple(part.double() for part in basis) for name, basis in method._bases.items()}


def probed(slopes, h, step, index=0):
    """(1/h) sum_j rho_j Q_j of a linear loss, from the streams that the method documents."""
    total = {name: torch.zeros_like(slope) for name, slope in slopes.items()}
    for j in range(h):
        q = {
            name: Noise(stream(SEED, "step", step, index + j)).realise(Site(name, tuple(slope.shape)), torch.float64)
            for name, slope in slopes.items()
        }
        rho = sum(float((slopes[name] * q[name]).sum()) for name in slopes)
        for name in slopes:
            total[name] += rho * q[name] / h
    return total


def check_constraint(rank=4, xi="matrix", scale="none"):
    """6.1: <U S V^T, Zf> = xi sqrt(delta) |S|, with xi = +-1, to the factors' 22 bits; rank <= r; orthonormal bases."""
    here, loss, _ = problem()
    method = PGAP(rank=rank, h=3, k=5, horizon=20, xi=xi, scale=scale)
    seen = []
    for step in range(20):
        asked = []
        estimate_of(method, here, loss, step=step, seed=SEED, eps=0.5, asked=asked)
        z, delta = realised(asked[-2], here), 2 * (1 - step / 20)
        for name, (u, s, v) in bases_of(method).items():
            zf = z[name] / 0.5 * (rank / math.sqrt(z[name].numel()) if scale == "matched" else 1.0)
            for side in (u, v):
                assert (side.T @ side - torch.eye(rank, dtype=torch.float64)).abs().max() < 1e-6, name
            inner = float((u * s @ v.T * zf).sum() / s.norm())
            assert abs(abs(inner) - math.sqrt(delta)) < 1e-5 * (1 + float(zf.norm())), f"{name}: {inner}, delta {delta}"
            singular = torch.linalg.svdvals(zf)
            assert len(singular) <= rank or singular[rank] < 1e-5 * singular[0], f"{name} has a rank above {rank}"
            inside = u @ (u.T @ zf @ v) @ v.T
            assert (inside - zf).norm() < 1e-5 * zf.norm()
            expected = signs(stream(SEED, "step", step, 4 if step % 5 == 0 else 0), [name], "xi")
            if xi == "matrix":
                assert abs(inner - float(expected) * math.sqrt(delta)) < 1e-4, f"{name}: another sign"
            seen.append((step, name, inner))
    return seen


def check_bases_are_those_of_the_probes(rank=4, h=3):
    """Leading singular values and vectors of (1/h) sum rho_j Q_j, with the very Q_j that were probed."""
    here, loss, slopes = problem()
    method, asked = PGAP(rank=rank, h=h, k=5, horizon=20), []
    estimate_of(method, here, loss, step=5, seed=SEED, eps=0.5, asked=asked)
    assert len(asked) == 2 * h + 2
    for j in range(h):
        for side, point in ((0.5, asked[2 * j]), (-0.5, asked[2 * j + 1])):
            for name, value in realised(point, here).items():
                q = Noise(stream(SEED, "step", 5, j)).realise(Site(name, tuple(value.shape)), torch.float64)
                assert torch.equal(value, side * q), f"probe {j} is not plain noise on {name}"
    estimate = probed(slopes, h, 5)
    for name, (u, s, v) in bases_of(method).items():
        full = torch.linalg.svd(estimate[name], full_matrices=False)
        assert (s - full.S[:rank]).abs().max() < 1e-5 * full.S[0], f"{name}: other singular values"
        best = full.U[:, :rank] * full.S[:rank] @ full.Vh[:rank]
        assert (u * s @ v.T - best).norm() < 1e-5 * best.norm(), f"{name}: not the truncated decomposition"
    assert set(method._bases) == {"a", "b", "wide"}


def check_refresh_happens_at_multiples_of_k(k=4, h=2):
    """Bases change at t = 0, k, 2k only, and forwards are 2 + 2h there, 2 elsewhere."""
    here, loss, _ = problem()
    method, before = PGAP(rank=2, h=h, k=k, horizon=100), None
    for step in range(3 * k):
        _, _, ctx = estimate_of(method, here, loss, step=step, seed=SEED)
        now = bases_of(method)["a"][0]
        same = before is not None and torch.equal(now, before)
        assert same == (step % k != 0), f"step {step}: bases {'kept' if same else 'changed'}"
        assert ctx.queries == (2 + 2 * h if step % k == 0 else 2)
        before = now


def check_refresh_uses_the_current_weights(k=3):
    """The estimate of a quadratic's gradient w is one of the w that stand there at that step."""
    method, w = PGAP(rank=2, h=400, k=k, horizon=100), None
    for step in (0, k):
        w = {"a": torch.randn(5, 4, dtype=torch.float64)}
        estimate_of(method, w, lambda x: float((x["a"] ** 2).sum() / 2), step=step, seed=SEED)
        u, s, v = bases_of(method)["a"]
        cosine = float((u * s @ v.T * w["a"]).sum() / s.norm() / w["a"].norm())
        assert cosine > 0.7  # d = 20, h = 400: cos is 0.97 for all of G, and of a 5 x 4 matrix rank 2 keeps most


def check_tensors_of_equal_shape_have_their_own_noise():
    here, loss, _ = problem()
    method, asked = PGAP(rank=4, h=3, horizon=10), []
    estimate_of(method, here, loss, seed=SEED, eps=0.5, asked=asked)
    z, bases = realised(asked[-2], here), bases_of(method)
    cores = [bases[name][0].T @ z[name] @ bases[name][2] for name in ("a", "b")]
    off = ~torch.eye(4, dtype=torch.bool)  # the diagonal is aligned with S, the rest is the draw
    assert (cores[0] - cores[1]).abs()[off].max() > 0.1, "two matrices share their core"


def check_delta_schedule():
    method = PGAP(delta_start=2.0, delta_end=0.5, horizon=10)
    assert [method.delta(step) for step in (0, 5, 10, 1000)] == [2.0, 1.25, 0.5, 0.5]


def draws(weights_now, step, h, k):
    def draw(what, name, shape, number):
        site = Site(name, tuple(weights_now[name].shape))
        first = (
            h + 1 if step % k == 0 else 0
        )  # streams of the step used by a refresh: h probes and one for random bases
        if what == "probe":
            return Noise(stream(SEED, "step", step, number)).realise(site, torch.float64)
        if what == "noise":
            return Noise(stream(SEED, "step", step, first + 1)).realise(site, torch.float64)
        if what == "xi":
            return float(signs(stream(SEED, "step", step, first), [name], "xi"))
        return normal_matrix(stream(SEED, "step", step, first), site, "core", shape)

    return draw


def check_equals_the_readable_twin(steps=20, scale="none", **options):
    """20 steps in fp64 with three refreshes. The factors' 22 bits are all that differs, but each refresh decomposes an
    estimate that has moved by as much, and singular vectors move by that over the gaps of the singular values (0.1 of
    the largest or more here)."""
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    reference = PGAPTwin(rank=2, h=3, k=7, horizon=25, matched=scale == "matched")
    settings = {"rank": 2, "h": 3, "k": 7, "horizon": 25, "scale": scale, **options}
    opt = ZO(named, "pgap", lr=0.05, eps=1e-2, seed=SEED, method_options=settings)
    for step in range(steps):
        expected, p = reference.step(twin, loss, draws(twin, step, 3, 7), step, lr=0.05, eps=1e-2)
        logged = opt.step(lambda: loss(dict(named)))
        assert abs(float(logged) - expected) < 1e-4 * abs(expected)
        assert abs(opt.last.estimate.info["rho"] - p) < 1e-3 * (1 + abs(p))
    for name, q in named:
        moved = (twin[name] - start[name]).norm()
        assert (q.detach() - twin[name]).norm() < 1e-4 * moved, name
        assert moved > 1e-2, "nothing moved, so nothing was compared"


def check_resume(path, stop=5, steps=12):
    """Weights of a run resumed inside a period equal those of an uninterrupted one, bit for bit."""

    def begin():
        named, loss = twin_model()
        options = {"rank": 2, "h": 2, "k": 4, "horizon": 20}
        return named, loss, ZO(named, "pgap", lr=0.02, eps=1e-2, seed=SEED, method_options=options)

    check_resumes(path, begin, stop, steps)


def check_losses_that_are_not_finite(bad=math.nan):
    """A refresh with such a loss keeps the old bases, or starts with random ones; the step goes by its own pair."""
    here, loss, _ = problem()
    for first in (0, 4):
        method, count = PGAP(rank=3, h=2, k=4, horizon=100), []
        if first:
            estimate_of(method, here, loss, step=0, seed=SEED)
        before = bases_of(method)

        def once_bad(w, count=count):
            count.append(0)
            return bad if len(count) == 2 else loss(w)

        made, estimate, ctx = estimate_of(method, here, once_bad, step=first, seed=SEED)
        assert ctx.queries == 6
        assert estimate.is_finite()
        assert bool(made.isfinite().all())
        for name, (u, s, v) in bases_of(method).items():
            if first:
                assert all(torch.equal(x, y) for x, y in zip((u, s, v), before[name], strict=True)), name
            else:
                assert float(s.norm()) == 0.0
                assert (u.T @ u - torch.eye(3, dtype=torch.float64)).abs().max() < 1e-6
        refused = method.estimate(bare_context(here, lambda w: bad, step=first + 1, seed=SEED))
        assert not refused.is_finite()
