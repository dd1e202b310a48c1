"""Faults of FZOO put in on purpose; the division by zero and the missing eps are those of its released code."""

from functools import partial

import pytest
from tests.checks import fzoo as checks
from tests.support.mutations import sees

from zotune.core.context import Context
from zotune.methods import fzoo
from zotune.methods.fzoo import FZOO


def sigma_dropped(patch):
    patch.setitem(fzoo.SCALES, "theory", lambda sigma, eps, n: eps)


def eps_left_out(patch):
    patch.setitem(fzoo.SCALES, "theory", lambda sigma, eps, n: sigma)


def other_denominator(patch):
    """The spread with 1/n in the paper's formula."""
    patch.setitem(fzoo.SCALES, "theory", lambda sigma, eps, n: eps * sigma * ((n - 1) / n) ** 0.5)


def variance_for_deviation(patch):
    patch.setitem(fzoo.SCALES, "theory", lambda sigma, eps, n: eps * sigma**2)


def gaussian_directions(patch):
    patch.setattr(Context, "rademacher", Context.gaussian)


def sigma_guarded_by_a_small_number(patch):
    """1e-2 added to sigma: no division by zero, and the scale of the loss is back."""
    patch.setitem(fzoo.SCALES, "theory", lambda sigma, eps, n: eps * (sigma + 1e-2))


def unguarded(patch):
    """Equal losses are divided by their spread."""

    def estimate(self, ctx):
        made = right(self, ctx)
        return made if made.direction else type(made)(float("nan") * ctx.rademacher(), made.loss)

    right = FZOO.estimate
    patch.setattr(FZOO, "estimate", estimate)


def same_signs_for_each_of_n(patch):
    patch.setattr(Context, "_next", lambda self: 0)


FAULTS = [
    (sigma_dropped, checks.check_scale_of_the_loss_does_not_matter),
    (sigma_dropped, checks.check_equals_the_readable_twin),
    (eps_left_out, checks.check_equals_the_readable_twin),
    (other_denominator, checks.check_equals_the_readable_twin),
    (variance_for_deviation, checks.check_scale_of_the_loss_does_not_matter),
    (sigma_guarded_by_a_small_number, checks.check_scale_of_the_loss_does_not_matter),
    (gaussian_directions, checks.check_directions_are_signs),
    (gaussian_directions, checks.check_equals_the_readable_twin),
    (unguarded, checks.check_equal_losses_give_no_step),
    (same_signs_for_each_of_n, partial(checks.check_equals_the_readable_twin, 4, normalise=False)),
]


@pytest.mark.filterwarnings("ignore:Step 0 was refused")
@pytest.mark.parametrize(("put_in", "check"), FAULTS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)
