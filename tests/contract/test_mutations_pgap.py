"""Faults put into P-GAP on purpose; each must turn a check red."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from tests.checks import pgap as checks
from tests.support.mutations import sees

from zotune.core.context import Context
from zotune.core.direction import Combination, Noise
from zotune.core.frames import Frames
from zotune.core.low_rank import normal_stack
from zotune.methods import pgap
from zotune.methods.pgap import PGAP


def core_drawn_without_the_name(patch):
    patch.setattr(pgap, "normal_stack", lambda s, names, *rest: normal_stack(s, ["any"] * len(names), *rest))


def projection_changed(change):
    """A fault in the alignment: `change(z, s, component)`."""
    return lambda patch: patch.setattr(pgap, "aligned", change)


right = pgap.aligned
not_aligned = projection_changed(lambda z, s, component: z)
wrong_sign_of_the_projection = projection_changed(lambda z, s, component: 2 * z - right(z, s, component))
without_the_root = projection_changed(lambda z, s, component: right(z, s, component * abs(component)))
not_divided_by_the_square = projection_changed(
    lambda z, s, component: (
        right(z, s, component) + (z - right(z, s, component)) * (1 - s.norm(dim=-1)[..., None, None])
    )
)
along_the_square_of_s = projection_changed(lambda z, s, component: right(z, s * s, component))


def always_plus(patch):
    patch.setitem(pgap.SIGNS, "matrix", pgap.SIGNS["fixed"])


def one_sign_for_all_matrices(patch):
    patch.setitem(pgap.SIGNS, "matrix", pgap.SIGNS["shared"])


def bases_not_orthonormal(patch):
    """Left factor U S instead of U."""
    decomposed = pgap.decomposed

    def scaled(*args):
        u, s, v = decomposed(*args)
        return u * s / s[0], s, v

    patch.setattr(pgap, "decomposed", scaled)


def smallest_instead_of_largest(patch):
    def subspace(tall, rank, source, site):
        return torch.linalg.eigh(tall.T @ tall)[1][:, :rank]

    patch.setitem(pgap.SUBSPACES, "exact", subspace)


def estimate_of_other_noise(patch):
    """G is made of fresh noise instead of what was probed."""
    basis = PGAP._basis

    def other(self, g, random, site, shape):
        again = Combination(tuple((c, Noise(random)) for c, _ in g.terms))
        return basis(self, again, random, site, shape)

    patch.setattr(PGAP, "_basis", other)


def slopes_left_out(patch):
    """The mean of the probes' noise, whatever the losses were."""
    basis = PGAP._basis

    def without(self, g, random, site, shape):
        return basis(self, replace(g, terms=tuple((1.0, q) for _, q in g.terms)), random, site, shape)

    patch.setattr(PGAP, "_basis", without)


def refreshed_at(when):
    """A refresh in the steps for which `when(step, k)`; the first step always."""

    def put_in(patch):
        estimate, refresh = PGAP.estimate, PGAP._refresh

        def shifted(self, ctx):
            if self._refreshed is not None and when(ctx.step, self.k):
                refresh(self, ctx)
            return estimate(self, ctx)

        def only_first(self, ctx):
            if self._refreshed is None:
                refresh(self, ctx)

        patch.setattr(PGAP, "estimate", shifted)
        patch.setattr(PGAP, "_refresh", only_first)

    return put_in


refreshed_one_step_late = refreshed_at(lambda step, k: step % k == 1)
refreshed_every_step = refreshed_at(lambda step, k: True)
refreshed_once = refreshed_at(lambda step, k: False)


def old_weights_at_the_refresh(patch):
    """The slopes of the first refresh are used for ever."""
    loss = Context.loss
    first = []

    def kept(self, points):
        answers = loss(self, points)
        if len(points) > 2:
            first.append(answers)
            return first[0]
        return answers

    patch.setattr(Context, "loss", kept)


