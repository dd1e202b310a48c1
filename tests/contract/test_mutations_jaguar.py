"""Faults of JAGUAR put in on purpose."""

from dataclasses import replace

import pytest
from tests.checks import jaguar
from tests.support.mutations import sees

from zotune.core.direction import Combination
from zotune.methods import jaguar as module
from zotune.methods.jaguar import Jaguar


def same_tensors_every_step(patch):
    right = module.subset

    def subset(ctx, ratio):
        step, ctx.step = ctx.step, 0
        chosen = right(ctx, ratio)
        ctx.step = step
        return chosen

    patch.setattr(jaguar, "subset", subset)
    patch.setattr(module, "subset", subset)


def first_tensors_in_order(patch):
    """Chosen by place instead of by name."""

    def subset(ctx, ratio):
        names, turn = [site.name for site in ctx.sites], ctx.step % len(ctx.sites)
        count = -(-int(ratio * len(names) * 1000) // 1000)
        return tuple((names[turn:] + names[:turn])[:count])

    patch.setattr(jaguar, "subset", subset)
    patch.setattr(module, "subset", subset)


def all_probed_and_few_moved(patch):
    """The probe perturbs every tensor, and the update takes a few: their slope is mixed with that of all others."""
    right = Jaguar.estimate

    def estimate(self, ctx):
        names = module.subset(ctx, self.ratio)
        made = right(replace(self, ratio=1.0), ctx)
        terms = ((c, module.restricted(z, names)) for c, z in made.direction.terms)
        return replace(made, direction=Combination(tuple(terms)))

    patch.setattr(Jaguar, "estimate", estimate)


def other_tensors_for_the_update(patch):
    right = Jaguar.estimate

    def estimate(self, ctx):
        made, names = right(self, ctx), module.subset(ctx, self.ratio)
        others = tuple(site.name for site in ctx.sites if site.name not in names)
        terms = ((c, module.restricted(z.inner, others)) for c, z in made.direction.terms)
        return replace(made, direction=Combination(tuple(terms)))

    patch.setattr(Jaguar, "estimate", estimate)


def never_divided(patch):
    right = Jaguar.estimate
    patch.setattr(Jaguar, "estimate", lambda self, ctx: right(replace(self, unbiased=False), ctx))


def always_divided(patch):
    right = Jaguar.estimate
    patch.setattr(Jaguar, "estimate", lambda self, ctx: right(replace(self, unbiased=True), ctx))


def plus_loss_logged(patch):
    right = Jaguar.estimate
    patch.setattr(Jaguar, "estimate", lambda self, ctx: replace(right(self, ctx), loss=ctx.losses[0]))


@pytest.mark.parametrize(
    ("put_in", "check"),
    [
        (same_tensors_every_step, jaguar.check_sets_are_equally_likely),
        (first_tensors_in_order, jaguar.check_sets_depend_on_names_alone),
        (first_tensors_in_order, jaguar.check_sets_are_equally_likely),
        (all_probed_and_few_moved, jaguar.check_only_the_steps_tensors_are_probed_and_moved),
        (all_probed_and_few_moved, lambda: jaguar.check_equals_the_readable_twin(steps=3)),
        (other_tensors_for_the_update, jaguar.check_only_the_steps_tensors_are_probed_and_moved),
        (never_divided, lambda: jaguar.check_mean_of_estimates(unbiased=True)),
        (never_divided, lambda: jaguar.check_equals_the_readable_twin(unbiased=True, steps=3)),
        (always_divided, jaguar.check_mean_of_estimates),
        (plus_loss_logged, jaguar.check_logged_loss_is_the_mean_of_the_pair),
        (plus_loss_logged, lambda: jaguar.check_equals_the_readable_twin(steps=3)),
    ],
)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)
