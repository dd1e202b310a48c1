"""The first half of a step: what a `ZO` lets its method see and ask."""

from functools import partial
from typing import Any

from zotune.core.context import Context
from zotune.core.noise import stream
from zotune.core.step import Closure
from zotune.optim.pairing import trial_of
from zotune.optim.parameters import HYPERPARAMETERS, eps_factors


def context_of(opt: Any, closure: Closure) -> Context:
    """The context of a `ZO`'s next step.

    Points are displacements from the weights that count, of which some may still wait beside the stored ones: the engine is
    asked for displacements from those (`Folding.displaced`).
    """
    engine, folding, groups = opt.engine, opt.folding, opt.param_groups
    sites, seed = [slot.site for slot in opt.weights], _seed_of(opt.seed, opt.step_number)
    slope, examples = getattr(engine, "slope", None), getattr(engine, "example_losses", None)  # see `Engine`
    return Context(
        step=opt.step_number,
        seed=opt.seed,
        hyperparameters={key: float(groups[0][key]) for key in HYPERPARAMETERS},
        sites=sites,
        ask=lambda points: engine.losses(folding.displaced(points, sites), closure, seed),
        weight=folding.weight,
        kind=opt.noise,
        factors=eps_factors(groups),
        slope=None if slope is None else lambda direction: slope(direction, closure, seed),
        trial=partial(trial_of, opt.method, opt.rule, groups) if "trial" in opt.method.needs else None,
        ask_examples=None if examples is None else lambda points: examples(points, closure, seed),
    )


def _seed_of(seed: int, step: int) -> int:
    """The seed of the common random numbers of a step, 63 bits."""
    high, low = stream(seed, "queries", step).key
    return (high << 31) ^ low
