"""A direction for each example of a batch, made of one: the signs of its rows and columns are flipped.

    z_i = u * (r_i s_i^T)       u: any direction; r_i, s_i: random signs, one per row and one per column (Flipout)

All z_i of unit-variance u have unit variance, and E[z_i z_j^T] = 0 for i != j over the signs. A linear layer computes
x_i (W + z_i)^T = x_i W^T + ((x_i * s_i) u^T) * r_i for all examples of a batch with one product more, so B directions cost
one forward. Their weighted sum is u * (sum_i a_i r_i s_i^T), of which a chunk is made at a time.

Wen, Vicol, Ba, Tran, Grosse, "Flipout: Efficient Pseudo-Independent Weight Perturbations on Mini-Batches", ICLR 2018,
arXiv 1803.04386.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from zotune.core.direction import Combination, Direction, Noise, Scalar, Scaled
from zotune.core.noise import CHUNK, Stream
from zotune.core.site import Site
from zotune.errors import EngineError

WEIGHT_BITS = 20  # of an example's weight: a sum of up to 16 such numbers is exact in fp32, in any order
EXACT_IN_FP32 = 16


def signs_of(source: Stream, site: Site, side: str, examples: int) -> Tensor:
    """(examples, rows or columns) of +-1, fp32 on the CPU: row i belongs to example i whatever the number of examples."""
    whole = Site(site.name, site.shape)
    length = whole.shape[0] if side == "rows" and whole.shape else (whole.width if side == "columns" else 1)
    return Noise(source, "rademacher").realise(Site(f"{site.name}#{side}", (examples, length)))


@dataclass(frozen=True, eq=False)
class PerExample(Direction):
    """z_i for example i of the batch: a point along it is another one for each example.

    Engines that offer "examples" answer such points; it cannot be added to a tensor.
    """

    inner: Direction  # u
    source: Stream  # of the signs

    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """There is no one tensor."""
        raise EngineError(
            "A direction that differs from example to example cannot be added to a weight; take `example(i)`."
        )

    def touches(self, site: Site) -> bool:
        """See `Direction.touches`."""
        return self.inner.touches(site)

    def example(self, number: int) -> "SignedSum":
        """z_i."""
        return self.weighted([0.0] * number + [1.0])

    def weighted(self, weights: Sequence[float]) -> "SignedSum":
        """sum_i weights[i] * z_i. The weights are rounded to 20 bits of the largest."""
        return SignedSum(self.inner, self.source, on_coarse_grid(weights))


def differs(direction: Direction) -> bool:
    """Whether a direction is another one for each example."""
    if isinstance(direction, Combination):
        return any(differs(inner) for _, inner in direction.terms)
    return isinstance(direction, PerExample) or (isinstance(direction, Scaled) and differs(direction.inner))


def for_example(direction: Direction, number: int) -> Direction:
    """The direction of one example of the batch."""
    if isinstance(direction, PerExample):
        return direction.example(number)
    if isinstance(direction, Combination):
        return Combination(tuple((c, for_example(inner, number)) for c, inner in direction.terms))
    if isinstance(direction, Scaled):
        return replace(direction, inner=for_example(direction.inner, number))
    return direction


def on_coarse_grid(weights: Sequence[float]) -> tuple[float, ...]:
    """Numbers rounded to multiples of 2**-WEIGHT_BITS of the power of two above the largest."""
    largest = max((abs(weight) for weight in weights), default=0.0)
    if largest == 0.0 or not all(map(math.isfinite, weights)):
        return tuple(weights)
    unit = 2.0 ** (math.frexp(largest)[1] - WEIGHT_BITS)
    return tuple(round(weight / unit) * unit for weight in weights)


@dataclass(frozen=True, eq=False)
class SignedSum(Direction):
    """u * (sum_i a_i r_i s_i^T), the same bits for any slice."""

    inner: Direction
    source: Stream
    weights: tuple[float, ...]  # a, on the coarse grid

    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """See `Direction.add_to`."""
        if not self.touches(site):
            return
        left, right = self._factors(site, out.device)
        if site.rows is not None:
            made = self.inner.realise(site, out.dtype, out.device).view(site.rows.numel(), -1)
            made = made * _product(left[site.rows.to(out.device)], right).to(out.dtype)
            out.add_((made * scale).view(out.shape))
            return
        pieces = site.chunks(CHUNK) if out.is_contiguous() else [(0, site)]
        for offset, part in pieces:
            made = self.inner.realise(part, out.dtype, out.device).view(-1)
            made = made.mul_(_run(left, right, part).to(out.dtype)).mul_(scale)
            target = out if part is site else out.view(-1)[offset : offset + part.count]
            target.add_(made.view(target.shape))

    def touches(self, site: Site) -> bool:
        """See `Direction.touches`."""
        return any(self.weights) and self.inner.touches(site)

    def _factors(self, site: Site, device: torch.device) -> tuple[Tensor, Tensor]:
        """(rows, B) signs times weights, and (columns, B) signs: products and sums of which are exact."""
        # fp32 products may be set to use fewer bits, and then are not exact
        few = len(self.weights) <= EXACT_IN_FP32 and torch.get_float32_matmul_precision() == "highest"
        exact = torch.float32 if few else torch.float64
        weights = torch.tensor(self.weights, dtype=torch.float64)
        left = signs_of(self.source, site, "rows", len(self.weights)).to(torch.float64) * weights[:, None]
        right = signs_of(self.source, site, "columns", len(self.weights))
        return left.T.to(device, exact), right.T.to(device, exact)


def _run(left: Tensor, right: Tensor, part: Site) -> Tensor:
    """Elements part.start ... of left @ right.T in row-major order."""
    width = right.shape[0]
    first, last = part.start // width, -(-(part.start + part.count) // width)
    return _product(left[first:last], right).view(-1)[part.start - first * width :][: part.count]


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right.T, exact: also inside a block of autocast, which would round the factors."""
    with torch.autocast(left.device.type, enabled=False):
        return left @ right.T
