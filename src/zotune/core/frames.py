"""Bases that are kept for many steps, with a small fresh matrix between them in each step: left @ core @ right.T.

The core is multiplied into the shorter basis; the longer one goes into the step's factors as the tensor that it is. All
matrices whose shorter side and rank agree are done in one product: a step costs a handful of calls, not some per matrix.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from zotune.core.factors import Sheet, by_columns
from zotune.core.grids import grid_bits
from zotune.core.low_rank import LowRank
from zotune.kernels.workspace import workspace


@dataclass(frozen=True)
class Batch:
    """Matrices of one rank, in the order in which their cores are stacked."""

    names: tuple[str, ...]
    rank: int
    numel: Tensor  # (k,) fp64, numbers in each matrix


@dataclass(frozen=True)
class _Group:
    """Neighbours in a batch whose shorter bases are stacked."""

    first: int  # number of the first one in its batch
    names: tuple[str, ...]
    fresh: str  # "left" or "right": the shorter side, which the core goes into
    shorter: Tensor  # (k, r, s) fp32: transposed, which is the faster order for products with small cores
    longer: tuple[Tensor, ...]  # k of (l, r) fp32


class Frames:
    """Pairs of bases on grids of their rank, under the names of their sites."""

    def __init__(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Stack the shorter sides. `pairs` of this object holds its own tensors: drop those that came in.

        Args:
            pairs: left (m, r) and right (n, r) by name, fp32, on grids of rank r.
        """
        self.pairs: dict[str, tuple[Tensor, Tensor]] = dict(pairs)  # in the given order
        alike: dict[int, dict[tuple[str, int], list[str]]] = {}  # by rank, then by the shorter side
        for name, (left, right) in pairs.items():
            fresh = "right" if len(left) > len(right) else "left"
            kin = alike.setdefault(left.shape[1], {})
            kin.setdefault((fresh, min(len(left), len(right))), []).append(name)
        self._batches = [(_batch(rank, kin, pairs), self._stacked(kin, pairs)) for rank, kin in alike.items()]

    def _stacked(
        self, alike: Mapping[tuple[str, int], list[str]], pairs: Mapping[str, tuple[Tensor, Tensor]]
    ) -> list[_Group]:
        groups, first = [], 0
        for (fresh, _), names in alike.items():
            side = 0 if fresh == "left" else 1
            shorter = torch.stack([pairs[name][side].T for name in names])
            longer = tuple(by_columns(pairs[name][1 - side]) for name in names)
            groups.append(_Group(first, tuple(names), fresh, shorter, longer))
            first += len(names)
            for name, short, long in zip(names, shorter.transpose(1, 2).unbind(0), longer, strict=True):
                self.pairs[name] = (short, long) if side == 0 else (long, short)
        return groups

    def around(self, draw: Callable[[Batch], Tensor]) -> LowRank:
        """left @ core @ right.T of every pair.

        Args:
            draw: gives the cores of a batch, (k, r, r) fp64, which are changed; called once for each rank.
        """
        sheets = []
        for batch, groups in self._batches:
            cores = draw(batch)
            _to_grids(cores, batch.rank)
            for group in groups:
                sheets.append(_around(group, cores[group.first : group.first + len(group.names)], batch.rank))
        return LowRank.on(sheets)


def _batch(rank: int, alike: Mapping[tuple[str, int], list[str]], pairs: Mapping[str, tuple[Tensor, Tensor]]) -> Batch:
    names = tuple(name for kin in alike.values() for name in kin)
    return Batch(names, rank, torch.tensor([float(len(pairs[n][0]) * len(pairs[n][1])) for n in names]).double())


def _around(group: _Group, cores: Tensor, rank: int) -> Sheet:
    """The shorter sides times their cores, back on grids. Every product and sum is exact in fp64: no order shows."""
    turned = cores.transpose(1, 2) if group.fresh == "left" else cores
    shorter = _buffer("frames", group.shorter).copy_(group.shorter)
    product = torch.bmm(turned, shorter, out=_buffer("frames' product", group.shorter))  # (k, r, s)
    ceilings, values, (count, _, side) = _to_grids(product, rank), product.float().view(-1), product.shape
    sizes, shapes = (rank * side,) * count, ((rank, side),) * count
    return Sheet(group.names, values, sizes, shapes, True, group.longer, (group.fresh,) * count, ceilings)


def _to_grids(stack: Tensor, rank: int) -> Tensor:
    """(k, a, b) fp64: rounds each matrix as `grids.on_grid` does. Returns (k,) the powers of two above their numbers."""
    largest = torch.abs(stack, out=_buffer("frames' size", stack)).flatten(1).amax(dim=1)
    known = largest.isfinite() & (largest > 0)
    ceilings = torch.ldexp(torch.ones_like(largest), torch.frexp(largest.where(known, 1.0)).exponent)
    units = (ceilings * 2.0 ** -grid_bits(rank))[:, None, None]
    stack.div_(units).round_().mul_(units)
    return ceilings


def _buffer(role: str, like: Tensor) -> Tensor:
    return workspace(role, like.numel(), torch.float64, like.device).view(like.shape)
