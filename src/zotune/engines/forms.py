"""Forwards of modules too large for one scratch copy: the same function, with the perturbed weight made in pieces.

A vocabulary-sized matrix is a fifth of a small model. An embedding needs only the rows of the tokens that are there; an
output layer can be computed a few thousand rows at a time. Only exact `nn.Embedding` and `nn.Linear` are replaced,
because a subclass may do something else, and modules that offer it (`InPieces`).
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.core.site import Site

# Gives the perturbed values of a part of the weight, in the weight's dtype: (part, shape) -> tensor.
Perturbed = Callable[[Site, tuple[int, ...]], Tensor]
# Module, site of its weight, perturbed values, elements at once, the one input -> output
Form = Callable[[nn.Module, Site, Perturbed, int, Any], Tensor]

MIN_NUMEL = 1 << 22  # smaller weights are not worth cutting up


def embedding_rows(module: nn.Module, site: Site, perturbed: Perturbed, limit: int, ids: Tensor) -> Tensor:
    """nn.Embedding: perturb only the rows that occur."""
    rows, positions = occurring(ids, site.shape[0])
    values = perturbed(site.take(rows), (rows.numel(), site.width))
    return F.embedding(positions, values)


def occurring(ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows that hold every number in `ids`, (k,), and where in them each one is. On a GPU numbers may be repeated: how many
    distinct ones there are is not known there without waiting for it.

    Raises:
        IndexError: on the CPU, a number that is not one of 0 ... count - 1, as torch.nn.Embedding would.
    """
    if ids.is_cuda:
        return ids.reshape(-1), torch.arange(ids.numel(), device=ids.device).view(ids.shape)
    rows, positions = torch.unique(ids, return_inverse=True)  # sorted
    if rows.numel() and not (rows[0] >= 0 and rows[-1] < count):
        raise IndexError(
            f"token ids must be 0 ... {count - 1}, and those of the batch are {int(rows[0])} ... {int(rows[-1])}."
        )
    return rows, positions


def linear_chunks(module: nn.Module, site: Site, perturbed: Perturbed, limit: int, x: Tensor) -> Tensor:
    """nn.Linear: perturb and multiply `limit` elements of the weight at a time."""
    assert isinstance(module, nn.Linear)
    flat = x.reshape(-1, x.shape[-1])  # 2-d and contiguous: thin 3-d slices take a slow path in bf16 on the CPU
    step = max(1, limit // site.width)
    out: Tensor | None = None
    for first in range(0, module.out_features, step):
        last = min(first + step, module.out_features)
        bias = None if module.bias is None else module.bias[first:last]
        piece = F.linear(flat, perturbed(site.row_range(first, last), (last - first, site.width)), bias)
        if out is None:
            out = piece.new_empty(flat.shape[0], module.out_features)
        out[:, first:last] = piece
    assert out is not None
    return out.view(*x.shape[:-1], module.out_features)


@runtime_checkable
class InPieces(Protocol):
    """A module that offers to do its forward with products of runs of its weight's rows, computed by somebody else."""

    def in_pieces(self, product: Callable[[Tensor, int, int], Tensor], asked: Any) -> Tensor:
        """Its forward, with product(x, first, last) in the place of x @ weight[first:last].T."""
        ...


def row_products(module: nn.Module, site: Site, perturbed: Perturbed, limit: int, asked: Any) -> Tensor:
    """A module with `in_pieces`: perturb and multiply as many rows as it asks for, which it uses up at once."""
    assert isinstance(module, InPieces)

    def product(x: Tensor, first: int, last: int) -> Tensor:
        return F.linear(x, perturbed(site.row_range(first, last), (last - first, site.width)))

    return module.in_pieces(product, asked)


def form_for(module: nn.Module, site: Site) -> Form | None:
    """The replacement for a module's forward, if there is one and it is worth it."""
    weight = module._parameters.get("weight")
    if "forward" in vars(module) or weight is None or not weight.is_contiguous():
        return None  # somebody else has put a forward there, such as accelerate's device hooks; or pieces are not runs
    if type(module) is nn.Embedding and module.max_norm is None:
        return embedding_rows
    if type(module) is nn.Linear and site.numel >= MIN_NUMEL:
        return linear_chunks
    return row_products if isinstance(module, InPieces) else None
