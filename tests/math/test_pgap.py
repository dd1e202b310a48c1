"""P-GAP: its identities and moments with their exact constants (derived here)."""

import math

import pytest
import torch
from tests.checks import pgap as checks
from tests.checks.mezo import SEED
from tests.checks.pgap import bases_of, problem
from tests.support.bare import bare_context, estimate_of, flat, realised
from tests.support.memory import peak_bytes

from zotune.core.low_rank import normal_matrix, random_basis
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.methods.pgap import PGAP, aligned, decomposed, exact_subspace, randomised_subspace
from zotune.methods.subzero import Subspace


@pytest.mark.parametrize("scale", ["none", "matched"])
@pytest.mark.parametrize("rank", [1, 4, 6])
def test_constraint(rank, scale):
    checks.check_constraint(rank, scale=scale)


def test_signs():
    """Independent per matrix and step; equal in a step; or always +1. Of step 0 ... 18, where delta is above 0."""
    seen = {xi: checks.check_constraint(xi=xi) for xi in ("matrix", "shared", "fixed")}
    steps = {xi: {step: [x > 0 for s, _, x in rows if s == step] for step in range(19)} for xi, rows in seen.items()}
    assert {len(set(row)) for row in steps["matrix"].values()} == {1, 2}
    assert {len(set(row)) for row in steps["shared"].values()} == {1}
    assert {row[0] for row in steps["shared"].values()} == {True, False}
    assert all(all(row) for row in steps["fixed"].values())


def test_constraint_of_the_core_is_exact():
    """6.1 in fp64, before factors are rounded: 1e-12. A zero S leaves the core alone."""
    for number in range(20):
        core = normal_matrix(stream(number, "core"), Site("w", (9, 9)), "core", (5, 5))
        s = normal_matrix(stream(number, "s"), Site("w", (9, 9)), "s", (5,)).abs() * 10.0 ** (number - 10)
        z = aligned(core, s, math.sqrt(2.0))
        assert abs(float(z.diagonal() @ s / s.norm()) - math.sqrt(2.0)) < 1e-12
        moved = core - z
        assert float((moved - torch.diag(moved.diagonal())).abs().max()) == 0.0
        assert torch.equal(aligned(core, torch.zeros(5, dtype=torch.float64), 1.0), core)


def test_bases_are_those_of_the_probes():
    checks.check_bases_are_those_of_the_probes()


def test_refresh_happens_at_multiples_of_k():
    checks.check_refresh_happens_at_multiples_of_k()


def test_refresh_uses_the_current_weights():
    checks.check_refresh_uses_the_current_weights()


def test_tensors_of_equal_shape_have_their_own_noise():
    checks.check_tensors_of_equal_shape_have_their_own_noise()


def test_delta_schedule():
    checks.check_delta_schedule()


@pytest.mark.parametrize("scale", ["none", "matched"])
def test_equals_the_readable_twin(scale):
    checks.check_equals_the_readable_twin(scale=scale)


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_resume(tmp_path, stop):
    checks.check_resume(tmp_path / "state.pt", stop)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_that_are_not_finite(bad):
    checks.check_losses_that_are_not_finite(bad)


def test_probes_that_say_nothing_give_random_bases_without_alignment():
    """A constant loss: every rho is 0. Later matrices that say something get their bases at the next refresh."""
    here, loss, _ = problem()
    method = PGAP(rank=3, h=2, k=4, horizon=100)
    made, estimate, _ = estimate_of(method, here, lambda w: 1.0, step=0, seed=SEED)
    assert estimate.is_finite()
    assert float(made.norm()) == 0.0
    for u, s, v in bases_of(method).values():
        assert float(s.norm()) == 0.0
        for side in (u, v):
            assert float((side.T @ side - torch.eye(3, dtype=torch.float64)).abs().max()) < 1e-6
            assert float(side.abs().max()) < 0.999  # random, not the first unit vectors that an SVD of 0 gives
    asked = []
    estimate_of(method, here, lambda w: 1.0, step=1, seed=SEED, eps=0.5, asked=asked)
    core = normal_matrix(stream(SEED, "step", 1, 0), Site("a", (14, 11)), "core", (3, 3))
    assert float(realised(asked[0], here)["a"].norm() / 0.5) == pytest.approx(float(core.norm()), rel=1e-5)
    estimate_of(method, here, loss, step=4, seed=SEED)
    assert all(float(s.norm()) > 0 for _, s, _ in bases_of(method).values())


