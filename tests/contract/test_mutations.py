"""Faults put in on purpose. Each must turn a check red that a real test calls; several are those of released ZO code.

A row is (what is broken, how, the check that must see it). The check passes before the fault is put in, so it is the fault
that it sees. Add a row for each new method and each bug that got away.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from tests.checks import engines, ledger, mezo, noise, precision
from tests.support.mutations import sees

from zotune.core import ledger as core_ledger
from zotune.core import noise as core_noise
from zotune.core import step as core_step
from zotune.core.context import Context, Estimate
from zotune.core.weights import Carried, Weights
from zotune.engines.audit import ReadAudit
from zotune.engines.in_place import InPlace
from zotune.engines.layerwise import Layerwise
from zotune.engines.scratch import Scratch
from zotune.methods.mezo import MeZO
from zotune.optim.optimizer import ZO

FP32, BF16 = torch.float32, torch.bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# Faults of a method


def estimate_changed(change):
    """MeZO with its estimate put through `change(estimate, ctx)`."""

    def put_in(patch):
        right = MeZO._central
        patch.setattr(MeZO, "_central", lambda self, ctx: change(right(self, ctx), ctx))

    return put_in


def flipped_sign(estimate, ctx):
    return replace(estimate, direction=-estimate.direction)


def other_stream(estimate, ctx):
    """The update draws its noise anew: what happens if a seed is set once for the probe and not again for the update."""
    ((coefficient, _),) = estimate.direction.terms
    return replace(estimate, direction=coefficient * ctx.gaussian())


def half_the_slope(estimate, ctx):
    """(plus - minus) / (2 eps) with the 2 forgotten, the other way round."""
    return replace(estimate, direction=0.5 * estimate.direction)


def summed_not_averaged(estimate, ctx):
    return replace(estimate, direction=3.0 * estimate.direction)


def plus_loss_logged(estimate, ctx):
    return replace(estimate, loss=ctx.losses[0])


def smallest_loss_logged(estimate, ctx):
    return replace(estimate, loss=min(ctx.losses))


def same_noise_every_step(patch):
    right = Context.stream
    patch.setattr(Context, "stream", lambda self, *purpose: setattr(self, "step", 0) or right(self, *purpose))


def same_noise_for_each_of_n(patch):
    patch.setattr(Context, "_next", lambda self: 0)


def norms_decayed(patch):
    patch.setattr("zotune.rules.base.NO_DECAY", ("bias",))


# ----------------------------------------------------------------------------------------------------------------------
# Faults of the noise


def reseeded_per_tensor(patch):
    """Every tensor starts the same sequence: equal shapes share their noise."""
    patch.setattr("zotune.core.site.site_id", lambda name: 7)


def named_by_shape(patch):
    patch.setattr("zotune.core.site.Site.id", property(lambda self: hash(self.shape) & 0xFFFFFFFF))


def from_a_global_generator(patch):
    patch.setattr("zotune.core.direction.add_noise", lambda out, *_: out.add_(torch.randn(out.shape)))


def restarted_in_every_part(patch):
    """A part is drawn as if it began at element 0: right for whole tensors, wrong for slices and shards."""
    right = core_noise.add_noise
    patch.setattr("zotune.core.direction.add_noise", lambda out, site, *rest: right(out, replace(site, start=0), *rest))


# ----------------------------------------------------------------------------------------------------------------------
# Faults of an engine


def not_restored(patch):
    @contextmanager
    def at(self, point, only=None):
        for slot in self.weights:
            self.weights.perturb(slot, slot.site, point, slot.tensor)
        yield

    patch.setattr(InPlace, "at", at)


def restored_by_arithmetic(patch):
    """+eps, then -eps: the usual walk."""

    @contextmanager
    def at(self, point, only=None):
        for sign in (1.0, -1.0):
            for slot in self.weights:
                self.weights.perturb(slot, slot.site, sign * point, slot.tensor)
            if sign > 0:
                yield

    patch.setattr(InPlace, "at", at)


def not_restored_after_an_exception(patch):
    @contextmanager
    def at(self, point, only=None):
        saved = [(slot, slot.tensor.clone()) for slot in self.weights]
        for slot, _ in saved:
            self.weights.perturb(slot, slot.site, point, slot.tensor)
        yield
        for slot, before in saved:
            slot.tensor.copy_(before)

    patch.setattr(InPlace, "at", at)


def swapped_and_not_put_back(patch):
    patch.setattr(Layerwise, "_leave", lambda self, module, args=(), output=None: None)


def half_a_look_kept(patch):
    """After an exception in the leak query the leaks stay unknown."""

    def look(self, point, closure, seed):
        self._survey(closure, seed)
        self._find_leaks(point, closure, seed)

    patch.setattr(Layerwise, "_look", look)


def blind_audit(patch):
    """No leak is ever seen, and engines are not compared."""
    patch.setattr(
        ReadAudit, "__torch_dispatch__", lambda self, func, types, args=(), kwargs=None: func(*args, **kwargs or {})
    )
    patch.setattr("zotune.engines.layerwise.compare_engines", lambda *_: 0)


def scratch_reused_too_early(patch):
    """A buffer goes back although the module handed it out."""
    patch.setattr("zotune.engines.swapping.memory_of", lambda tensor: object())
    patch.setattr("zotune.engines.layerwise.compare_engines", lambda *_: 0)


def scratch_never_filled(patch):
    patch.setattr(Scratch, "take", lambda self, like: torch.zeros(like.shape, dtype=like.dtype))
    patch.setattr(Layerwise, "_fill", lambda self, slot, part, out: None)
    patch.setattr("zotune.engines.layerwise.compare_engines", lambda *_: 0)


def masks_not_shared(patch):
    patch.setattr("zotune.engines.query.common_random_numbers", lambda seed, devices: nullcontext())


def generators_not_put_back(patch):
    def seeded(seed, devices):
        torch.manual_seed(seed)
        return nullcontext()

    patch.setattr("zotune.engines.query.common_random_numbers", seeded)


def masks_of_all_steps_equal(patch):
    patch.setattr("zotune.optim.querying._seed_of", lambda seed, step: 1)


def autocast_cache_kept(patch):
    patch.setattr(torch, "clear_autocast_cache", lambda: None)


def nonfinite_not_refused(patch):
    patch.setattr(Estimate, "is_finite", lambda self: True)


# ----------------------------------------------------------------------------------------------------------------------
# Faults of storage and ledger


def added_to_bf16_directly(patch):
    """The update is added to the stored 16 bits, and what does not fit is lost."""
    patch.setattr(Carried, "read", lambda self, slot, part, out=None: slot.stored(part).to(torch.float32))


def probed_with_another_scale(patch):
    """What is evaluated is not what is moved along."""
    right = Weights.perturb
    patch.setattr(Weights, "perturb", lambda self, slot, part, point, out: right(self, slot, part, 0.5 * point, out))


def carried_bits_not_loaded(patch):
    right = ZO.load_state_dict

    def load(self, state):
        right(self, state)
        for slot in self.weights:
            slot.carried = None

    patch.setattr(ZO, "load_state_dict", load)


def step_number_not_loaded(patch):
    right = ZO.load_state_dict

    def load(self, state):
        here = self.step_number
        right(self, state)
        self.param_groups[0]["zo_step"] = here

    patch.setattr(ZO, "load_state_dict", load)


def torn_line_kept(patch):
    right = core_ledger.read_ledger
    patch.setattr(core_ledger, "read_ledger", lambda path: replace(right(path), good_bytes=path.stat().st_size))


def full_disk_not_taken_back(patch):
    """A line that was cut short stays in the file, and the next one is written behind it."""

    def write(self, line):
        data = core_ledger.json.dumps(line).encode() + b"\n"
        if self._file.write(data) != len(data):
            raise OSError(28, "disk is full")

    patch.setattr(core_ledger.Ledger, "_write", write)


def moved_before_it_was_written(patch):
    def settle(method, ctx, estimate, record, move):
        move()
        outcome = right(method, ctx, estimate, record, lambda: None)
        return outcome

    right = core_step.settle
    patch.setattr("zotune.optim.optimizer.settle", settle)


def losses_rounded(patch):
    """Six digits, as a log would print them."""
    patch.setattr(core_ledger, "_writable", lambda value: float(f"{value:.6g}"))


# ----------------------------------------------------------------------------------------------------------------------

MUTATIONS = [
    (estimate_changed(flipped_sign), mezo.check_quadratic_slope_is_exact),
    (estimate_changed(flipped_sign), lambda: mezo.check_equals_the_readable_twin(steps=2)),
    (estimate_changed(flipped_sign), lambda: engines.check_probe_equals_update("mlp", "layerwise", FP32)),
    (estimate_changed(other_stream), mezo.check_quadratic_slope_is_exact),
    (estimate_changed(other_stream), lambda: engines.check_probe_equals_update("mlp", "layerwise", FP32)),
    (estimate_changed(half_the_slope), mezo.check_quadratic_slope_is_exact),
    (estimate_changed(summed_not_averaged), lambda: mezo.check_equals_the_readable_twin(n=3, steps=2)),
    (estimate_changed(plus_loss_logged), mezo.check_logged_loss_is_the_mean_of_the_pair),
    (estimate_changed(smallest_loss_logged), mezo.check_logged_loss_is_the_mean_of_the_pair),
    (same_noise_every_step, lambda: mezo.check_equals_the_readable_twin(steps=2)),
    (same_noise_for_each_of_n, lambda: mezo.check_equals_the_readable_twin(n=3, steps=1)),
    (norms_decayed, lambda: mezo.check_equals_the_readable_twin(steps=1)),
    (reseeded_per_tensor, noise.check_equal_shapes_do_not_share_noise),
    (named_by_shape, noise.check_equal_shapes_do_not_share_noise),
    (from_a_global_generator, noise.check_order_does_not_matter),
    (restarted_in_every_part, noise.check_parts_equal_the_whole),
    (not_restored, lambda: engines.check_no_drift("mlp", "in_place", FP32, 1)),
    (restored_by_arithmetic, lambda: engines.check_no_drift("mlp", "in_place", FP32, 1)),
    (restored_by_arithmetic, lambda: engines.check_no_drift("mlp", "in_place", BF16, 1)),
    (not_restored_after_an_exception, lambda: engines.check_exception_leaves_no_trace("mlp", "in_place", FP32, 2)),
    (swapped_and_not_put_back, lambda: engines.check_no_drift("mlp", "layerwise", FP32, 1)),
    (half_a_look_kept, lambda: engines.check_exception_leaves_no_trace("leaky", "layerwise", FP32, 2)),
    (blind_audit, lambda: engines.check_engines_agree("leaky", FP32)),
    (blind_audit, lambda: engines.check_engines_agree("penalty", FP32)),
    (scratch_reused_too_early, lambda: engines.check_engines_agree("weight_giver", FP32)),
    (scratch_never_filled, lambda: engines.check_no_drift("mlp", "layerwise", FP32, 1)),
    (scratch_never_filled, lambda: engines.check_probe_equals_update("mlp", "layerwise", FP32)),
    (masks_not_shared, lambda: engines.check_queries_share_dropout_masks("in_place")),
    (generators_not_put_back, lambda: engines.check_queries_share_dropout_masks("in_place")),
    (masks_of_all_steps_equal, lambda: engines.check_queries_share_dropout_masks("layerwise")),
    (autocast_cache_kept, lambda: engines.check_autocast_does_not_answer_from_stale_casts("in_place")),
    (nonfinite_not_refused, lambda: engines.check_nonfinite_losses_are_refused(float("nan"))),
    (added_to_bf16_directly, precision.check_carried_bits_keep_small_updates),
    (probed_with_another_scale, lambda: engines.check_probe_equals_update("mlp", "layerwise", BF16)),
]
ON_FILES = [
    (carried_bits_not_loaded, lambda path: ledger.check_resume_from_any_step(path, BF16, "in_place")),
    (step_number_not_loaded, lambda path: ledger.check_resume_from_any_step(path, FP32, "in_place")),
    (torn_line_kept, ledger.check_a_torn_last_line_is_dropped),
    (full_disk_not_taken_back, ledger.check_a_full_disk_loses_nothing),
    (moved_before_it_was_written, ledger.check_a_full_disk_loses_nothing),
    (losses_rounded, ledger.check_replay_rebuilds_the_weights),
]


@pytest.mark.parametrize(("put_in", "check"), MUTATIONS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)


@pytest.mark.parametrize(("put_in", "check"), ON_FILES, ids=[put_in.__name__ for put_in, _ in ON_FILES])
def test_a_fault_of_files_is_seen(monkeypatch, tmp_path, put_in, check):
    check(tmp_path / "right")
    put_in(monkeypatch)
    with pytest.raises(AssertionError):
        check(tmp_path / "wrong")
