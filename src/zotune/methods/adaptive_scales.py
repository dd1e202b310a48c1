"""Adaptive scales: how strongly each group of tensors is perturbed, learned from the run's own losses.

Not of a paper. It does without training what the ZO Fine-tuner (Zhang et al. 2026, arXiv 2510.00419) trains networks
for, and asks nothing of a model but losses. Tensors form groups k = 1 ... K (tensors of one kind, say). In most steps

    v_i = s_k u_i for i in group k,  u ~ N(0, I)
    l+- = L(theta +- eps v);  rho = (l+ - l-) / (2 eps);  g = rho v                                   2 queries

and every `explore`-th step perturbs one group alone, the groups in turn, with norm as much as all others have:

    v = c_k u on group k, 0 elsewhere,  c_k = sqrt(d / d_k)
    l+- = L(theta +- eps v),  l0 = L(theta);  r = (l+ - l-) / (2 eps c_k)                             3 queries
    G_k <- mean of r^2 (gradient energy: E r^2 = |g_k|^2)
    T_k <- mean of (l+ - 2 l0 + l-) / (eps c_k)^2, if positive, plus its standard error (curvature: the mean is tr H_k)
    g = min(K, B / (s_k^2 T_k)) s_k^2 r u on group k,  B = sum_j s_j^2 T_j

Forwards per step: 2 + 1 / explore. Extra memory: a few numbers per group.

Which scales. E g_i = s_i^2 grad_i; with many dimensions a step of length lr lowers a loss with block-diagonal Hessian by
lr A - (lr^2 / 2) A B in the mean, A = sum s_k^2 G_k, B = sum s_k^2 T_k; at the best lr = 1 / B by A / (2 B). Let
R_k = G_k / T_k, and

    s_k^2 = R_k^power * (sum_j T_j) / (sum_j R_j^power T_j)

power 0 is MeZO. The second factor keeps B, hence the best lr, as MeZO has it: a learning rate that was tuned for MeZO
stays tuned. With power 1, and weights T_k / sum T for mean and variance of R over groups,

    A / B  over MeZO's A / B  =  E[R^2] / E[R]^2  =  1 + Var[R] / E[R]^2  >=  1,

so the gain per step is one plus the squared coefficient of variation of G_k / T_k, and none if all groups are alike. The
ratio E[R^(p+1)] / (E[R^p] E[R]) grows with power p, towards all noise on the one best group; that is the best *next* step
and not the best run, since a group that is moved alone soon has nothing left to give. R is kept within a factor `limit`
of the median.

The boost in exploring steps: along one group alone the best step is B / (s_k^2 T_k) times as long as along all, and up to K
times is safe to take, so that a round of K exploring steps moves every group about as far as K other steps do.

`level`: "kind" (tensors with the same name but for numbers), "layer", "module" or "tensor". More groups take longer to tell
apart: r^2 of one probe is known to a factor of about 2, so after n rounds G_k is known to sqrt(2 / n). Means are
exponential, `memory` their length in rounds. Until each group was explored `rounds` times, all scales are 1. G_k holds the
noise of the batch too, which is right for the second-order term and flatters groups whose gradient is mostly noise.

Measured curvatures of language models scatter, on both sides of 0: the trace of an indefinite Hessian, batch by batch; and
l+ - 2 l0 + l- is a difference of nearly equal numbers, which forwards in 16 bits blur. A group whose curvature is not known
must not be taken for one without any, hence the standard error: what is uncertain is perturbed less, not more.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

from zotune.core.context import Context, Estimate
from zotune.core.direction import HERE, Direction, Scaled
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.methods.base import Base
from zotune.methods.blockwise import blocks_of

_FLOOR = 1e-3  # of the mean curvature of a number: groups whose curvature is less count as this


@dataclass(eq=False)
class AdaptiveScales(Base):
    """Central differences along noise whose scale on each group follows its gradient energy over its curvature."""

    level: str = "kind"
    power: float = 1.0
    explore: int = 4  # every so many steps one group alone is looked at, with a third query
    memory: float = 8.0  # rounds over which energy and curvature are averaged
    rounds: int = 2  # of exploring, before scales differ
    limit: float = 10.0  # G / T of a group over the median's, and under, at most

    name: ClassVar[str] = "adaptive_scales"
    paper: ClassVar[str] = "zotune 2026, after arXiv 2510.00419"
    extra_state: ClassVar[str] = "4 numbers per group"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("level", self.level in LEVELS, f"one of {', '.join(map(repr, LEVELS))}")
        self.check("power", 0.0 <= self.power <= 4.0, "of [0, 4]; 0 is MeZO's scales")
        self.check("explore", self.explore >= 1, "at least 1: every step")
        self.check("memory", self.memory >= 2.0, "at least 2 rounds: one look has no standard error")
        self.check("rounds", self.rounds >= 2, "at least 2: one look has no standard error")
        self.check("limit", self.limit >= 1.0, "at least 1")
        self._seen: dict[str, list[float]] = {}  # group -> times; means of r^2, of curvature, of its square
        self._turn = 0  # of the next group to be explored
        self._found: tuple[str, float, float] | None = None  # of the step under way: group, r^2, curvature

    @property
    def forwards(self) -> float:
        """Queries per step."""
        return 2 + 1 / self.explore

    def estimate(self, ctx: Context) -> Estimate:
        """rho v, or in every `explore`-th step r times one group's part of u."""
        groups = groups_of(ctx.sites, self.level)
        if set(self._seen) - set(groups):
            raise ConfigError(f"The state of {self.name!r} is of other tensors than those trained here.")
        squares = self.squares(ctx.sites)
        self._found = None
        if (ctx.step + 1) % self.explore == 0:
            return self._look(ctx, groups, squares)
        v = _on_groups(ctx.gaussian(), groups, {k: math.sqrt(square) for k, square in squares.items()})
        plus, minus = ctx.loss([+ctx.eps * v, -ctx.eps * v])
        rho = (plus - minus) / (2 * ctx.eps)
        return Estimate(rho * v, (plus + minus) / 2, {"rho": rho})

    def observe(self, ctx: Context, estimate: Estimate) -> None:
        """Take what an exploring step found into the means."""
        if self._found is None:
            return
        k, energy, curvature = self._found
        times, *means = self._seen.get(k, [0.0, 0.0, 0.0, 0.0])
        share = 1.0 / min(times + 1.0, self.memory)  # a plain mean until it is `memory` long
        new = (energy, curvature, curvature**2)
        self._seen[k] = [times + 1.0, *(mean + share * (value - mean) for mean, value in zip(means, new, strict=True))]
        self._turn, self._found = self._turn + 1, None

    def squares(self, sites: Sequence[Site]) -> dict[str, float]:
        """s_k^2 of each group, as the next step uses them."""
        groups, curvature = groups_of(sites, self.level), self.curvature(sites)
        if curvature is None:
            return dict.fromkeys(groups, 1.0)
        ratio = {k: self._seen[k][1] / curvature[k] for k in groups}
        middle = median(ratio.values())
        if not middle > 0.0:
            return dict.fromkeys(groups, 1.0)
        tempered = {k: min(max(r / middle, 1 / self.limit), self.limit) ** self.power for k, r in ratio.items()}
        size = sum(tempered[k] * curvature[k] for k in groups) / sum(curvature.values())
        return {k: value / size for k, value in tempered.items()}

    def curvature(self, sites: Sequence[Site]) -> dict[str, float] | None:
        """T_k of each group, none below its floor; None before all groups were explored often enough."""
        numbers = _numbers(sites, groups_of(sites, self.level))
        if len(self._seen) < len(numbers) or min(seen[0] for seen in self._seen.values()) < self.rounds:
            return None
        bound = {k: self._bound(*self._seen[k]) for k in numbers}
        mean = sum(bound.values()) / sum(numbers.values())
        if not mean > 0.0:
            return None
        return {k: max(bound[k], _FLOOR * mean * numbers[k]) for k in numbers}

    def _bound(self, times: float, _: float, mean: float, square: float) -> float:
        """The mean curvature, if positive, plus its standard error."""
        count = min(times, self.memory)
        return max(mean, 0.0) + math.sqrt(max(square - mean**2, 0.0) / (count - 1.0))

    def state_dict(self) -> dict[str, Any]:
        """The means, and whose turn it is."""
        return {"seen": {k: list(seen) for k, seen in self._seen.items()}, "turn": self._turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        self._seen = {k: [float(value) for value in seen] for k, seen in state["seen"].items()}
        self._turn, self._found = int(state["turn"]), None

    # ------------------------------------------------------------------------------------------------------------------

    def _look(self, ctx: Context, groups: dict[str, list[str]], squares: dict[str, float]) -> Estimate:
        """Explore one group."""
        k = list(groups)[self._turn % len(groups)]
        numbers = _numbers(ctx.sites, groups)
        c = math.sqrt(sum(numbers.values()) / numbers[k])
        u = _on_groups(ctx.gaussian(), groups, {k: 1.0})
        step = ctx.eps * c
        plus, minus, here = ctx.loss([+step * u, -step * u, HERE])
        r = (plus - minus) / (2 * step)
        self._found = (k, float(r) ** 2, float(plus - 2 * here + minus) / step**2)
        factor = self._boost(k, ctx.sites, squares) * squares[k]
        return Estimate((factor * r) * u, here, {"rho": float(r)})

    def _boost(self, k: str, sites: Sequence[Site], squares: dict[str, float]) -> float:
        """How much longer than others a step along one group is."""
        curvature = self.curvature(sites)
        if curvature is None:
            return 1.0
        whole = sum(squares[j] * curvature[j] for j in squares)
        return min(float(len(squares)), whole / (squares[k] * curvature[k]))


def groups_of(sites: Sequence[Site], level: str) -> dict[str, list[str]]:
    """The groups: name -> names of their tensors, in an order that does not depend on the order of the sites."""
    if level != "kind":
        return blocks_of(sites, level)
    groups: dict[str, list[str]] = {}
    for name in sorted(site.name for site in sites):
        groups.setdefault(_NUMBER.sub(".#.", name), []).append(name)
    return groups


_NUMBER = re.compile(r"\.\d+\.")
LEVELS = ("kind", "layer", "module", "tensor")


def _numbers(sites: Sequence[Site], groups: dict[str, list[str]]) -> dict[str, int]:
    """d_k of each group."""
    sizes = {site.name: site.numel for site in sites}
    return {k: sum(sizes[name] for name in names) for k, names in groups.items()}


def _on_groups(u: Direction, groups: dict[str, list[str]], scales: dict[str, float]) -> Scaled:
    """u times a scale on each group that is named, 0 on others."""
    return Scaled(u, {name: scale for k, scale in scales.items() for name in groups[k]}, otherwise=0.0)
