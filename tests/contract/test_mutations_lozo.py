"""Faults put into LOZO on purpose; each must turn a check red."""

from dataclasses import replace
from functools import partial

import pytest
from tests.checks import lozo as checks
from tests.support.mutations import sees

from zotune.core.draws import draw_flat
from zotune.methods import lozo
from zotune.methods.lozo import LOZO, Lazy


def drawn_without_the_name(role):
    def put_in(patch):
        def drawn(source, shapes, its, kind):
            names = ["any" if its == role else f"{name}#{its}" for name in shapes]
            return draw_flat(source, names, [rows * columns for rows, columns in shapes.values()], kind)

        patch.setattr(lozo, "normal_sheet", drawn)

    return put_in


left_drawn_without_the_name = drawn_without_the_name("left")
right_drawn_without_the_name = drawn_without_the_name("right")


def rank_not_divided_by(patch):
    """What the released code for large models does: its learning rate is r times the paper's."""
    right = LOZO.estimate

    def estimate(self, ctx):
        made = right(self, ctx)
        return replace(made, direction=self.rank * made.direction)

    patch.setattr(LOZO, "estimate", estimate)


def other_left_factor_in_the_update(patch):
    """What the released code does in steps that renew V: the update draws U where the probe had drawn V."""
    right = LOZO.estimate

    def estimate(self, ctx):
        made = right(self, ctx)
        if ctx.step % self.interval:
            return made
        return replace(made, direction=(made.info["rho"] / self.rank**0.5) * self.source.draw(ctx))

    patch.setattr(LOZO, "estimate", estimate)


def renewed_every_step(patch):
    right = Lazy.kept
    patch.setattr(Lazy, "kept", lambda self, ctx, period: right(self, ctx, ctx.step))


def renewed_one_step_late(patch):
    right = Lazy.kept

    def kept(self, ctx, period):
        return right(self, ctx, max(0, ctx.step - 1) // self.interval)

    patch.setattr(Lazy, "kept", kept)


def never_renewed(patch):
    right = Lazy.kept
    patch.setattr(Lazy, "kept", lambda self, ctx, period: right(self, ctx, 0))


def left_factor_kept_too(patch):
    right = Lazy.low_rank_part

    def low_rank_part(self, ctx):
        fresh = ctx.stream
        ctx.stream = lambda *purpose: fresh(*(purpose or ("lozo u", ctx.step // self.interval)))
        try:
            return right(self, ctx)
        finally:
            del ctx.stream

    patch.setattr(Lazy, "low_rank_part", low_rank_part)


def probed_on_unit_scale(patch):
    """Probes along U V^T / sqrt(r): another eps than the paper's."""
    right = lozo.low_rank_or_noise

    def scaled(ctx, low_rank):
        return right(ctx, low_rank, next(iter(low_rank.factors.values())).rank ** -0.5)

    patch.setattr(lozo, "low_rank_or_noise", scaled)


def momentum_not_taken_over(patch):
    """N is kept as it is when V changes, so it stands for another matrix."""
    right = LOZO._averaged

    def averaged(self, ctx, pairs, c):
        self._period = ctx.step // self.interval
        return right(self, ctx, pairs, c)

    patch.setattr(LOZO, "_averaged", averaged)


def momentum_without_damping(patch):
    """beta N + c U."""
    right = LOZO._averaged
    patch.setattr(LOZO, "_averaged", lambda self, ctx, pairs, c: right(self, ctx, pairs, c / (1 - self.momentum)))


def learns_from_refused_steps(patch):
    right = LOZO.estimate

    def estimate(self, ctx):
        made = right(self, ctx)
        self.observe(ctx, made)
        return made

    patch.setattr(LOZO, "estimate", estimate)


twin_with_momentum = partial(checks.check_equals_the_readable_twin, momentum=0.9)
MUTATIONS = [
    (left_drawn_without_the_name, checks.check_tensors_of_equal_shape_have_their_own_noise),
    (right_drawn_without_the_name, checks.check_tensors_of_equal_shape_have_their_own_noise),
    (rank_not_divided_by, checks.check_probes_and_estimate_are_the_papers),
    (rank_not_divided_by, checks.check_equals_the_readable_twin),
    (other_left_factor_in_the_update, checks.check_equals_the_readable_twin),
    (renewed_every_step, checks.check_v_is_kept_for_the_interval),
    (renewed_one_step_late, checks.check_v_is_kept_for_the_interval),
    (never_renewed, checks.check_v_is_kept_for_the_interval),
    (never_renewed, checks.check_equals_the_readable_twin),
    (left_factor_kept_too, checks.check_v_is_kept_for_the_interval),
    (probed_on_unit_scale, checks.check_probes_and_estimate_are_the_papers),
    (momentum_not_taken_over, checks.check_momentum_is_taken_over_to_a_new_v),
    (momentum_not_taken_over, twin_with_momentum),
    (momentum_without_damping, checks.check_momentum_is_the_dense_mean_inside_an_interval),
    (learns_from_refused_steps, checks.check_refused_steps_teach_nothing),
]


@pytest.mark.parametrize(("put_in", "check"), MUTATIONS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)


def test_lost_momentum_is_seen(monkeypatch, tmp_path):
    checks.check_resume(tmp_path / "right.pt")
    monkeypatch.setattr(LOZO, "state_dict", lambda self: {"period": self._period})
    with pytest.raises(AssertionError, match="differs after resuming"):
        checks.check_resume(tmp_path / "wrong.pt")


def test_a_lost_interval_is_seen(monkeypatch, tmp_path):
    """N saved without the number of the interval whose V it belongs to."""
    right = LOZO.state_dict
    checks.check_resume(tmp_path / "right.pt", stop=5)
    monkeypatch.setattr(LOZO, "state_dict", lambda self: {**right(self), "period": 0})
    with pytest.raises(AssertionError, match="differs after resuming"):
        checks.check_resume(tmp_path / "wrong.pt", stop=5)
