"""Faults of GRZO, its directions and the engine's forward for them, put in on purpose."""

import math
from functools import partial

import pytest
from tests.checks import grzo as checks
from tests.support.mutations import sees

from zotune.core import signed
from zotune.core.site import Site
from zotune.engines import batched_example_layers as layers
from zotune.methods import grzo


def _signs(patch, change, *modules):
    right = signed.signs_of
    for module in modules or (signed, layers):
        patch.setattr(module, "signs_of", lambda source, site, side, n: change(right, source, site, side, n))


def rows_do_not_turn(patch, *modules):
    _signs(patch, lambda f, a, b, side, n: f(a, b, side, n).abs() if side == "rows" else f(a, b, side, n), *modules)


def columns_do_not_turn(patch, *modules):
    _signs(patch, lambda f, a, b, side, n: f(a, b, side, n).abs() if side == "columns" else f(a, b, side, n), *modules)


def examples_share_signs(patch, *modules):
    _signs(patch, lambda f, a, b, side, n: f(a, b, side, n)[:1].repeat(n, 1), *modules)


def equal_shapes_share_signs(patch):
    _signs(patch, lambda f, a, b, side, n: f(a, Site("all", b.shape), side, n))


def _weighted(patch, change):
    right = signed.PerExample.weighted
    patch.setattr(signed.PerExample, "weighted", lambda self, w: right(self, change(w)))


def _of_one(weights):
    """Whether these are the weights of `PerExample.example`, by which losses are asked for."""
    return weights.count(0.0) == len(weights) - 1


def not_divided_by_the_batch(patch):
    _weighted(patch, lambda weights: weights if _of_one(weights) else [w * len(weights) for w in weights])


def sign_of_the_estimate(patch):
    _weighted(patch, lambda weights: weights if _of_one(weights) else [-w for w in weights])


def weights_of_other_examples(patch):
    _weighted(patch, lambda weights: weights if _of_one(weights) else weights[::-1])


def weights_not_rounded(patch):
    patch.setattr(signed, "on_coarse_grid", tuple)


def centred_like_the_mean(patch):
    """The mean of the differences is taken off, as group-relative rewards are."""
    _weighted(
        patch, lambda weights: weights if _of_one(weights) else [w - sum(weights) / len(weights) for w in weights]
    )


def sample_deviation(patch):
    right = grzo.spread_of
    patch.setattr(grzo, "spread_of", lambda d: right(d) * math.sqrt(len(d) / (len(d) - 1)))


def spread_guarded_by_a_small_number(patch):
    right = grzo.spread_of
    patch.setattr(grzo, "spread_of", lambda d: right(d) + 1e-2)


def runs_begin_one_row_late(patch):
    right = signed._run

    def late(left, rows, part):
        return right(left.roll(-1, 0) if part.start else left, rows, part)

    patch.setattr(signed, "_run", late)


def both_sides_of_the_pair_alike(patch):
    right = layers.ExampleCopied.turned

    def turned(self, attribute):
        made = right(self, attribute)
        return layers.Turned(made.u, made.step, [abs(ratio) for ratio in made.ratios])

    patch.setattr(layers.ExampleCopied, "turned", turned)


def factor_of_the_group_forgotten(patch):
    right = layers.ExampleCopied.turned

    def turned(self, attribute):
        made = right(self, attribute)
        return layers.Turned(made.u, 2.0**-6, made.ratios)

    patch.setattr(layers.ExampleCopied, "turned", turned)


def steps_twice(patch):
    right = layers.Turned.made
    patch.setattr(layers.Turned, "made", lambda self, *args: right(self, *args) * 2)


engine = checks.check_batched_answers_are_those_of_single_examples
grouped = partial(engine, factors=lambda names: {n: float(k % 3) for k, n in enumerate(names)})
plain_twin = partial(checks.check_equals_the_readable_twin, normalise=False, steps=2)
twin = partial(checks.check_equals_the_readable_twin, steps=2)
FAULTS = [
    (rows_do_not_turn, checks.check_rows_and_columns_turn),
    (columns_do_not_turn, checks.check_rows_and_columns_turn),
    (rows_do_not_turn, twin),
    (columns_do_not_turn, twin),
    (examples_share_signs, checks.check_examples_and_shapes_share_no_signs),
    (equal_shapes_share_signs, checks.check_examples_and_shapes_share_no_signs),
    (not_divided_by_the_batch, plain_twin),
    (sign_of_the_estimate, plain_twin),
    (weights_of_other_examples, plain_twin),
    (weights_not_rounded, plain_twin),
    (centred_like_the_mean, plain_twin),
    (sample_deviation, twin),
    (spread_guarded_by_a_small_number, checks.check_scale_of_the_loss_does_not_matter),
    (runs_begin_one_row_late, checks.check_slices_have_the_bits_of_the_whole),
    (both_sides_of_the_pair_alike, engine),
    (both_sides_of_the_pair_alike, partial(engine, "gpt2")),
    (factor_of_the_group_forgotten, grouped),
    (steps_twice, engine),
    (lambda patch: rows_do_not_turn(patch, layers), engine),
    (lambda patch: columns_do_not_turn(patch, layers), engine),
    (lambda patch: columns_do_not_turn(patch, layers), partial(engine, "gpt2")),
    (lambda patch: examples_share_signs(patch, layers), engine),
    (lambda patch: examples_share_signs(patch, layers), partial(engine, "lora")),
]


@pytest.mark.parametrize(("put_in", "check"), FAULTS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)


@pytest.mark.statistical
def test_moments_see_shared_signs(monkeypatch):
    """With one direction for all, examples that have nothing in common disturb each other as much as those that agree."""
    check = partial(checks.check_moments, "agreeing", 800)
    sees(monkeypatch, lambda patch: examples_share_signs(patch, signed), check)
