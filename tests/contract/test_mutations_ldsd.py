"""Faults of LDSD put in on purpose; most of them are in code that was released with or after the paper."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from tests.checks import ldsd
from tests.support.mutations import sees

from zotune.core.context import Context
from zotune.core.direction import Combination, Direction, Noise
from zotune.methods import ldsd as module
from zotune.methods.ldsd import LDSD
from zotune.methods.policy_mean import Int8


def released_noise(patch):
    """The mean is taught with noise that was never evaluated."""
    patch.setitem(module.VARIANTS, "corrected", module.VARIANTS["released"])


def winners_noise_for_all(patch):
    patch.setitem(module.VARIANTS, "corrected", lambda u, draw: [u[0]] * len(u))


def plain_mean_for_a_baseline(patch):
    """Dividing by K instead of K - 1: the factor (K-1)/K."""
    right = module.leave_one_out
    patch.setattr(module, "leave_one_out", lambda losses: [c * (len(losses) - 1) / len(losses) for c in right(losses)])


def uphill(patch):
    right = module.leave_one_out
    patch.setattr(module, "leave_one_out", lambda losses: [-c for c in right(losses)])


def mean_moved_before_the_weights(patch):
    right = LDSD.observe

    def observe(self, ctx, estimate):
        right(self, ctx, estimate)
        self._learn()

    patch.setattr(LDSD, "observe", observe)


def largest_instead_of_smallest(patch):
    patch.setattr(module, "ranked", lambda losses: [int(losses.argmax())])


def nan_wins(patch):
    patch.setattr(module, "ranked", lambda losses: [int(torch.nan_to_num(losses, -1e9).argmin())])


@dataclass(frozen=True, eq=False)
class SeedSetForEachTensor(Direction):
    """Tensors of one shape get the same noise."""

    inner: Noise

    def add_to(self, out, site, scale=1.0):
        self.inner.add_to(out, replace(site, name="any"), scale)


def seed_set_for_each_tensor(patch):
    right = Context.gaussian
    patch.setattr(Context, "gaussian", lambda self: SeedSetForEachTensor(right(self)))


def smallest_loss_logged(patch):
    right = LDSD.estimate
    patch.setattr(LDSD, "estimate", lambda self, ctx: replace(right(self, ctx), loss=min(ctx.losses)))


def each_candidate_its_own_tensors(patch):
    """The released sparse form: candidates are credited on tensors that they never touched."""
    right = module.restricted

    def restricted(direction, names):
        return right(direction, names) if isinstance(direction, Noise) and draws.pop() else direction

    draws = [True, False] * 1000
    patch.setattr(module, "restricted", restricted)


def decay_forgotten(patch):
    patch.setattr(LDSD, "_learn", lambda self: right(self, 1.0))

    def right(self, keep):
        if self._mu and self._pending:
            self._mu.move(self._pending[0], keep, self._pending[1])
        self._pending = None


def lesson_not_divided_by_sigma(patch):
    right = LDSD._step_of_mean
    patch.setattr(LDSD, "_step_of_mean", lambda self, *given: self.sigma * right(self, *given))


def mean_left_out_of_the_estimate(patch):
    """The probe sees mu + sigma u, the update sigma u."""
    right = LDSD.estimate

    def estimate(self, ctx):
        made = right(self, ctx)
        terms = made.direction.terms
        return replace(made, direction=Combination(terms[-1:]))

    patch.setattr(LDSD, "estimate", estimate)


def rounded_to_nearest(patch):
    right = Int8.write
    patch.setattr(Int8, "write", lambda self, start, values, bits: right(self, start, values, bits * 0 + 32767))


@pytest.mark.parametrize(
    ("put_in", "check"),
    [
        (released_noise, ldsd.check_cosine_law),
        (released_noise, ldsd.check_noise_is_the_same_everywhere),
        (released_noise, lambda: ldsd.check_policy_gradient_is_unbiased(count=200, tolerance=0.3)),
        (winners_noise_for_all, ldsd.check_cosine_law),
        (winners_noise_for_all, ldsd.check_noise_is_the_same_everywhere),
        (plain_mean_for_a_baseline, ldsd.check_policy_gradient_is_unbiased),
        (plain_mean_for_a_baseline, lambda: ldsd.check_equals_the_readable_twin(steps=2)),
        (uphill, ldsd.check_cosine_law),
        (mean_moved_before_the_weights, ldsd.check_weights_move_along_the_mean_that_was_probed),
        (mean_moved_before_the_weights, lambda: ldsd.check_equals_the_readable_twin(steps=2)),
        (largest_instead_of_smallest, ldsd.check_noise_is_the_same_everywhere),
        (largest_instead_of_smallest, lambda: ldsd.check_equals_the_readable_twin(steps=2)),
        (nan_wins, ldsd.check_nan_never_wins),
        (seed_set_for_each_tensor, ldsd.check_tensors_learn_apart),
        (seed_set_for_each_tensor, lambda: ldsd.check_cosine_law(pieces=4)),
        (smallest_loss_logged, ldsd.check_logged_loss_is_the_mean_of_the_pair),
        (each_candidate_its_own_tensors, ldsd.check_other_tensors_are_left_alone),
        (decay_forgotten, lambda: ldsd.check_equals_the_readable_twin(steps=3, decay=0.2)),
        (lesson_not_divided_by_sigma, lambda: ldsd.check_equals_the_readable_twin(steps=3, sigma=0.7)),
        (mean_left_out_of_the_estimate, ldsd.check_weights_move_along_the_mean_that_was_probed),
        (rounded_to_nearest, lambda: ldsd.check_small_moves_are_not_lost("int8")),
    ],
)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)


def test_baseline_matters_to_the_slope():
    """What the plain mean would give: (K-1)/K, 0.8 for five."""
    f = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], dtype=torch.float64)
    plain = [float(x - f.mean()) for x in f]
    assert all(math.isclose(0.8 * c, p) for c, p in zip(module.leave_one_out(f), plain, strict=True))