# ----------------------------------------------------------------------------------------------------------------------
# Decompositions


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("shape", [(40, 12), (12, 12), (30, 29)])
def test_exact_decomposition(shape, rank):
    g = normal_matrix(stream(0, "g"), Site("w", shape), "g", shape)
    u, s, v = decomposed(g, exact_subspace(g, rank, stream(0, "unused"), Site("w", shape)), rank)
    full = torch.linalg.svd(g, full_matrices=False)
    # fp64 through a Gram matrix: 2**-52 times the squared condition number of the leading part over its gaps
    assert torch.allclose(s, full.S[:rank], rtol=1e-9)
    assert float((u * s @ v.T - full.U[:, :rank] * full.S[:rank] @ full.Vh[:rank]).abs().max()) < 1e-7
    for side in (u, v):
        assert float((side.T @ side - torch.eye(rank, dtype=torch.float64)).abs().max()) < 1e-12
    largest = u.gather(0, u.abs().argmax(dim=0, keepdim=True))
    assert bool((largest > 0).all()), "the sign is not fixed"


def test_matrices_of_low_rank_are_decomposed():
    """Rank 2, asked for 4: the rest of S is 0 to rounding, and all columns are orthonormal."""
    site = Site("w", (20, 10))
    g = normal_matrix(stream(0, "x"), site, "x", (20, 2)) @ normal_matrix(stream(0, "y"), site, "y", (2, 10))
    for subspace in (exact_subspace, randomised_subspace):
        u, s, v = decomposed(g, subspace(g, 4, stream(0, "start"), site), 4)
        assert float(s[2]) < 1e-10 * float(s[0])
        assert float((u * s @ v.T - g).abs().max()) < 1e-10
        for side in (u, v):
            assert float((side.T @ side - torch.eye(4, dtype=torch.float64)).abs().max()) < 1e-10


def test_randomised_decomposition_finds_leading_directions():
    """Singular values that halve: two iterations leave an error of (s_14 / s_6)^5 = 2**-40 in the leading six."""
    site = Site("w", (60, 40))
    u = random_basis(stream(0, "u"), site, "u", (60, 30)).double()
    v = random_basis(stream(0, "v"), site, "v", (40, 30)).double()
    g = u * 0.5 ** torch.arange(30) @ v.T
    before = torch.get_rng_state()
    found = decomposed(g, randomised_subspace(g, 6, stream(0, "start"), site), 6)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.allclose(found[1], torch.linalg.svdvals(g)[:6], rtol=1e-6)
    again = decomposed(g, randomised_subspace(g, 6, stream(0, "start"), site), 6)
    assert all(torch.equal(x, y) for x, y in zip(found, again, strict=True))


def test_randomised_bases_keep_nearly_as_much_of_the_estimate():
    """An estimate of few probes is noise-like, the hardest case: still 85 % of the best energy here (measured 0.93)."""
    here, loss, _ = problem({"w": (60, 50)})
    kept = {}
    for svd in ("exact", "randomised"):
        method = PGAP(rank=5, h=4, horizon=10, svd=svd)
        estimate_of(method, here, loss, seed=SEED)
        u, s, v = bases_of(method)["w"]
        g = checks.probed(problem({"w": (60, 50)})[2], 4, 0)["w"]
        kept[svd] = float((u.T @ g @ v).square().sum() / g.square().sum())
        assert float(s.square().sum()) == pytest.approx(kept[svd] * float(g.square().sum()), rel=1e-4)
    assert 0.85 * kept["exact"] < kept["randomised"] <= kept["exact"] * 1.0001


# ----------------------------------------------------------------------------------------------------------------------
# Moments, on a linear loss with bases that are given


def within(samples, expected, sigmas=5.0):
    """The mean of independent samples (first dimension) is the expected one: 5 standard errors each."""
    error = samples.std(dim=0) / math.sqrt(len(samples))
    worst = ((samples.mean(dim=0) - expected).abs() / (error + 1e-9)).max()
    assert worst < sigmas, f"{float(worst):.1f} standard errors off"


def fixed_bases(method, shapes, rank):
    """Random bases, decaying S."""
    method._refreshed = 0
    for name, shape in shapes.items():
        if len(shape) == 2:
            site = Site(name, shape)
            u = random_basis(stream(1, "u"), site, "u", (shape[0], rank))
            v = random_basis(stream(1, "v"), site, "v", (shape[1], rank))
            method._bases[name] = u, 0.7 ** torch.arange(rank), v
    return bases_of(method)


