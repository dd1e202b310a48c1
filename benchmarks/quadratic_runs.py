"""One run of a method on a quadratic: the method's and the rule's own code, one flat fp64 vector instead of a model.

f(x) = sum_i a_i x_i^2 / 2 in d = 1000, as one tensor of shape (25, 40), or as ten of (10, 10) for methods that choose among
tensors. With gradient noise a step's loss is f(x) + xi . x, where xi ~ N(0, std^2 I) is the same for all queries of the
step, as a batch would be.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zotune.core.context import Context, Estimate, as_losses
from zotune.core.direction import Direction
from zotune.core.site import Site
from zotune.core.step import settle
from zotune.methods import make_method
from zotune.rules import make_rule

D = 1000
LAYOUTS: dict[str, list[Site]] = {  # cuts of the vector
    "one": [Site("theta.weight", (25, 40))],
    "ten": [Site(f"layers.{i}.theta.weight", (10, 10)) for i in range(10)],
}
EPS = 1e-3  # central differences are exact on quadratics for any eps; one-sided ones have a bias of eps tr(A) / 2
DIVERGED = 10.0  # a run ends where f exceeds its start by this factor


@dataclass(frozen=True)
class Problem:
    """Which quadratic, from where, with how much gradient noise."""

    name: str
    decay: float  # eigenvalues i^-decay
    noise: float = 0.0

    def eigenvalues(self) -> Tensor:
        """(D,)"""
        return torch.arange(1, D + 1, dtype=torch.float64) ** -self.decay

    def start(self, seed: int) -> Tensor:
        """(D,) of squared norm D: at random for the sphere (f = 500), all ones where axes differ (f = 3.74)."""
        if self.decay:
            return torch.ones(D, dtype=torch.float64)
        drawn = torch.randn(D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        return drawn * (D / float(drawn @ drawn)) ** 0.5


PROBLEMS = {
    p.name: p
    for p in (
        Problem("isotropic", 0.0),
        Problem("eig 1/i", 1.0),
        Problem("isotropic, noise 0.5", 0.0, 0.5),
        Problem("eig 1/i, noise 0.05", 1.0, 0.05),
    )
}


class Quadratic:
    """The vector, and its loss as a method sees it."""

    def __init__(self, problem: Problem, seed: int, sites: list[Site]) -> None:
        self.a, self.x = problem.eigenvalues(), problem.start(seed)
        self._sites = sites
        self._noise = problem.noise
        self._generator = torch.Generator().manual_seed(7919 + seed)
        self._xi = torch.zeros(D, dtype=torch.float64)

    def next_batch(self) -> None:
        """Draw the gradient noise of a step."""
        if self._noise:
            self._xi = torch.randn(D, dtype=torch.float64, generator=self._generator).mul_(self._noise)

    def parts(self, x: Tensor) -> list[tuple[Site, Tensor]]:
        """The sites with their views of a vector."""
        size = D // len(self._sites)
        return [(site, x[i * size : (i + 1) * size].view(site.shape)) for i, site in enumerate(self._sites)]

    def f(self) -> float:
        """Without noise, here."""
        return 0.5 * float(torch.dot(self.a * self.x, self.x))

    def ask(self, points: Sequence[Direction]) -> Tensor:
        """The losses of one wave."""
        answers = []
        for point in points:
            x = self.x.clone()
            for site, part in self.parts(x):
                if point.touches(site):
                    point.add_to(part, site)
            answers.append(0.5 * float(torch.dot(self.a * x, x)) + (float(self._xi @ x) if self._noise else 0.0))
        return as_losses(answers)

    def slope(self, direction: Direction) -> tuple[float, float]:
        """Loss and exact derivative along a direction."""
        z = torch.zeros(D, dtype=torch.float64)
        for site, part in self.parts(z):
            direction.add_to(part, site)
        loss = 0.5 * float(torch.dot(self.a * self.x, self.x)) + float(self._xi @ self.x)
        return loss, float((self.a * self.x + self._xi) @ z)


@dataclass(frozen=True)
class Setup:
    """What is compared: a method and a rule with their options."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    rule: str = "sgd"
    rule_options: dict[str, Any] = field(default_factory=dict)
    layout: str = "one"


@dataclass(frozen=True)
class Finished:
    """What a run came to."""

    f: float  # inf if it diverged
    forwards: int


def run(problem: Problem, setup: Setup, lr: float, seed: int, budget: int) -> Finished:
    """Steps until the forwards are spent; the final f without noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some rows are meant to show what their method warns of
        method = make_method(setup.method, dict(setup.options))
        rule = make_rule(setup.rule, dict(setup.rule_options))
    sites = LAYOUTS[setup.layout]
    task = Quadratic(problem, seed, sites)
    group: dict[str, Any] = {"lr": lr, "eps": EPS, "weight_decay": 0.0}
    parts = {site.name: (site, part, {"step": 0}) for site, part in task.parts(task.x)}
    limit, forwards, step, most = DIVERGED * task.f(), 0, 0, math.ceil(method.forwards_for(sites))

    def move(estimate: Estimate) -> None:
        estimate = rule.prepare(estimate)
        for site, part, state in parts.values():
            rule(part, site, estimate, group, state)
            state["step"] += 1

    while forwards + most <= budget:
        task.next_batch()
        ctx = Context(
            step=step,
            seed=seed,
            hyperparameters=group,
            sites=sites,
            ask=task.ask,
            weight=lambda site: parts[site.name][1].clone(),
            slope=task.slope,
            trial=(lambda direction: rule.trial(direction, group)) if "trial" in method.needs else None,
        )
        estimate = method.estimate(ctx)
        outcome = settle(method, ctx, estimate, lambda outcome: None, partial(move, estimate))
        forwards, step = forwards + ctx.queries, step + 1
        if not outcome.accepted or (step % 16 == 0 and not task.f() < limit):
            return Finished(math.inf, forwards)
    here = task.f()
    return Finished(here if here < limit else math.inf, forwards)
