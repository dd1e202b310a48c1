"""Faults of sparse MeZO put in on purpose; the first three are those of the released code."""

from dataclasses import replace

import pytest
import torch
from tests.checks import sparse as checks
from tests.checks.rules import check_resumes
from tests.support.mutations import sees

from zotune.core import masked
from zotune.core.direction import Combination
from zotune.core.masked import Masked
from zotune.kernels.contract import LANES
from zotune.methods.sparse import Sparse, SparseNoise


def normal_below_the_ratio(patch):
    """mask = standard normal < ratio: a ratio of 0.5 is 69 %."""

    def limit(self, site):
        ratio = self.densities.get(site.name, self.otherwise)
        return round(LANES * float(torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(ratio))))

    patch.setattr(Masked, "_limit", limit)


def ratio_is_left_out(patch):
    right = Masked._limit
    patch.setattr(Masked, "_limit", lambda self, site: LANES - right(self, site))


def update_without_the_mask(patch):
    right = Sparse.estimate

    def estimate(self, ctx):
        made = right(self, ctx)
        return replace(made, direction=Combination(tuple((c, z.inner) for c, z in made.direction.terms)))

    patch.setattr(Sparse, "estimate", estimate)


def update_with_another_mask(patch):
    right = Sparse.estimate

    def estimate(self, ctx):
        made = right(self, ctx)
        fresh = ctx.stream()
        return replace(
            made, direction=Combination(tuple((c, replace(z, source=fresh)) for c, z in made.direction.terms))
        )

    patch.setattr(Sparse, "estimate", estimate)


def mask_of_each_direction(patch):
    patch.setattr("zotune.methods.sparse._mask_of", lambda ctx, interval: ctx.stream("mask", ctx._drawn))
    right = Sparse.estimate

    def estimate(self, ctx):
        made = right(self, ctx)
        terms = tuple((c, replace(z, source=ctx.stream("mask", i))) for i, (c, z) in enumerate(made.direction.terms))
        return replace(made, direction=Combination(terms))

    patch.setattr(Sparse, "estimate", estimate)


def mask_of_every_step(patch):
    patch.setattr("zotune.methods.sparse._mask_of", lambda ctx, interval: ctx.stream("mask", ctx.step))


def mask_never_renewed(patch):
    patch.setattr("zotune.methods.sparse._mask_of", lambda ctx, interval: ctx.stream("mask", 0))


def equal_shapes_share_a_mask(patch):
    without_kernels(patch)
    right = masked._left_out
    patch.setattr(
        "zotune.core.masked._left_out",
        lambda source, part, limit, device: right(source, replace(part, name=str(part.shape)), limit, device),
    )


def without_kernels(patch):
    """Faults of what torch does are seen where no kernel does it."""
    patch.setattr(Masked, "term", lambda self, site, scale: None)


def mask_restarts_in_every_chunk(patch):
    without_kernels(patch)
    right = masked.lanes
    patch.setattr(
        "zotune.core.masked.lanes", lambda source, site, device: right(source, replace(site, start=0), device)
    )
    patch.setattr("zotune.core.masked.CHUNK", 64)
    patch.setattr("zotune.core.masked._kept", masked._Kept())


def halves_of_a_word_alike(patch):
    """Two neighbours look at the same 16 bits."""
    without_kernels(patch)
    right = masked.lanes
    patch.setattr("zotune.core.masked.lanes", lambda *of: right(*of)[::2].repeat_interleave(2)[: right(*of).numel()])
    patch.setattr("zotune.core.masked._kept", masked._Kept())


def positive_zero_added(patch):
    without_kernels(patch)
    right = torch.Tensor.masked_fill_
    patch.setattr(torch.Tensor, "masked_fill_", lambda self, mask, value: right(self, mask, 0.0))


def divided_by_the_density(patch):
    right = Sparse.estimate

    def estimate(self, ctx):
        made = right(self, ctx)
        return replace(made, direction=made.direction * (1 / self.density))

    patch.setattr(Sparse, "estimate", estimate)


def densities_not_saved(patch):
    patch.setattr(Sparse, "state_dict", lambda self: {})


def source_not_scaled(patch):
    right = SparseNoise.draw
    patch.setattr(SparseNoise, "draw", lambda self, ctx: right(self, ctx) * self.density**0.5)


def magnitudes(density=0.5):
    check_resumes(method="sparse", steps=8, stops=(4,), method_options={"kind": "magnitude", "density": density})


MUTATIONS = [
    (normal_below_the_ratio, lambda: checks.check_density(0.5)),
    (normal_below_the_ratio, lambda: checks.check_density(0.1)),
    (ratio_is_left_out, lambda: checks.check_density(0.25)),
    (update_without_the_mask, lambda: checks.check_probe_and_update_have_one_mask(1)),
    (update_without_the_mask, lambda: checks.check_probe_and_update_have_one_mask(3)),
    (update_without_the_mask, checks.check_masked_numbers_keep_their_bits),
    (update_with_another_mask, checks.check_probe_and_update_have_one_mask),
    (mask_of_each_direction, lambda: checks.check_probe_and_update_have_one_mask(3)),
    (mask_of_every_step, lambda: checks.check_probe_and_update_have_one_mask(interval=2)),
    (mask_never_renewed, lambda: checks.check_probe_and_update_have_one_mask(interval=2)),
    (mask_never_renewed, checks.check_equals_the_readable_twin),
    (equal_shapes_share_a_mask, checks.check_masks_are_independent),
    (mask_restarts_in_every_chunk, checks.check_probe_and_update_have_one_mask),
    (halves_of_a_word_alike, checks.check_masks_are_independent),
    (positive_zero_added, checks.check_masked_numbers_keep_their_bits),
    (divided_by_the_density, lambda: checks.check_moments(200)),
    (divided_by_the_density, checks.check_equals_the_readable_twin),
    (densities_not_saved, magnitudes),
    (source_not_scaled, checks.check_the_source_has_unit_variance),
]


@pytest.mark.parametrize(("put_in", "check"), MUTATIONS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)
