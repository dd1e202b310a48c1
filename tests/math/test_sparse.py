"""Sparse MeZO: the density that was asked for, one mask for probes and update, and MeZO's moments inside the mask (C7)."""

import pytest
import torch
from tests.checks import sparse as checks
from tests.checks.engines import make
from tests.checks.mezo import SEED, quadratic
from tests.checks.rules import check_resumes
from tests.reference.sparse import mask_of
from tests.support.models import CASES, assert_same_bits, bits, snapshot
from torch import nn

from zotune.core import masked as core_masked
from zotune.core.direction import Noise
from zotune.core.masked import Masked
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.methods.sources import make_source
from zotune.methods.sparse import Sparse, densities_by_magnitude
from zotune.optim.optimizer import ZO

# ----------------------------------------------------------------------------------------------------------------------
# Masks


@pytest.mark.parametrize("density", [2**-10, 0.1, 0.25, 0.3, 0.5, 0.7, 0.9, 0.999])
def test_density(density):
    checks.check_density(density)


def test_masks_are_independent():
    checks.check_masks_are_independent()


def test_the_mask_does_not_see_the_noise():
    checks.check_the_mask_does_not_see_the_noise()


@pytest.mark.parametrize("shape", [(7, 13), (3, 8), (31,), ()])
def test_masks_are_those_of_the_readable_twin(shape):
    site = Site("a", shape)
    z, source = Noise(stream(SEED, "z")), stream(SEED, "m")
    expected = z.realise(site) * mask_of(source, site, 0.4)
    assert torch.equal(Masked(z, source, {}, 0.4).realise(site), expected)
    assert torch.equal(Masked(z, source, {"a": 0.4}, 0.9).realise(site), expected)


@pytest.mark.parametrize("shape", [(40, 13), (40, 16), (40, 3, 5)])
def test_parts_agree_with_the_whole(shape):
    site, direction = Site("a", shape), 0.3 * checks.masked(0.4)
    whole = direction.realise(site)
    rows = torch.tensor([7, 0, 39, 7])
    assert torch.equal(direction.realise(site.take(rows)).view(4, *shape[1:]), whole[rows])
    for start, count in ((0, 1), (3, 100), (101, 17), (7, 8)):
        assert torch.equal(direction.realise(site.part(start, count)), whole.view(-1)[start : start + count])
    skew = torch.zeros(13, 40).t()
    if shape == (40, 13):
        direction.add_to(skew, site)
        assert torch.equal(skew, whole)


@pytest.mark.parametrize("budget", [0, 40, 1 << 20])
def test_masks_do_not_depend_on_what_is_remembered(monkeypatch, budget):
    sites = [Site(name, (20, 30)) for name in "abc"]
    expected = [checks.masked(0.5).realise(site) for site in sites]
    monkeypatch.setattr(core_masked._Kept, "BUDGET", budget)
    monkeypatch.setattr(core_masked, "_kept", core_masked._Kept())
    for _ in range(3):
        assert all(torch.equal(checks.masked(0.5).realise(s), e) for s, e in zip(sites, expected, strict=True))
    assert core_masked._kept.bytes <= max(budget, 75)  # one mask of 600 bits always fits


def test_a_density_of_0_touches_nothing_and_1_everything():
    site, z = Site("a", (5,)), Noise(stream(SEED, "z"))
    assert not Masked(z, stream(0, "m"), {"a": 0.0}, 0.5).touches(site)
    out = torch.tensor([-0.0] * 5)
    Masked(z, stream(0, "m"), {"a": 0.0}, 0.5).add_to(out, site)
    assert torch.equal(bits(out), bits(torch.tensor([-0.0] * 5)))
    assert torch.equal(Masked(z, stream(0, "m")).realise(site), z.realise(site))


# ----------------------------------------------------------------------------------------------------------------------
# The method


@pytest.mark.parametrize("n", [1, 3])
def test_equals_the_readable_twin(n):
    checks.check_equals_the_readable_twin(n)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("interval", [1000, 2, 1])
def test_probe_and_update_have_one_mask(n, interval):
    checks.check_probe_and_update_have_one_mask(n, interval)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_masked_numbers_keep_their_bits(dtype):
    checks.check_masked_numbers_keep_their_bits(dtype)


