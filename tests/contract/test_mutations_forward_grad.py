"""Faults put into forward gradients on purpose, and the checks that must see them."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tests.checks import forward_grad as checks
from tests.support.models import of_module
from tests.support.mutations import sees
from torch import nn

from zotune.core.context import Context
from zotune.core.direction import Combination
from zotune.engines import forward_mode
from zotune.engines.in_place import InPlace
from zotune.engines.layerwise import Layerwise
from zotune.methods.forward_grad import ForwardGrad

FP32, FP64 = torch.float32, torch.float64


def slope_changed(change):
    def put_in(patch):
        right = Context.slope
        patch.setattr(Context, "slope", lambda self, z: change(*right(self, z)))

    return put_in


def summed_not_averaged(patch):
    right = ForwardGrad.estimate

    def wrong(self, ctx):
        estimate = right(self, ctx)
        return type(estimate)(self.n * estimate.direction, estimate.loss, estimate.info)

    patch.setattr(ForwardGrad, "estimate", wrong)


def moved_along_another_direction(patch):
    """The update draws its noise anew."""
    right = ForwardGrad.estimate

    def wrong(self, ctx):
        estimate = right(self, ctx)
        terms = tuple((coefficient, ctx.gaussian()) for coefficient, _ in estimate.direction.terms)
        return type(estimate)(Combination(terms), estimate.loss, estimate.info)

    patch.setattr(ForwardGrad, "estimate", wrong)


def one_direction_for_all_of_n(patch):
    patch.setattr(Context, "_next", lambda self: 0)


def tangents_reseeded_per_tensor(patch):
    """The tangents are drawn as if every tensor were the same site: not the direction that the update takes."""
    right = forward_mode._tangent

    def wrong(part, values, direction):
        return right(replace(part, name="same"), values, direction)

    patch.setattr(forward_mode, "_tangent", wrong)


def tangent_with_another_scale(patch):
    right = forward_mode._tangent
    patch.setattr(forward_mode, "_tangent", lambda part, values, z: 0.5 * right(part, values, z))


def leaks_without_tangents(patch):
    """Only what module hooks reach is differentiated; a weight that is read elsewhere is left out."""

    @contextmanager
    def along(self, direction, only=None):
        yield

    patch.setattr(InPlace, "along", along)


def tied_weight_counted_once(patch):
    """Only the first module that owns a tensor gets its tangent."""
    right, seen = Layerwise._replacement, set()

    def wrong(self, slot):
        made = right(self, slot)
        if not self._tangents:
            return made
        again = slot.site.name in seen
        seen.add(slot.site.name)
        return made.detach() if again else made

    patch.setattr(Layerwise, "_replacement", wrong)


def masks_not_shared(patch):
    @contextmanager
    def nothing(seed, devices=()):
        yield

    patch.setattr(forward_mode, "common_random_numbers", nothing)


def kernels_not_put_back(patch):
    @contextmanager
    def for_good():
        torch.backends.mha.set_fastpath_enabled(False)
        yield

    patch.setattr(forward_mode, "_plain_kernels", for_good)


def stored_values_moved(patch):
    """The tangent is attached by adding a dual zero: -0.0 becomes 0.0."""

    def wrong(slot, direction):
        zero = torch.zeros_like(slot.tensor)
        slot.tensor.add_(forward_mode._make_dual(zero, forward_mode._tangent(slot.site, zero, direction)))

    patch.setattr("zotune.engines.in_place.attach", wrong)


MUTATIONS = [
    (slope_changed(lambda loss, rho: (loss, -rho)), checks.check_equals_the_readable_twin),
    (slope_changed(lambda loss, rho: (loss, rho)[::-1]), checks.check_equals_the_readable_twin),
    (slope_changed(lambda loss, rho: (loss, abs(rho))), checks.check_equals_the_readable_twin),
    (summed_not_averaged, checks.check_estimate_is_slope_times_direction),
    (summed_not_averaged, lambda: checks.check_equals_the_readable_twin(n=3)),
    (moved_along_another_direction, checks.check_estimate_is_slope_times_direction),
    (one_direction_for_all_of_n, checks.check_estimate_is_slope_times_direction),
    (tangents_reseeded_per_tensor, lambda: checks.check_equals_backprop("mlp", "layerwise", FP64, 1e-10)),
    (tangents_reseeded_per_tensor, lambda: checks.check_equals_backprop("mlp", "in_place", FP64, 1e-10)),
    (tangent_with_another_scale, checks.check_limit_of_spsa),
    (tangent_with_another_scale, lambda: checks.check_equals_backprop("llama", "layerwise", FP32, 1e-5)),
    (leaks_without_tangents, lambda: checks.check_equals_backprop("attention", "layerwise", FP64, 1e-10)),
    (leaks_without_tangents, lambda: checks.check_equals_backprop("leaky", "layerwise", FP32, 1e-5)),
    (masks_not_shared, lambda: checks.check_same_masks_as_a_query("layerwise")),
    (kernels_not_put_back, lambda: checks.check_no_trace("shared", "layerwise", FP32)),
    (stored_values_moved, lambda: checks.check_no_trace("bare", "in_place", FP32)),
]


@pytest.fixture(autouse=True)
def _fast_path_as_it_was():
    before = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.filterwarnings("ignore:Forward mode gives")
@pytest.mark.parametrize(("put_in", "check"), MUTATIONS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, _as_assertion(check))


def _as_assertion(check):
    """A warning that the slope is wrong counts as seeing the fault."""

    def run():
        try:
            check()
        except UserWarning as warning:
            raise AssertionError(str(warning)) from warning

    return run


def test_a_tied_weight_that_counts_once_is_seen(monkeypatch):
    first, second = nn.Linear(5, 5, bias=False).double(), nn.Linear(5, 5, bias=False).double()
    second.weight = first.weight
    case = of_module(nn.Sequential(first, second), lambda m: m(torch.ones(1, 5, dtype=FP64)), FP64)

    def check():
        slope, truth, size, _ = checks.slope_and_truth(case, "layerwise")
        assert abs(slope - truth) < 1e-10 * size  # C6's bound in fp64

    sees(monkeypatch, tied_weight_counted_once, _as_assertion(check))