def delta_forgotten(patch):
    patch.setattr(PGAP, "delta", lambda self, step: self.delta_start)


def delta_goes_on_beyond_the_end(patch):
    def delta(self, step):
        return self.delta_start + (self.delta_end - self.delta_start) * step / self.horizon

    patch.setattr(PGAP, "delta", delta)


def scale_forgotten(patch):
    around = Frames.around

    def unscaled(self, draw):
        return around(self, lambda batch: draw(batch) * batch.rank / batch.numel.sqrt()[:, None, None])

    patch.setattr(Frames, "around", unscaled)


def zero_estimate_for_bad_losses(patch):
    """Bases of an estimate of zeros replace the old ones."""
    basis = PGAP._refresh

    def refresh(self, ctx):
        before = ctx.loss
        ctx.loss = lambda points: before(points).nan_to_num(0.0, 0.0, 0.0) * 0.0
        try:
            basis(self, ctx)
        finally:
            ctx.loss = before

    patch.setattr(PGAP, "_refresh", refresh)


twin_on_matched_scale = partial(checks.check_equals_the_readable_twin, scale="matched")
MUTATIONS = [
    (core_drawn_without_the_name, checks.check_tensors_of_equal_shape_have_their_own_noise),
    (not_aligned, checks.check_constraint),
    (wrong_sign_of_the_projection, checks.check_constraint),
    (without_the_root, checks.check_constraint),
    (not_divided_by_the_square, checks.check_constraint),
    (along_the_square_of_s, checks.check_constraint),
    (along_the_square_of_s, checks.check_equals_the_readable_twin),
    (always_plus, checks.check_constraint),
    (one_sign_for_all_matrices, checks.check_constraint),
    (bases_not_orthonormal, checks.check_constraint),
    (smallest_instead_of_largest, checks.check_bases_are_those_of_the_probes),
    (estimate_of_other_noise, checks.check_bases_are_those_of_the_probes),
    (estimate_of_other_noise, checks.check_equals_the_readable_twin),
    (slopes_left_out, checks.check_bases_are_those_of_the_probes),
    (refreshed_one_step_late, checks.check_refresh_happens_at_multiples_of_k),
    (refreshed_every_step, checks.check_refresh_happens_at_multiples_of_k),
    (refreshed_once, checks.check_refresh_happens_at_multiples_of_k),
    (refreshed_once, checks.check_refresh_uses_the_current_weights),
    (refreshed_one_step_late, checks.check_equals_the_readable_twin),
    (old_weights_at_the_refresh, checks.check_refresh_uses_the_current_weights),
    (delta_forgotten, checks.check_delta_schedule),
    (delta_forgotten, checks.check_equals_the_readable_twin),
    (delta_goes_on_beyond_the_end, checks.check_delta_schedule),
    (scale_forgotten, twin_on_matched_scale),
    (zero_estimate_for_bad_losses, checks.check_losses_that_are_not_finite),
]


@pytest.mark.parametrize(("put_in", "check"), MUTATIONS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)


def test_lost_bases_are_seen(monkeypatch, tmp_path):
    checks.check_resume(tmp_path / "right.pt")
    monkeypatch.setattr(PGAP, "state_dict", lambda self: {"refreshed": self._refreshed, "bases": {}})
    with pytest.raises(AssertionError):
        checks.check_resume(tmp_path / "wrong.pt")


def test_bases_in_half_precision_are_seen(monkeypatch, tmp_path):
    """What torch's own loading does to a bf16 model's optimizer state."""
    load = PGAP.load_state_dict

    def halved(self, state):
        bases = {n: {key: t.bfloat16().float() for key, t in b.items()} for n, b in state.get("bases", {}).items()}
        load(self, {**state, "bases": bases})

    checks.check_resume(tmp_path / "right.pt")
    monkeypatch.setattr(PGAP, "load_state_dict", halved)
    with pytest.raises(AssertionError, match="differs after resuming"):
        checks.check_resume(tmp_path / "wrong.pt")
