"""Faults of block-wise probes put in on purpose; the first two are those of the released code."""

from dataclasses import replace

import pytest
from tests.checks import blockwise as checks
from tests.support.mutations import sees

from zotune.core.context import Context
from zotune.core.direction import HERE, Combination, Scaled
from zotune.core.noise import add_noise
from zotune.methods import blockwise
from zotune.methods.blockwise import Blockwise


def changed(change):
    """The method with its estimate put through `change(estimate, ctx)`."""

    def put_in(patch):
        right = Blockwise.estimate
        patch.setattr(Blockwise, "estimate", lambda self, ctx: change(right(self, ctx), ctx))

    put_in.__name__ = change.__name__
    return put_in


def blocks_share_noise(patch):
    """One seed per step, started again in each block: tensors of one shape get the same numbers."""
    patch.setattr(
        "zotune.core.direction.add_noise",
        lambda out, site, *rest: add_noise(out, replace(site, name=str(site.shape)), *rest),
    )


def plus_sides_logged(estimate, ctx):
    return replace(estimate, loss=sum(ctx.losses[::2]) / len(ctx.losses[::2]))


def last_pair_logged(estimate, ctx):
    return replace(estimate, loss=sum(ctx.losses[-2:]) / 2)


def slopes_averaged(estimate, ctx):
    return replace(estimate, direction=estimate.direction * (1 / len(estimate.direction.terms)))


def one_slope_for_all(estimate, ctx):
    """The last block's slope is used for each."""
    rho = estimate.direction.terms[-1][0]
    return replace(estimate, direction=Combination(tuple((rho, z) for _, z in estimate.direction.terms)))


def whole_model_probed(patch):
    patch.setattr(blockwise, "Scaled", lambda z, factors, otherwise: Scaled(z, factors, otherwise=1.0))


def earlier_blocks_not_moved(patch):
    patch.setattr(Context, "trial", lambda self, direction: HERE)


def earlier_blocks_moved_with_another_lr(patch):
    right = Context.trial
    patch.setattr(Context, "trial", lambda self, direction: 0.5 * right(self, direction))


MUTATIONS = [
    (blocks_share_noise, checks.check_blocks_share_no_noise),
    (changed(plus_sides_logged), checks.check_logged_loss),
    (changed(plus_sides_logged), checks.check_the_estimate_is_the_sum_of_the_blocks_terms),
    (changed(last_pair_logged), checks.check_logged_loss),
    (changed(slopes_averaged), checks.check_the_estimate_is_the_sum_of_the_blocks_terms),
    (changed(slopes_averaged), checks.check_equals_the_readable_twin),
    (changed(one_slope_for_all), checks.check_the_estimate_is_the_sum_of_the_blocks_terms),
    (whole_model_probed, checks.check_other_blocks_are_not_touched),
    (whole_model_probed, lambda: checks.check_moments(300)),
    (earlier_blocks_not_moved, checks.check_later_blocks_are_probed_where_earlier_ones_moved),
    (earlier_blocks_not_moved, lambda: checks.check_equals_the_readable_twin("each")),
    (earlier_blocks_moved_with_another_lr, checks.check_later_blocks_are_probed_where_earlier_ones_moved),
]


@pytest.mark.parametrize(("put_in", "check"), MUTATIONS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)
