"""Faults put into SubZero on purpose, several of them those of released code; each must turn a check red."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.checks import subzero as checks
from tests.support.mutations import sees

from zotune.core.factors import Factors
from zotune.core.frames import Frames
from zotune.core.low_rank import normal_matrix, normal_stack
from zotune.core.site import Site
from zotune.methods import subzero
from zotune.methods.subzero import Subspace, SubZero


def core_drawn_without_the_name(patch):
    """One generator for all tensors, started again for each: equal shapes share their noise."""
    patch.setattr(subzero, "normal_stack", lambda s, names, *rest: normal_stack(s, ["any"] * len(names), *rest))


def basis_drawn_without_the_name(patch):
    right = subzero.random_basis
    patch.setattr(subzero, "random_basis", lambda s, site, *rest: right(s, Site("any", (1,)), *rest))


def plain_gaussian_basis(patch):
    """What LOZO and others use; the paper finds orthonormal columns better."""

    def basis(source, site, role, shape):
        return (normal_matrix(source, site, role, shape) / shape[0] ** 0.5).float()

    patch.setattr(subzero, "random_basis", basis)


def half_precision_basis(patch):
    right = subzero.random_basis
    patch.setattr(subzero, "random_basis", lambda *args: right(*args).half().float())


def core_changed(change):
    """A fault in what goes between the bases: `change(cores, batch)`."""

    def put_in(patch):
        around = Frames.around
        patch.setattr(Frames, "around", lambda self, draw: around(self, lambda batch: change(draw(batch), batch)))

    return put_in


scale_forgotten = core_changed(lambda cores, batch: cores * batch.rank / batch.numel.sqrt()[:, None, None])
scale_by_the_rank_alone = core_changed(lambda cores, batch: cores / batch.numel.sqrt()[:, None, None])
core_transposed = core_changed(lambda cores, batch: cores.transpose(1, 2))


def renewed_one_step_late(patch):
    right = Subspace._renew

    class Late:
        def __init__(self, ctx):
            self.ctx, self.step = ctx, max(0, ctx.step - 1)

        def __getattr__(self, name):
            return getattr(self.ctx, name)

    patch.setattr(Subspace, "_renew", lambda self, ctx: right(self, Late(ctx)))


def renewed_every_step(patch):
    right = Subspace._renew

    def renew(self, ctx):
        other = Subspace(self.rank, 1, self.reshape)
        right(other, ctx)
        self._frames = other._frames

    patch.setattr(Subspace, "_renew", renew)


def never_renewed(patch):
    right = Subspace._renew
    patch.setattr(Subspace, "_renew", lambda self, ctx: None if self._frames.pairs else right(self, ctx))


def vectors_left_out(patch):
    patch.setattr(subzero, "low_rank_or_noise", lambda ctx, low_rank: low_rank)


def factors_not_on_a_grid(patch):
    """Plain fp64 products, which depend on the order of summation."""
    patch.setattr("zotune.core.low_rank.on_grid", lambda values, rank: values.detach().to(torch.float64))
    patch.setattr("zotune.core.frames._to_grids", lambda stack, rank: torch.ones(len(stack)))


def starts_at_element_zero(patch):
    run = Factors.run
    patch.setattr(Factors, "run", lambda self, start, count, device: run(self, 0, count, device))


def update_draws_anew(patch):
    """The update makes its direction again with other random numbers than the probe."""
    right = SubZero.estimate

    def estimate(self, ctx):
        made = right(self, ctx)
        return replace(made, direction=made.info["rho"] * self.source.draw(ctx))

    patch.setattr(SubZero, "estimate", estimate)


def summed_not_averaged(patch):
    right = SubZero._central

    def central(self, ctx):
        made = right(self, ctx)
        return replace(made, direction=self.n * made.direction)

    patch.setattr(SubZero, "_central", central)


def plus_loss_logged(patch):
    right = SubZero._central
    patch.setattr(SubZero, "_central", lambda self, ctx: replace(right(self, ctx), loss=ctx.losses[0]))


def read_in_another_order(patch):
    """The square shape's sides exchanged: a view of another order than the one it is written back in."""
    right = Subspace.shape_of

    def shape_of(self, site):
        shape = right(self, site)
        return shape and shape[::-1]

    patch.setattr(Subspace, "shape_of", shape_of)


MUTATIONS = [
    (core_drawn_without_the_name, checks.check_tensors_of_equal_shape_have_their_own_noise),
    (basis_drawn_without_the_name, checks.check_tensors_of_equal_shape_have_their_own_noise),
    (plain_gaussian_basis, checks.check_directions_lie_between_orthonormal_bases),
    (half_precision_basis, checks.check_directions_lie_between_orthonormal_bases),
    (scale_forgotten, checks.check_direction_is_the_core_on_the_scale_of_plain_noise),
    (scale_by_the_rank_alone, checks.check_direction_is_the_core_on_the_scale_of_plain_noise),
    (core_transposed, checks.check_direction_is_the_core_on_the_scale_of_plain_noise),
    (renewed_one_step_late, checks.check_bases_change_at_multiples_of_the_interval),
    (renewed_every_step, checks.check_bases_change_at_multiples_of_the_interval),
    (never_renewed, checks.check_bases_change_at_multiples_of_the_interval),
    (never_renewed, checks.check_equals_the_readable_twin),
    (vectors_left_out, checks.check_everything_else_gets_plain_noise),
    (update_draws_anew, checks.check_equals_the_readable_twin),
    (summed_not_averaged, partial(checks.check_equals_the_readable_twin, n=2)),
    (plus_loss_logged, checks.check_equals_the_readable_twin),
    (factors_not_on_a_grid, checks.check_parts_have_the_bits_of_the_whole),
    (starts_at_element_zero, checks.check_parts_have_the_bits_of_the_whole),
    (read_in_another_order, checks.check_reshape_round_trip),
]


@pytest.mark.parametrize(("put_in", "check"), MUTATIONS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)


def test_bases_from_a_generator_do_not_resume(monkeypatch, tmp_path):
    """The released code draws bases from the state that the last seed has left: right from step 0 on, lost on resuming."""
    generator = torch.Generator().manual_seed(1)

    def basis(source, site, role, shape):
        return torch.linalg.qr(torch.randn(shape, generator=generator))[0]

    checks.check_resume_inside_an_interval(tmp_path / "right.pt")
    monkeypatch.setattr(subzero, "random_basis", basis)
    with pytest.raises(AssertionError, match="differs after resuming"):
        checks.check_resume_inside_an_interval(tmp_path / "wrong.pt")
