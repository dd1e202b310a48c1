"""Claims about SubZero that mutations must break."""

import math

import torch

from tests.checks.mezo import SEED, twin_model
from tests.reference.subzero import SubZeroTwin
from tests.support.bare import bare_context, realised
from tests.support.resume import check_resumes
from zotune.core.direction import Noise
from zotune.core.low_rank import normal_matrix
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.methods.subzero import Subspace
from zotune.optim.optimizer import ZO

# Factors are rounded to 22 bits or more of their largest number; a product of two and a sum of r of them add up
GRID = 2.0**-20


def weights(**shapes):
    """Zeros of the given shapes, and two matrices of equal shape."""
    shapes = shapes or {"a": (24, 17), "b": (24, 17), "bias": (24,)}
    return {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}


def draw_at(source, tensors, step=0, seed=SEED):
    """(the direction as tensors, the bases it lies between)."""
    ctx = bare_context(tensors, lambda w: 0.0, step=step, seed=seed)
    made = realised(source.draw(ctx), tensors)
    return made, {name: tuple(side.double() for side in sides) for name, sides in source._frames.pairs.items()}


def check_directions_lie_between_orthonormal_bases(rank=3):
    """C10: U^T U = V^T V = I to 1e-6, Zt in col(U) x row(V), of rank r exactly."""
    tensors = weights()
    made, bases = draw_at(Subspace(rank=rank, reshape="never"), tensors)
    for name in ("a", "b"):
        u, v = bases[name]
        for side in (u, v):
            error = (side.T @ side - torch.eye(rank, dtype=torch.float64)).abs().max()
            assert error < 1e-6, f"{name}: columns are orthonormal to {error:.1e} only"
        inside = u @ (u.T @ made[name] @ v) @ v.T
        assert (inside - made[name]).norm() < 1e-5 * made[name].norm(), f"{name} leaves its subspace"
        singular = torch.linalg.svdvals(made[name])
        assert singular[rank - 1] > 1e-3 * singular[0]
        assert singular[rank] < 1e-5 * singular[0], f"{name} has a rank above {rank}"


def check_direction_is_the_core_on_the_scale_of_plain_noise(rank=3):
    """Zt = sqrt(mn)/r U Z V^T with Z of the step's stream: so |Zt| = sqrt(mn)/r |Z|, and E|Zt|^2 = mn."""
    tensors = weights()
    made, bases = draw_at(Subspace(rank=rank, reshape="never"), tensors, step=4)
    for name in ("a", "b"):
        core = normal_matrix(stream(SEED, "step", 4, 0), Site(name, (24, 17)), "core", (rank, rank))
        u, v = bases[name]
        expected = math.sqrt(24 * 17) / rank * u @ core @ v.T
        assert (made[name] - expected).abs().max() < 8 * GRID * expected.abs().max(), name


def check_tensors_of_equal_shape_have_their_own_noise(rank=3):
    tensors = weights()
    made, bases = draw_at(Subspace(rank=rank, reshape="never"), tensors)
    cores = [bases[name][0].T @ made[name] @ bases[name][1] for name in ("a", "b")]
    assert (cores[0] - cores[1]).abs().max() > 0.1, "two matrices share their core"
    for side in (0, 1):
        assert (bases["a"][side] - bases["b"][side]).abs().max() > 0.01, "two matrices share a basis"


def check_everything_else_gets_plain_noise():
    tensors = weights(a=(24, 17), bias=(24,), kernel=(3, 4, 5), scalar=(), row=(1, 30))
    made, bases = draw_at(Subspace(rank=3), tensors)
    assert set(bases) == {"a"}
    for name in ("bias", "kernel", "scalar", "row"):
        plain = Noise(stream(SEED, "step", 0, 1)).realise(Site(name, tuple(tensors[name].shape)), torch.float64)
        assert torch.equal(made[name], plain), name


def check_bases_change_at_multiples_of_the_interval(interval=4, rank=3):
    """C12, and the core is new in every step."""
    tensors, source = weights(), Subspace(rank=rank, interval=interval)
    seen = [draw_at(source, tensors, step) for step in range(3 * interval)]
    for step in range(1, 3 * interval):
        same = torch.equal(seen[step][1]["a"][0], seen[step - 1][1]["a"][0])
        assert same == (step % interval != 0), f"step {step}: bases {'kept' if same else 'changed'}"
        assert not torch.equal(seen[step][0]["a"], seen[step - 1][0]["a"]), f"step {step} repeats its direction"