def sampled(count, delta, xi="matrix", shapes=None, rank=2):
    """(samples of p Zf, the expected projector terms, the bases, the gradient)."""
    shapes = shapes or {"w": (5, 4)}
    here, loss, slopes = problem(shapes)
    method = PGAP(rank=rank, k=10**9, delta_start=delta, delta_end=delta, xi=xi)
    bases = fixed_bases(method, shapes, rank)
    made = [estimate_of(method, here, loss, step=step, seed=SEED, eps=1.0)[0] for step in range(1, count + 1)]
    return torch.stack(made), bases, slopes


def parts(basis, slope):
    """P grad, ghat, a and b^2."""
    u, s, v = basis
    projected = u @ u.T @ slope @ v @ v.T
    ghat = u * s @ v.T / s.norm()
    a = float((slope * ghat).sum())
    return projected, ghat, a, float(projected.square().sum()) - a * a


@pytest.mark.parametrize(("delta", "expected"), [(2.0, 17.0), (0.0, 15.0), (1.0, 16.0)])
def test_moments_of_the_core(delta, expected):
    """6.2: E Z = 0, E vec Z vec Z^T = I + (delta - 1) s s^T, E |Z|^2 = r^2 - 1 + delta (17 and 15 for r = 4)."""
    s = 0.7 ** torch.arange(4, dtype=torch.float64)
    site, made = Site("w", (9, 9)), []
    for number in range(4000):
        core = normal_matrix(stream(number, "core"), site, "core", (4, 4))
        made.append(aligned(core, s, (1 if number % 2 else -1) * math.sqrt(delta)).flatten())
    z, unit = torch.stack(made), torch.diag(s / s.norm()).flatten()
    within(z.square().sum(dim=1), expected)
    within(z, torch.zeros(16, dtype=torch.float64))
    covariance = torch.eye(16, dtype=torch.float64) + (delta - 1) * torch.outer(unit, unit)
    within((z[:, :, None] * z[:, None, :]).flatten(1), covariance.flatten())
    fixed = z * torch.tensor([1.0 if number % 2 else -1.0 for number in range(4000)], dtype=torch.float64)[:, None]
    within(fixed @ unit, math.sqrt(delta))  # what a fixed sign leaves as a mean


@pytest.mark.parametrize("delta", [2.0, 1.0, 0.0])
def test_mean_and_second_moment_of_the_estimate(delta):
    """6.3: E[p Zf] = P grad + (delta - 1) a ghat;  6.4: E|p Zf|^2 = (r^2 - 1 + delta)(delta a^2 + b^2) + 2 b^2."""
    made, bases, slopes = sampled(1000, delta)
    projected, ghat, a, b2 = parts(bases["w"], slopes["w"])
    assert abs(a) > 0.1  # else nothing is said about delta
    within(made, (projected + (delta - 1) * a * ghat).flatten())
    within(made.square().sum(dim=1), (3 + delta) * (delta * a * a + b2) + 2 * b2)
    if delta == 0.0:
        along = made @ ghat.flatten()
        assert float(along.abs().max()) < 1e-5 * float(made.norm(dim=1).max())  # the old estimate's part is deleted


@pytest.mark.parametrize("xi", ["matrix", "shared", "fixed"])
def test_signs_across_matrices(xi):
    """6.8: signs that are shared add delta * (sum of the other matrices' a) * ghat to each matrix's mean."""
    shapes = {"one": (4, 3), "two": (3, 4), "bias": (3,)}
    made, bases, slopes = sampled(900, 2.0, xi=xi, shapes=shapes)
    terms = {name: parts(bases[name], slopes[name]) for name in ("one", "two")}
    expected = []
    for name, other in (("one", "two"), ("two", "one")):
        projected, ghat, a, _ = terms[name]
        coherent = 0.0 if xi == "matrix" else 2.0 * terms[other][2]
        assert abs(terms[other][2]) > 0.1
        expected.append((projected + (2.0 - 1) * a * ghat + coherent * ghat).flatten())
    within(made, torch.cat([*expected, slopes["bias"]]))