@pytest.mark.parametrize("n", [1, 4])
def test_moments(n):
    checks.check_moments(400 // n, n)


@pytest.mark.statistical
@pytest.mark.parametrize("n", [1, 4])
def test_moments_of_many(n):
    checks.check_moments(1000, n)


@pytest.mark.parametrize("n", [1, 2])
def test_density_1_is_mezo_bit_for_bit(n):
    ends = []
    for method, options in (("mezo", {"n": n}), ("sparse", {"n": n, "density": 1.0})):
        torch.manual_seed(0)
        case = CASES["mlp"](torch.bfloat16)
        opt = make(case, "layerwise", method=method, method_options=options, lr=1e-2)
        for _ in range(4):
            opt.step(case.closure)
        ends.append(snapshot(case))
    assert_same_bits(*ends)


def test_the_slope_is_that_of_the_masked_gradient():
    """On a quadratic rho = (m * z) . grad exactly; rounding of losses over eps."""
    named, closure, gradient = quadratic()
    opt = ZO(named, "sparse", lr=0.0, eps=0.1, seed=SEED, method_options={"density": 0.5})
    opt.step(closure)
    source = stream(SEED, "run", "mask", 0)
    sites = [Site(name, tuple(p.shape)) for name, p in named]
    z = torch.cat(
        [Noise(stream(SEED, "step", 0, 0)).realise(s, torch.float64) * mask_of(source, s, 0.5) for s in sites]
    )
    assert opt.last.estimate.info["rho"] == pytest.approx(float(z @ gradient), rel=1e-11)


@pytest.mark.parametrize("options", [{"interval": 3}, {"interval": 3, "kind": "magnitude", "density": 0.5, "n": 2}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resumes_inside_an_interval(options, dtype):
    check_resumes("sgd", "sparse", dtype, steps=8, stops=(1, 3, 5), method_options=options)


def test_recipes_of_masked_directions_resume():
    check_resumes("momentum_replayed", "sparse", method_options={"interval": 2}, rule_options={"window": 3})


# ----------------------------------------------------------------------------------------------------------------------
# Densities by magnitude


def test_densities_are_those_of_global_pruning():
    """The share of each tensor among the largest `density` of all magnitudes, counted by sorting."""
    torch.manual_seed(0)
    weights = {
        name: torch.randn(size).abs() * scale for name, size, scale in (("a", 400, 1), ("b", 700, 3), ("c", 90, 0.01))
    }
    everything = torch.cat(list(weights.values())).sort(descending=True).values
    found = densities_by_magnitude([(Site(name, (w.numel(),)), w) for name, w in weights.items()], 0.3)
    smallest_kept = everything[round(0.3 * 1190) - 1]
    assert found == {name: float((w >= smallest_kept).double().mean()) for name, w in weights.items()}
    assert sum(found[name] * w.numel() for name, w in weights.items()) == pytest.approx(round(0.3 * 1190))
    assert found["c"] == 0.0


@pytest.mark.parametrize(("value", "expected"), [(0.0, 0.3), (0.7, 0.3)])
def test_equal_magnitudes_say_nothing(value, expected):
    sites = [(Site(name, (5,)), torch.full((5,), value)) for name in "ab"]
    assert densities_by_magnitude(sites, 0.3) == {"a": expected, "b": expected}
    assert densities_by_magnitude(sites, 1.0) == {"a": 1.0, "b": 1.0}


def test_densities_are_those_of_the_first_weights():
    """They are found once; all-zero tensors are left alone, and a resumed run does not look again."""
    torch.manual_seed(0)
    named = [
        ("small.weight", nn.Parameter(0.01 * torch.randn(30, 30))),
        ("large.weight", nn.Parameter(torch.randn(30, 30))),
    ]
    named.append(("zero.bias", nn.Parameter(torch.zeros(30))))
    options = {"density": 0.4, "kind": "magnitude"}
    opt = ZO(named, "sparse", lr=1e-2, eps=1e-2, method_options=options, engine="in_place")
    for _ in range(2):
        opt.step(lambda: sum(p.square().sum() + p.sum() for _, p in named))
        named[0][1].data.mul_(100.0)
    densities = opt.method.state_dict()["densities"]
    assert densities["small.weight"] == 0.0
    assert densities["large.weight"] == pytest.approx(0.4 * 1830 / 900, abs=1e-3)
    assert densities["zero.bias"] == 0.0
    assert bool((named[2][1] == 0).all())
    resumed = Sparse(**options)
    resumed.load_state_dict(opt.method.state_dict())
    assert resumed.state_dict() == opt.method.state_dict()
    assert resumed.state_dict()["densities"] is not densities


def test_a_sample_of_many_numbers_is_enough(monkeypatch):
    """Every other number of a tensor: the density differs from that of all by a few standard deviations of a binomial."""
    torch.manual_seed(0)
    named = [(name, nn.Parameter(scale * torch.randn(100, 100))) for name, scale in (("a", 1.0), ("b", 2.0))]
    found = []
    for sample in (1 << 22, 7_000):
        monkeypatch.setattr("zotune.methods.sparse.SAMPLE", sample)
        opt = ZO(named, "sparse", lr=0.0, eps=1e-2, method_options={"kind": "magnitude"})
        opt.step(lambda: sum(p.square().sum() for _, p in named))
        found.append(opt.method.state_dict()["densities"])
    assert found[0] != found[1]
    for name in "ab":
        assert found[0][name] == pytest.approx(found[1][name], abs=4 * (0.25 / 3_000) ** 0.5)


# ----------------------------------------------------------------------------------------------------------------------
# As a source, and as a type


def test_the_source_has_unit_variance():
    checks.check_the_source_has_unit_variance()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"density": 0.0}, "density"),
        ({"density": 1.5}, "density"),
        ({"density": 2.0**-17}, "density"),
        ({"interval": 0}, "interval"),
        ({"kind": "largest"}, "kind"),
        ({"n": 0}, "n"),
    ],
)
def test_options_out_of_range(options, named):
    with pytest.raises(ConfigError, match=f"{named} must be"):
        Sparse(**options)
    if named in ("density", "interval"):
        with pytest.raises(ConfigError, match=f"{named} must be"):
            make_source("sparse", options)


def test_declared():
    assert [Sparse(n=n).forwards for n in (1, 3)] == [2, 6]
    assert Sparse().extra_bytes([]) == 0
