"""Faults of evolution strategies put in on purpose."""

import pytest
from tests.checks import es as checks
from tests.support.mutations import sees

from zotune.core.context import Context
from zotune.methods import es
from zotune.methods.es import ES


def plain_mean(patch):
    """The own loss is in the baseline: (n - 1) / n of the gradient."""
    patch.setitem(es.BASELINES, "leave_one_out", lambda n: 1.0)


def no_baseline(patch):
    """Right in the mean, and the level of the loss becomes noise."""
    patch.setitem(es.SHAPINGS, "none", lambda self, losses, eps: (losses / eps, losses.mean()))


def first_loss_as_baseline(patch):
    """Then c_1 = 0, and l_1 goes with the other directions only."""
    patch.setitem(es.SHAPINGS, "none", lambda self, losses, eps: ((losses - losses[0]) / eps, losses.mean()))


def eps_forgotten(patch):
    right = ES._compared
    patch.setitem(es.SHAPINGS, "none", lambda self, losses, eps: right(self, losses, 1.0))


def flipped_sign(patch):
    right = ES._compared
    patch.setitem(es.SHAPINGS, "none", lambda self, losses, eps: (-right(self, losses, eps)[0], losses.mean()))


def best_loss_logged(patch):
    right = ES._compared
    patch.setitem(es.SHAPINGS, "none", lambda self, losses, eps: (right(self, losses, eps)[0], losses.min()))


def same_noise_for_each_of_n(patch):
    patch.setattr(Context, "_next", lambda self: 0)


FAULTS = [
    (plain_mean, checks.check_covariance),
    (plain_mean, checks.check_mean_is_the_gradient_of_the_smoothed_loss),
    (plain_mean, checks.check_equals_the_readable_twin),
    (no_baseline, checks.check_coefficients_sum_to_zero),
    (no_baseline, checks.check_covariance),
    (first_loss_as_baseline, checks.check_coefficients_sum_to_zero),
    (first_loss_as_baseline, checks.check_covariance),
    (eps_forgotten, checks.check_mean_is_the_gradient_of_the_smoothed_loss),
    (flipped_sign, checks.check_mean_is_the_gradient_of_the_smoothed_loss),
    (best_loss_logged, checks.check_equals_the_readable_twin),
    (same_noise_for_each_of_n, checks.check_equals_the_readable_twin),
]


@pytest.mark.parametrize(("put_in", "check"), FAULTS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)