@pytest.mark.statistical
@pytest.mark.parametrize("xi", ["matrix", "shared"])
def test_signs_across_matrices_at_length(xi):
    shapes = {"one": (4, 3), "two": (3, 4)}
    made, bases, slopes = sampled(8000, 2.0, xi=xi, shapes=shapes)
    terms = [parts(bases[name], slopes[name]) for name in ("one", "two")]
    coherent = 0.0 if xi == "matrix" else 2.0
    expected = [t[0] + (t[2] + coherent * o[2]) * t[1] for t, o in (terms, terms[::-1])]
    within(made, torch.cat([e.flatten() for e in expected]))


def test_a_random_subspace_is_as_good_as_plain_noise():
    """6.5: E cos^2(Zf, grad) = 1/(mn) over random two-sided bases."""
    here, _, slopes = problem({"w": (6, 5)})
    grad, source, cosines = slopes["w"].flatten(), Subspace(rank=2, interval=1, reshape="never"), []
    for step in range(1200):
        z = flat(realised(source.draw(bare_context(here, None, step=step, seed=SEED)), here))
        cosines.append((z @ grad) ** 2 / (z @ z) / (grad @ grad))
    within(torch.stack(cosines), 1 / 30)


@pytest.mark.parametrize(("shape", "h", "repeats"), [((20, 15), 200, 10), ((40, 100), 10, 30)])
def test_quality_of_the_probes(shape, h, repeats):
    """6.6: cos(G, grad) = sqrt(h / (h + d + 1)) (0.050 for d = 4000, h = 10), from moments; 5 standard errors.

    At full rank U S V^T is G, so the bases tell it.
    """
    cosines = []
    for number in range(repeats):
        here, loss, slopes = problem({"w": shape}, seed=number)
        method = PGAP(rank=min(shape), h=h, horizon=10)
        estimate_of(method, here, loss, seed=number, eps=1.0)
        u, s, v = bases_of(method)["w"]
        cosines.append(float((u * s @ v.T * slopes["w"]).sum() / s.norm() / slopes["w"].norm()))
    expected = math.sqrt(h / (h + shape[0] * shape[1] + 1))
    within(torch.tensor(cosines), expected)


def kept_energy(gradient, rank, h, seed):
    """|U^T grad V|^2 / |grad|^2 for bases of h probes, and the left vectors' squared cosine with the gradient's first."""
    here = {"w": torch.zeros_like(gradient)}
    method = PGAP(rank=rank, h=h, horizon=10)
    estimate_of(method, here, lambda w: float((gradient * w["w"]).sum()), seed=seed, eps=1.0)
    u, _, v = bases_of(method)["w"]
    first = torch.linalg.svd(gradient)[0][:, 0]
    return float((u.T @ gradient @ v).square().sum() / gradient.square().sum()), float((u[:, 0] @ first) ** 2)


def test_bases_of_few_probes_are_nearly_random():
    """6.7: with h = 10 a full-rank gradient keeps r^2/mn of its energy, a rank-1 gradient a little more."""
    kept, first = [], []
    for number in range(6):
        full = problem({"w": (64, 64)}, seed=number)[2]["w"]
        kept.append(kept_energy(full, 32, 10, number)[0])
        one = problem({"x": (64,), "y": (64,)}, seed=number)[2]
        first.append(kept_energy(torch.outer(one["x"], one["y"]), 32, 10, number)[0])
    assert sum(kept) / 6 == pytest.approx(
        0.25, abs=0.02
    )  # each varies by about 0.25 * sqrt(2/1024) and the little known
    assert 0.2 < sum(first) / 6 < 0.45  # of two vectors: 0.25 +- 0.03 each if random


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("h", "expected", "deviation", "count"),
    [(10, 0.010, 0.012, 20), (128, 0.136, 0.103, 40), (256, 0.492, 0.087, 20), (2048, 0.936, 0.008, 3)],
)
def test_a_rank_one_gradient_is_seen_when_h_exceeds_the_root_of_mn(h, expected, deviation, count):
    """6.7: squared cosine of the leading left vector with the gradient's, 128 x 128.

    Means and deviations are of 40 to 300 estimates sum_j <q_j, G> q_j made by torch alone (the source has 0.07 and 0.50 at
    h = 128 and 256). The tolerance is five standard errors of a mean of `count`.
    """
    found = []
    for number in range(count):
        one = problem({"x": (128,), "y": (128,)}, seed=number)[2]
        found.append(kept_energy(torch.outer(one["x"], one["y"]), 1, h, number)[1])
    assert sum(found) / count == pytest.approx(expected, abs=5 * deviation / math.sqrt(count))


