"""What goes into a call and what comes out, as a flat list of tensors and constants: repeated, cut up, compared.

Several copies of a batch stand below each other: of (C * B, ...) rows, rows c * B ... (c + 1) * B - 1 belong to copy c.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

CONSTANTS = (type(None), bool, int, float, str, enum.Enum, torch.dtype, torch.device)
CACHE = "Cache"  # in the names of the types of key-value caches
SHARED = ("cache_position",)  # keywords of tensors that have no row per example, however long they are


class Unsuited(Exception):
    """Several copies cannot share this forward; the message says why, as half a sentence."""


@dataclass(frozen=True)
class Shape:
    """What is known about one leaf of a call's inputs or outputs after the call: no values are kept."""

    name: str  # the keyword it belongs to, or ""
    size: tuple[int, ...] | None  # of a tensor
    kind: str  # the type's name
    constant: bool = False


def shapes_of(args: Any, kwargs: dict[str, Any]) -> list[Shape]:
    """The leaves of a call's arguments, in the order of `flatten`."""
    named: list[tuple[str, Any]] = [("", args), *kwargs.items()]
    return [_shape(name, leaf) for name, tree in named for leaf in tree_flatten(tree)[0]]


def _shape(name: str, leaf: Any) -> Shape:
    size = tuple(leaf.shape) if isinstance(leaf, Tensor) else None
    return Shape(name, size, type(leaf).__name__, isinstance(leaf, CONSTANTS))


def flatten(args: Any, kwargs: dict[str, Any]) -> tuple[list[Any], TreeSpec]:
    """The leaves of a call's arguments, and how to put them together again."""
    leaves, spec = tree_flatten((args, kwargs))
    return leaves, spec


def unflatten(leaves: list[Any], spec: TreeSpec) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, out of their leaves."""
    args, kwargs = tree_unflatten(leaves, spec)
    return args, kwargs


def repeat(leaves: Sequence[Any], batched: Sequence[bool], rows: int, copies: int) -> list[Any]:
    """The leaves of a call with `copies` times as many rows in those that have a row per example."""
    return [
        leaf.repeat(copies, *[1] * (leaf.dim() - 1)) if has_rows and leaf.shape[0] == rows else leaf
        for leaf, has_rows in zip(leaves, batched, strict=True)
    ]


@dataclass(frozen=True)
class Answer:
    """What a call with several copies gave: to be handed out copy by copy."""

    leaves: list[Any]
    spec: TreeSpec
    rows: int  # of one copy

    @classmethod
    def of(cls, output: Any, rows: int, copies: int) -> "Answer":
        """Check that every tensor has a row per example and copy.

        Raises:
            Unsuited: something else was returned.
        """
        leaves, spec = tree_flatten(output)
        leaves = [None if CACHE in type(leaf).__name__ else leaf for leaf in leaves]  # a loss has no use for it
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.dim() == 0 or leaf.shape[0] != copies * rows:
                    raise Unsuited(f"it returns a tensor of shape {tuple(leaf.shape)} for {copies} x {rows} rows")
            elif not isinstance(leaf, CONSTANTS):
                raise Unsuited(f"it returns a {type(leaf).__name__}, which cannot be cut into copies")
        return cls(leaves, spec, rows)

    def part(self, copy: int) -> Any:
        """What the call would have returned for one copy alone; tensors are views."""
        first, last = copy * self.rows, (copy + 1) * self.rows
        return tree_unflatten([x[first:last] if isinstance(x, Tensor) else x for x in self.leaves], self.spec)


@dataclass(frozen=True)
class Asked:
    """The inputs of a call, to see whether a later call has the same ones."""

    leaves: list[Any]
    versions: list[int]
    spec: TreeSpec

    @classmethod
    def of(cls, leaves: list[Any], spec: TreeSpec) -> "Asked":
        """Remember inputs. Tensors are kept, and how often they have been written to."""
        return cls(leaves, [writes_to(leaf) for leaf in leaves], spec)

    def again(self, leaves: list[Any], spec: TreeSpec) -> bool:
        """True if these are the same inputs."""
        return spec == self.spec and all(
            _same(mine, version, other) for mine, version, other in zip(self.leaves, self.versions, leaves, strict=True)
        )


def writes_to(leaf: Any) -> int:
    """How often a tensor has been written to; -1 where torch does not count."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else -1


def _same_place(one: Tensor, other: Tensor) -> bool:
    """Views of the same memory, which share a count of writes."""
    return one.device == other.device and one.data_ptr() == other.data_ptr() and one.stride() == other.stride()


def _same(mine: Any, version: int, other: Any) -> bool:
    if not isinstance(mine, Tensor):
        return type(mine) is type(other) and bool(mine == other)
    if mine is other and version >= 0:
        return writes_to(other) == version
    if not isinstance(other, Tensor) or mine.shape != other.shape or mine.dtype != other.dtype:
        return False
    # A tensor that was written to since then no longer holds what was asked; which it was cannot be told any more.
    if version == writes_to(mine) == writes_to(other) >= 0 and _same_place(mine, other):
        return True  # another view of the same numbers; comparing them would wait for a GPU
    return version == writes_to(mine) and mine.device == other.device and torch.equal(mine, other)