def check_parts_have_the_bits_of_the_whole(rank=5):
    """A direction is the same for any slice and any rows: products of factors on their grids are exact."""
    tensors = weights(a=(60, 50))
    z = Subspace(rank=rank).draw(bare_context(tensors, lambda w: 0.0, seed=SEED))
    site = Site("a", (60, 50))
    whole = z.realise(site, torch.float64).flatten()
    for start, count in ((0, 1), (7, 13), (49, 2), (1234, 700), (2999, 1)):
        part = torch.zeros(count, dtype=torch.float64)
        z.add_to(part, site.part(start, count))
        assert torch.equal(part, whole[start : start + count]), f"{count} elements from {start} differ"
    elementwise = torch.zeros(60, 50, dtype=torch.float64)
    ((_, low_rank), _) = z.terms
    left, right = (side.double() for side in (low_rank.factors["a"].left, low_rank.factors["a"].right))
    for k in reversed(range(rank)):
        elementwise += left[:, k, None] * right[None, :, k]
    assert torch.equal(elementwise.flatten(), whole), "the order of summation shows"


def check_reshape_round_trip(rank=2):
    """A thin adapter (4 x 96) is a 16 x 24 matrix of rank r in row-major order."""
    tensors = weights(thin=(4, 96))
    made, bases = draw_at(Subspace(rank=rank), tensors)
    u, v = bases["thin"]
    assert (u.shape, v.shape) == ((16, rank), (24, rank))
    core = normal_matrix(stream(SEED, "step", 0, 0), Site("thin", (4, 96)), "core", (rank, rank))
    expected = (math.sqrt(384) / rank * u @ core @ v.T).reshape(4, 96)
    assert (made["thin"] - expected).abs().max() < 8 * GRID * expected.abs().max()


def draws(weights_now, step, noise="normal"):
    """Where the twin's numbers come from: the streams that the method documents."""

    def draw(what, name, shape, i):
        site = Site(name, tuple(weights_now[name].shape))
        if what == "noise":
            return Noise(stream(SEED, "step", step, 2 * i + 1), noise).realise(site, torch.float64)
        if what == "core":
            return normal_matrix(stream(SEED, "step", step, 2 * i), site, "core", shape)
        return normal_matrix(stream(SEED, "run", "subzero", step // 7), site, what, shape)

    return draw


def check_equals_the_readable_twin(n=1, sides=2, steps=20, noise="normal"):
    """20 steps in fp64, bases renewed twice. The factors' 22 bits are all that differs: 20 steps of about 1e-6 of a move."""
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    reference = SubZeroTwin(rank=2, interval=7, n=n, sides=sides)
    options = {"rank": 2, "interval": 7, "n": n, "sides": sides}
    opt = ZO(named, "subzero", lr=0.02, eps=1e-2, seed=SEED, noise=noise, method_options=options)
    for step in range(steps):
        expected, rhos = reference.step(twin, loss, draws(twin, step, noise), step, lr=0.02, eps=1e-2)
        logged = opt.step(lambda: loss(dict(named)))
        assert abs(float(logged) - expected) < 1e-5 * abs(expected)
        assert abs(opt.last.estimate.info["rho"] - rhos[-1]) < 1e-4 * (1 + abs(rhos[-1]))
    for name, p in named:
        moved = (twin[name] - start[name]).norm()
        assert (p.detach() - twin[name]).norm() < 2e-5 * moved, name
        assert moved > 1e-2, "nothing moved, so nothing was compared"


def check_resume_inside_an_interval(path, stop=5, steps=12):
    """Weights of a resumed run equal those of an uninterrupted one, bit for bit; nothing is saved of the bases."""

    def begin():
        named, loss = twin_model()
        options = {"rank": 2, "interval": 4}
        return named, loss, ZO(named, "subzero", lr=0.02, eps=1e-2, seed=SEED, method_options=options)

    check_resumes(path, begin, stop, steps)