@pytest.mark.statistical
def test_energy_kept_at_256():
    """6.7: m = n = 256, r = 128, h = 10: .2499 of .2500 for full-rank gradients, .28 of .25 for rank 1."""
    full = [kept_energy(problem({"w": (256, 256)}, seed=n)[2]["w"], 128, 10, n)[0] for n in range(3)]
    ones = []
    for number in range(20):
        one = problem({"x": (256,), "y": (256,)}, seed=number)[2]
        ones.append(kept_energy(torch.outer(one["x"], one["y"]), 128, 10, number)[0])
    assert sum(full) / 3 == pytest.approx(0.25, abs=0.005)
    assert sum(ones) / 20 == pytest.approx(0.28, abs=0.04)


# ----------------------------------------------------------------------------------------------------------------------
# Reductions


def test_without_alignment_it_is_subzero():
    """6.9: SubZero's bases, S = 0 and matched scale give SubZero's direction, bit for bit."""
    here, _, _ = problem()
    source, step = Subspace(rank=3, reshape="never"), 7
    expected = realised(source.draw(bare_context(here, None, step=step, seed=SEED)), here)
    method, asked = PGAP(rank=3, scale="matched", delta_start=1.0, delta_end=1.0), []
    method._refreshed = 0
    method._bases = {name: (u, torch.zeros(3), v) for name, (u, v) in source._frames.pairs.items()}
    estimate_of(method, here, lambda w: 0.0, step=step, seed=SEED, eps=0.5, asked=asked)
    found = realised(asked[0], here)
    assert all(torch.equal(found[name], 0.5 * expected[name]) for name in here)


@pytest.mark.parametrize("delta", [0.3, 1.0, 2.0])
def test_identity_bases_and_the_true_gradient_give_dap(delta):
    """6.9: full size, A the gradient: every direction has cosine +-sqrt(delta) / |z| with it. To fp32's rounding of factors."""
    here, _, _ = problem({"w": (4, 4)})
    method, gradient = PGAP(rank=4, k=10**9, delta_start=delta, delta_end=delta), torch.tensor([3.0, 2.0, 1.0, 0.5])
    method._refreshed, method._bases = 0, {"w": (torch.eye(4), gradient, torch.eye(4))}
    seen = set()
    for step in range(1, 20):
        asked = []
        estimate_of(method, here, lambda w: 0.0, step=step, seed=SEED, eps=1.0, asked=asked)
        along = float(realised(asked[0], here)["w"].diagonal() @ gradient.double() / gradient.double().norm())
        assert abs(along) == pytest.approx(math.sqrt(delta), rel=1e-6)
        seen.add(along > 0)
    assert seen == {True, False}


def test_full_square_at_delta_one_has_mezos_second_moments():
    """6.9: r = m = n, delta = 1: E vec(Zf) vec(Zf)^T = I, whatever the bases."""
    here, _, _ = problem({"w": (3, 3)})
    method, made = PGAP(rank=3, k=10**9, delta_start=1.0, delta_end=1.0), []
    fixed_bases(method, {"w": (3, 3)}, 3)
    for step in range(1, 1001):
        asked = []
        estimate_of(method, here, lambda w: 0.0, step=step, seed=SEED, eps=1.0, asked=asked)
        made.append(realised(asked[0], here)["w"].flatten())
    z = torch.stack(made)
    within((z[:, :, None] * z[:, None, :]).flatten(1), torch.eye(9, dtype=torch.float64).flatten())


def test_random_bases_as_a_control():
    """Orthonormal bases that know nothing of G; S holds what they see of it on their diagonal, and is aligned with."""
    here, loss, slopes = problem()
    method, asked = PGAP(rank=4, h=3, horizon=10, basis="random"), []
    estimate_of(method, here, loss, seed=SEED, eps=0.5, asked=asked)
    estimate, z = checks.probed(slopes, 3, 0), realised(asked[-2], here)
    for name, (u, s, v) in bases_of(method).items():
        assert torch.allclose(s, (u.T @ estimate[name] @ v).diagonal(), rtol=1e-5, atol=1e-5)
        inner = float((u * s @ v.T * z[name]).sum() / 0.5 / s.norm())
        assert abs(inner) == pytest.approx(math.sqrt(2.0), rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# As a type


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"h": 0},
        {"k": 0},
        {"delta_start": -1.0},
        {"delta_end": -0.1},
        {"horizon": 0},
        {"xi": "none"},
        {"svd": "fast"},
        {"scale": "other"},
        {"basis": "true"},
    ],
    ids=str,
)
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match="method 'pgap'"):
        PGAP(**options)


