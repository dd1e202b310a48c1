"""Sparse: MeZO on a random part of the weights that changes now and then.

The gradient pruning of Zhang, Li, Hong, Li, Zhang, Zheng et al., "Revisiting Zeroth-Order Optimization for
Memory-Efficient LLM Fine-Tuning: A Benchmark", ICML 2024, arXiv 2402.11592:

    m in {0, 1}^d: each number is 1 with probability `density`, drawn anew every `interval` steps
    z_i ~ N(0, I)
    rho_i = [ L(theta + eps m * z_i) - L(theta - eps m * z_i) ] / (2 eps)
    g = (1/n) sum_i rho_i (m * z_i)

Forwards per step: 2n. Extra memory: none; the mask is replayed from (seed, step // interval) like the noise.

For one mask E[g] = m * grad L and E|g|^2 = (|m| + n + 1)/n |m * grad L|^2; over masks E[g] = density * grad L. The mask is not
divided by the density: then eps, and the noise of an update, mean the same for each number that is trained, and the
variance falls with |m|, which is why lr can be larger than MeZO's by up to 1/density.

`kind`: "random" uses one density for all tensors. "magnitude" gives each tensor the share of its numbers that global
magnitude pruning of the first weights would keep (a threshold on |w| from up to 4 million sampled numbers): tensors of
large weights are trained more densely, and all-zero tensors (biases, LoRA's B) not at all; which numbers of a tensor are
kept is random in both. The released code keeps a number if a standard *normal* is not below the ratio, so a nominal
"sparsity" of 0.5 zeroes 69 % of the numbers; it leaves the mask out of the update when n > 1. Its axis is the share that is
left out; `density` is the share that is trained.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from zotune.core.context import Context, Estimate
from zotune.core.direction import Combination, Direction
from zotune.core.masked import Masked
from zotune.core.noise import Stream
from zotune.core.options import Options
from zotune.core.site import Site
from zotune.kernels.contract import LANES
from zotune.methods.base import Base

SAMPLE = 1 << 22  # numbers looked at for the threshold on magnitudes


@dataclass(frozen=True)
class SparseNoise(Options):
    """The source "sparse": m * z / sqrt(density), so that E[z z^T] = I over masks too, as of every source."""

    density: float = 0.25  # share of the numbers that is perturbed
    interval: int = 1000  # steps for which a mask is kept

    name: ClassVar[str] = "sparse"
    extra_state: ClassVar[str] = "none"
    low_rank: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_mask(self, self.density, self.interval)

    def draw(self, ctx: Context) -> Direction:
        """See `Source.draw`. All directions of an interval have the same mask."""
        return Masked(ctx.gaussian(), _mask_of(ctx, self.interval), {}, self.density) * self.density**-0.5

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Source.extra_bytes`."""
        return 0


@dataclass(eq=False)
class Sparse(Base):
    """Central differences along directions with most numbers left out."""

    density: float = 0.25  # share of the numbers that is perturbed and trained (1 - sparsity)
    interval: int = 1000  # steps for which a mask is kept
    kind: str = "random"  # "random", or "magnitude": densities of tensors from the magnitudes of the first weights
    n: int = 1  # directions per step

    name: ClassVar[str] = "sparse"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv 2402.11592"

    def __post_init__(self) -> None:
        """Check the ranges."""
        _check_mask(self, self.density, self.interval)
        self.check("kind", self.kind in _DENSITIES, f"one of {', '.join(map(repr, _DENSITIES))}")
        self.check("n", self.n >= 1, "at least 1 direction per step")
        self._densities: dict[str, float] | None = None  # by tensor, from the first step's weights

    @property
    def forwards(self) -> float:
        """Queries per step."""
        return 2 * self.n

    def estimate(self, ctx: Context) -> Estimate:
        """MeZO's estimate with all directions under the same mask."""
        if self._densities is None:
            self._densities = _DENSITIES[self.kind](ctx, self.density)
        mask = _mask_of(ctx, self.interval)
        g, loss, eps = Combination(), 0.0, ctx.eps
        drawn = [Masked(ctx.gaussian(), mask, self._densities, self.density) for _ in range(self.n)]
        losses = ctx.loss([point for z in drawn for point in (+eps * z, -eps * z)])
        for z, (plus, minus) in zip(drawn, losses.view(-1, 2), strict=True):
            rho = (plus - minus) / (2 * eps)
            g += (rho / self.n) * z
            loss += (plus + minus) / (2 * self.n)
        return Estimate(g, loss, {"rho": rho})

    def state_dict(self) -> dict[str, Any]:
        """The densities of the tensors; where they are all the same there is nothing to keep."""
        return {"densities": dict(self._densities)} if self._densities else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the densities."""
        self._densities = dict(state["densities"]) if "densities" in state else None


def _check_mask(made: Options, density: float, interval: int) -> None:
    share = "between 2**-16 and 1: the share that is trained, not the sparsity"
    made.check("density", 1 / LANES <= density <= 1, share)
    made.check("interval", interval >= 1, "at least 1 step")


def _mask_of(ctx: Context, interval: int) -> Stream:
    return ctx.stream("mask", ctx.step // interval)


def densities_by_magnitude(weights: Sequence[tuple[Site, torch.Tensor]], density: float) -> dict[str, float]:
    """The share of each tensor's numbers above the magnitude that a share `density` of all numbers exceeds.

    Args:
        weights: each site with magnitudes of (evenly sampled) numbers of it.
        density: the share of all numbers.
    """
    everything = torch.cat([values for _, values in weights])
    left_out = everything.numel() - round(density * everything.numel())
    if left_out == 0:
        return {site.name: 1.0 for site, _ in weights}
    threshold = everything.kthvalue(left_out).values
    found = {site.name: float((values > threshold).double().mean()) for site, values in weights}
    return found if any(found.values()) else dict.fromkeys(found, density)  # equal magnitudes say nothing


def _all_equal(ctx: Context, density: float) -> dict[str, float]:
    return {}


def _by_magnitude(ctx: Context, density: float) -> dict[str, float]:
    stride = max(1, sum(site.numel for site in ctx.sites) // SAMPLE) | 1  # odd, so that it walks through all columns
    sampled = [(site, ctx.weight(site).reshape(-1)[::stride].abs().double().cpu()) for site in ctx.sites]
    return densities_by_magnitude(sampled, density)


_DENSITIES = {"random": _all_equal, "magnitude": _by_magnitude}
