"""Faults of learning and of adaptive scales put in on purpose: each must turn a check red. See `test_mutations`."""

from dataclasses import replace

import pytest
import torch
from tests.checks import adaptive_scales as scales
from tests.checks import learn as checks
from tests.support.mutations import sees

from zotune.core.direction import HERE
from zotune.learn import displaced, learner, meta, passes, trajectory
from zotune.methods import adaptive_scales as adaptive
from zotune.methods.adaptive_scales import AdaptiveScales


def wrap(module, name, change):
    """Replace `module.name` by `change(right)`, here and where the checks have imported it."""

    def put_in(patch):
        wrong = change(getattr(module, name))
        patch.setattr(module, name, wrong)
        for place in (checks, learner, trajectory):
            if hasattr(place, name):
                patch.setattr(place, name, wrong)

    return put_in


def keeps_the_gradients(right):
    return lambda weights, backward, seed, read: right(weights, backward, seed, lambda s, g: read(s, g) or True)


def no_sign_of_the_output(right):
    return lambda networks, x, d: right(networks, x, d).abs()


def nf_is_constant(right):
    def budgeted(sigma, found, counts, *, lr):
        nf = float((counts.sum() / (counts * sigma.square()).sum()).sqrt())
        return meta.published(sigma, found, lr=lr, nf=nf)

    return budgeted


def average_without_curvature(right):
    """Leaves rho h_i(theta) in, so that its mean counts twice."""

    def budgeted(sigma, found, counts, *, lr):
        if found.here is not None:
            found = replace(found, here=torch.zeros_like(found.here))
        return right(sigma, found, counts, lr=lr)

    return budgeted


def budget_of_other_counts(right):
    return lambda sigma, found, counts, *, lr: right(sigma, found, counts, lr=lr) * counts


LEARN = {
    "the update's sign is turned": (
        wrap(meta, "published", lambda right: lambda *a, **k: -right(*a, **k)),
        checks.check_published_is_autograd,
    ),
    "nf is left out": (
        wrap(meta, "published", lambda right: lambda s, f, *, lr, nf: right(s, f, lr=lr, nf=1.0)),
        checks.check_published_is_autograd,
    ),
    "the absolute value has no sign": (
        wrap(meta, "of_networks", no_sign_of_the_output),
        checks.check_published_is_autograd,
    ),
    "nf is constant in the corrected form": (wrap(meta, "budgeted", nf_is_constant), checks.check_budgeted_is_autograd),
    "nf is constant, seen by scale": (wrap(meta, "budgeted", nf_is_constant), checks.check_scale_invariance),
    "the metric is multiplied instead of divided": (
        wrap(meta, "budgeted", budget_of_other_counts),
        checks.check_scale_invariance,
    ),
    "the averaged part counts twice": (
        wrap(meta, "budgeted", average_without_curvature),
        checks.check_average_has_the_same_mean,
    ),
    "gradients are not freed": (wrap(passes, "run", keeps_the_gradients), checks.check_slopes_are_those_of_autograd),
    "exceptions are not kept": (
        wrap(displaced, "_bits", lambda right: lambda values: torch.zeros_like(right(values))),
        lambda: checks.check_displaced_comes_back(torch.float32, 1e-3),
    ),
    "nothing is put back": (
        wrap(displaced, "_restore", lambda right: lambda piece, point: None),
        lambda: checks.check_displaced_comes_back(torch.bfloat16, 1e-3),
    ),
    "the judged step goes the other way": (
        wrap(learner, "displaced", lambda right: lambda weights, point: right(weights, -1.0 * point)),
        checks.check_learning_is_its_readable_twin,
    ),
    "the step is judged where it began": (
        wrap(learner, "displaced", lambda right: lambda weights, point: right(weights, HERE)),
        checks.check_learning_is_its_readable_twin,
    ),
    "the first losses are not 0": (
        lambda patch: patch.setattr(learner, "FRESH", {"names": [], "sigma": torch.empty(0), "losses": [0.3, 0.3]}),
        checks.check_learning_is_its_readable_twin,
    ),
    "the gradient is not clipped": (
        lambda patch: patch.setattr(trajectory.Trajectory, "_share", lambda self, squared: 1.0),
        lambda: checks.check_trajectory_is_torch_sgd("keep"),
    ),
    "the rate does not fall": (
        lambda patch: patch.setattr(trajectory.Trajectory, "rate", property(lambda self: self.lr)),
        lambda: checks.check_trajectory_is_torch_sgd("twice"),
    ),
}


def boost(value):
    return lambda patch: patch.setattr(AdaptiveScales, "_boost", lambda self, k, sites, squares: value)


def uses_the_energy_alone(patch):
    right = AdaptiveScales.curvature

    def curvature(self, sites):
        found = right(self, sites)
        return None if found is None else dict.fromkeys(found, sum(found.values()) / len(found))

    patch.setattr(AdaptiveScales, "curvature", curvature)


def looks_with_the_same_norm_per_number(patch):
    patch.setattr(adaptive, "_numbers", lambda sites, groups: dict.fromkeys(groups, 1))


def measures_half_the_curvature(patch):
    right = AdaptiveScales._look

    def look(self, *arguments):
        made = right(self, *arguments)
        k, energy, curvature = self._found
        self._found = (k, energy, curvature / 2)
        return made

    patch.setattr(AdaptiveScales, "_look", look)


def always_explores_the_first(patch):
    right = AdaptiveScales._look

    def look(self, *arguments):
        self._turn = 0
        return right(self, *arguments)

    patch.setattr(AdaptiveScales, "_look", look)


ADAPTIVE = {
    "no boost": (boost(1.0), scales.check_equals_the_readable_twin),
    "curvature is not used": (uses_the_energy_alone, scales.check_equals_the_readable_twin),
    "every group counts as one number": (looks_with_the_same_norm_per_number, scales.check_exploring_points),
    "half the curvature": (measures_half_the_curvature, scales.check_finds_energy_and_curvature),
    "one group is looked at": (always_explores_the_first, scales.check_finds_energy_and_curvature),
}


@pytest.mark.parametrize(("put_in", "check"), [*LEARN.values(), *ADAPTIVE.values()], ids=[*LEARN, *ADAPTIVE])
def test_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)