def never(w):
    raise AssertionError("a loss was asked for")


def test_a_schedule_without_an_end_is_refused_before_any_loss():
    here, _, _ = problem()
    with pytest.raises(ConfigError, match=r"horizon is needed.*horizon=<steps of the run>"):
        PGAP(rank=2).estimate(bare_context(here, never))
    assert PGAP(delta_start=1.0, delta_end=1.0).delta(10**6) == 1.0


def test_a_rank_above_the_smaller_side_is_refused_or_capped():
    here, loss, _ = problem()
    with pytest.raises(ConfigError, match=r"between 1 and 6 for the tensor 'wide' of shape 6 x 20 .*got 7"):
        PGAP(rank=7, horizon=10).estimate(bare_context(here, never))
    capped = PGAP(rank=8, horizon=10, cap=True)
    _, _, ctx = estimate_of(capped, here, loss)
    assert {name: len(s) for name, (_, s, _) in capped._bases.items()} == {"a": 8, "b": 8, "wide": 6}
    assert capped.extra_bytes(ctx.sites) == sum(t.nbytes for basis in capped._bases.values() for t in basis)


def test_forwards_and_bytes_are_as_declared():
    here, loss, _ = problem()
    method, queries = PGAP(rank=3, h=5, k=4, horizon=100), 0
    for step in range(8):
        _, _, ctx = estimate_of(method, here, loss, step=step)
        queries += ctx.queries
    assert queries / 8 == method.forwards == 4.5
    assert PGAP().forwards == 2.2
    assert method.extra_bytes(ctx.sites) == sum(t.nbytes for basis in method._bases.values() for t in basis)


def test_one_estimate_at_a_time_is_in_memory():
    """A refresh of twelve matrices holds at its peak what one of three does, but for the bases that are kept."""

    def peak(count):
        tensors = {f"w{i}": torch.zeros(150, 200) for i in range(count)}
        method = PGAP(rank=2, h=2, horizon=10)

        def run():
            ctx = bare_context(tensors, None)
            answers = torch.tensor([1.0, 2.0, 3.0, 5.0], dtype=torch.float64)
            ctx.loss = lambda points: answers
            method._refresh(ctx)

        run()  # tables of the noise are made
        return peak_bytes(run), method.extra_bytes(bare_context(tensors, None).sites)

    (few, kept_few), (many, kept_many) = peak(3), peak(12)
    one = 150 * 200 * 8  # bytes of an estimate in fp64
    assert few > one
    assert many - few < kept_many - kept_few + one / 2


def test_state_is_copied_and_keeps_its_types(tmp_path):
    here, loss, _ = problem()
    method = PGAP(rank=3, h=2, horizon=10)
    estimate_of(method, here, loss, step=0)
    state = method.state_dict()
    torch.save(state, tmp_path / "state.pt")
    other = PGAP(rank=3, h=2, horizon=10)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for name, basis in method._bases.items():
        for kept, loaded in zip(basis, other._bases[name], strict=True):
            assert torch.equal(kept, loaded)
            assert loaded.dtype == torch.float32
    other.load_state_dict(state)
    state["bases"]["a"]["U"].zero_()
    assert other._bases["a"][0].abs().sum() > 0
    assert method._bases["a"][0].abs().sum() > 0
    other.load_state_dict({})
    assert other._bases == {}


def test_a_run_that_begins_inside_a_period_probes_first():
    here, loss, _ = problem()
    _, _, ctx = estimate_of(PGAP(rank=2, h=3, k=10, horizon=100), here, loss, step=13)
    assert ctx.queries == 8


def test_freezing_a_tensor_leaves_the_draws_of_the_others_alone():
    """The probes' noise, the core and the plain noise; the estimate itself changes, since losses do."""
    here, loss, _ = problem()
    asked = {}
    for names in (("a", "b", "wide", "bias"), ("bias", "a")):
        some, asked[names] = {name: here[name] for name in names}, []
        estimate_of(PGAP(rank=2, h=2, horizon=10), some, loss, seed=SEED, eps=0.5, asked=asked[names])
    for whole, part in zip(*asked.values(), strict=True):
        both = [realised(point, {"bias": here["bias"]})["bias"] for point in (whole, part)]
        assert torch.equal(*both)
    probes = [realised(points[0], {"a": here["a"]})["a"] for points in asked.values()]
    assert torch.equal(*probes)
