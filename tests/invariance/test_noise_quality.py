"""How good the table noise is: moments to the sixth, tails, correlations of values and of squares, isotropy on a gradient.

The cheap checks run always, the long ones under `make test-statistical`. Bounds are five standard errors: 6e-7 for one
number, less than 1e-3 for all of this file. The standard errors are exact: rows of 64 are independent, and the variance of
anything that is summed over a row, or over a pair of rows, is a sum over the codebook's 4,096 rows.
"""

import math

import numpy as np
import pytest
import torch
from tests.checks.noise import z_of
from torch import nn
from torch.nn import functional as F

from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.kernels.codebook import BASE_ROWS, LEVELS, SCALE, integer_rows

LONG = pytest.mark.statistical
SIZES = [pytest.param(1 << 20, id="short"), pytest.param(1 << 25, id="long", marks=LONG)]
ROWS = torch.from_numpy(integer_rows() / SCALE)
SQUARES = ROWS[:BASE_ROWS] ** 2 - 1  # the other rows differ in signs
PAIR_OF_SQUARES = float(((SQUARES @ SQUARES.T) ** 2).mean())  # variance of a pair of rows' sum of products of squares


def mean_within(samples, expected, variance):
    samples = samples.double()
    assert abs(float(samples.mean()) - expected) < 5 * math.sqrt(variance / samples.numel())


def as_in_the_codebook(z, of):
    """The mean of `of(rows)`, one number a row, is the codebook's to five standard errors. Returns the codebook's."""
    exact = of(ROWS).double()
    mean_within(of(z.view(-1, 64).double()), float(exact.mean()), float(exact.var(unbiased=False)) + 1e-30)
    return float(exact.mean()) / 64


@pytest.mark.parametrize("draws", SIZES)
def test_moments_to_the_sixth(draws):
    """Odd ones 0, variance 1, fourth 3.00 as of a Gaussian, sixth 13.9 (Gaussian 15)."""
    z = z_of("w", (draws,))
    moments = [as_in_the_codebook(z, lambda rows, k=k: (rows**k).sum(1)) for k in range(1, 7)]
    assert np.allclose(moments, [0, 1, 0, 3.00003, 0, 13.9], atol=0.05, rtol=0)  # 13.9 is rounded


@pytest.mark.parametrize("draws", SIZES)
def test_each_level_and_sign_is_as_likely_as_it_must_be(draws):
    """The tails too: 83/32, the largest level, is one of 32 of the absolute values, and half of them are negative."""
    z = z_of("w", (draws,))
    for level in sorted(set(LEVELS)):
        for sign in (1, -1):
            share = as_in_the_codebook(z, lambda rows, x=sign * level / SCALE: (rows == x).double().sum(1))
            assert share == LEVELS.count(level) / 64


def independent(one, other, kind="normal"):
    """No correlation of values (variance 1 a pair of numbers: the codebook is a tight frame) nor of squares."""
    one, other = one.double(), other.double()
    mean_within((one * other).view(-1, 64).sum(1), 0.0, 64.0)
    if kind == "normal":
        mean_within(((one**2 - 1) * (other**2 - 1)).view(-1, 64).sum(1), 0.0, PAIR_OF_SQUARES)


@pytest.mark.parametrize("draws", SIZES)
@pytest.mark.parametrize("kind", ["normal", "rademacher"])
def test_sites_streams_and_seeds_are_independent(draws, kind):
    here = z_of("layers.0.weight", (draws,), kind=kind)
    independent(here, z_of("layers.1.weight", (draws,), kind=kind), kind)
    independent(here, z_of("layers.0.weight", (draws,), kind=kind, purpose=("test", 1)), kind)
    independent(here, z_of("layers.0.weight", (draws,), kind=kind, seed=1), kind)


@pytest.mark.parametrize("draws", SIZES)
@pytest.mark.parametrize("lag", [64, 128, 256, 512, 1024, 4096, 64 * 4096])
def test_rows_and_blocks_at_a_lag_are_independent(draws, lag):
    z = z_of("w", (draws,))
    independent(z[:-lag], z[lag:])


@pytest.mark.parametrize("draws", SIZES)
@pytest.mark.parametrize("lag", [1, 2, 3, 7, 8, 16, 31, 32, 63])
def test_values_inside_a_row_are_uncorrelated(draws, lag):
    assert as_in_the_codebook(z_of("w", (draws,)), lambda rows: (rows[:, :-lag] * rows[:, lag:]).sum(1)) == 0.0


def gradient():
    """The gradient of a small network, as a model has it: {name: tensor}, rows of very different sizes."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 40))
    ids = torch.randint(0, 40, (64,))
    F.cross_entropy(model(ids), (ids * 7 + 3) % 40).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("draws", [pytest.param(1000, id="short"), pytest.param(40_000, id="long", marks=LONG)])
@pytest.mark.parametrize("kind", ["normal", "rademacher", "gaussian"])
def test_the_slope_along_the_noise_is_isotropic_on_a_gradient(draws, kind):
    """E(g.z)^2 / |g|^2 = 1 and E(g.z)^4 / |g|^4 = 3 nearly, as of a Gaussian: no direction is favoured, no tail is heavy.

    (g.z)^2 / |g|^2 has the variance 2 of a squared normal number: five sigma are 22 % of 1,000 draws and 3.5 % of 40,000.
    """
    parts = gradient()
    total = math.sqrt(sum(float((g.double() ** 2).sum()) for g in parts.values()))
    slopes = []
    for number in range(draws):
        z = Noise(stream(7, "isotropy", number), kind)
        slopes.append(
            sum(float((z.realise(Site(name, tuple(g.shape))) * g).sum()) for name, g in parts.items()) / total
        )
    slopes = torch.tensor(slopes, dtype=torch.float64)
    mean_within(slopes, 0.0, 1.0)
    mean_within(slopes**2, 1.0, 2.0)
    # The fourth power of a normal number has the variance 105 - 9; the few large entries of g make it differ a little.
    mean_within(slopes**4, 3.0, 96.0)
