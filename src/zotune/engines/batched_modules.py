"""Forwards that answer for several points at once: what a trained module does with C copies of its rows.

A forward is put into the module for the length of one call of the body. Here is what any module can do: run copy by copy;
or with one row of its vectors per example, where the module is so written that this gives the same bits. Embeddings and
linear layers are in `engines.batched_layers`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from zotune.core.direction import Direction
from zotune.core.site import Site
from zotune.core.weights import Slot, Weights
from zotune.engines.batched_calls import Answer, Unsuited, flatten, unflatten
from zotune.engines.batched_low_rank import Points
from zotune.engines.batched_sheets import FreshFactors

SHARED = "shared"
AT_ONCE = 2  # scratch copies of a matrix: both signs of a pair
PLACES = 4  # sizes of matrices that have scratch of their own: transformers have three or four


@dataclass
class Wave:
    """The points that a forward answers for, and how many rows each of them has."""

    weights: Weights
    points: Sequence[Direction] = ()  # of the whole wave
    low_rank: Points = field(default_factory=lambda: Points(()))  # the same
    everywhere: bool = False  # each of them is the same sum of noise on every tensor
    first: int = 0  # points first ... last - 1 share the forward
    last: int = 0
    sizes: dict[str, int] = field(default_factory=dict)  # rows of one copy: "examples" and "tokens"
    looking: bool = False  # the same rows as when the model was looked at
    groups: dict[range, tuple[Direction, ...]] = field(default_factory=dict)  # points of some copies of this forward
    largest: int = 0  # elements of the largest matrix that may need scratch
    scratch: dict[Any, tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict)  # by shape and dtype
    buffers: dict[tuple[torch.dtype, int], Tensor] = field(default_factory=dict)  # whose views these are, by length
    fresh: FreshFactors = field(default_factory=lambda: FreshFactors(Points(())))  # of low-rank points on sheets
    made: dict[Any, dict[str, Tensor]] = field(default_factory=dict)  # in this forward: by dtype and device, by name
    columns: dict[Any, Tensor] = field(default_factory=dict)  # scales of low-rank terms, the same for many matrices
    input: Tensor | None = None  # of the last linear layer; the layers that follow may share it
    version: int = 0  # how often it had been written to
    products: dict[int, Tensor] | None = None  # thin products with it, of each of these layers
    leader: Any = None  # the first of them

    def forget(self) -> None:
        """Hold no activations and no points."""
        self.input = self.products = self.leader = None
        self.groups.clear()
        self.made.clear()

    def matrices(self, like: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(AT_ONCE, *shape) uninitialised numbers like this tensor's, valid until they are asked for again; and each.

        The same objects each time on the CPU, by which `Weights` knows them again. Other devices have allocators. Matrices
        of another size lie elsewhere, unless there are many sizes: in the same place, what one thread has in its cache
        would be another's to write.
        """
        if not like.is_cpu:
            made = torch.empty((AT_ONCE, *like.shape), dtype=like.dtype, device=like.device)
            return made, made.unbind()
        key = like.shape, like.dtype
        if key not in self.scratch:
            name = like.dtype, AT_ONCE * like.numel()
            if name not in self.buffers and len(self.buffers) >= PLACES:
                name = like.dtype, AT_ONCE * self.largest
            if name not in self.buffers:
                with torch.inference_mode(False):  # else only inference mode could write to it again
                    self.buffers[name] = torch.empty(name[1], dtype=like.dtype)
            made = self.buffers[name][: AT_ONCE * like.numel()].view(AT_ONCE, *like.shape)
            self.scratch[key] = made, made.unbind()
        return self.scratch[key]

    def fresh_factor(self, name: str, like: Tensor) -> Tensor:
        """(C, r, m), for a matrix like this."""
        if (like.dtype, like.device) not in self.made:
            self.made[like.dtype, like.device] = self.fresh.made(self.first, self.last, like)
        return self.made[like.dtype, like.device][name]

    def group(self, copies: range) -> tuple[Direction, ...]:
        """The points of some of the copies: the same object each time, by which `Weights` knows it again."""
        if copies not in self.groups:
            self.groups[copies] = tuple(self.points[self.first + copy] for copy in copies)
        return self.groups[copies]

    @property
    def copies(self) -> int:
        """C."""
        return self.last - self.first


@dataclass
class Copied:
    """The forward of one trained module for C copies. This class runs any module, copy by copy."""

    module: nn.Module
    slots: dict[str, Slot]  # its trained tensors, by attribute
    wave: Wave
    seen: list[int]  # rows in each call when the model was looked at
    ran: int = 0  # calls in the present forward
    each: str | None = None  # what its rows are: "examples", "tokens", or the same for all copies; None: not known yet
    rowed: list[tuple[bool | None, ...]] = field(
        default_factory=list
    )  # by call: which arguments have rows; None: no tensor
    way: str | None = None  # how the copies are made: "rows" or "copies"; None before it is known
    moved: dict[str, list[bool]] = field(default_factory=dict)  # by attribute: which points of the wave move it
    moves: set[str] = field(default_factory=set)  # what the points of the present forward move
    vectors: dict[str, Tensor] = field(default_factory=dict)  # (C, width) values that were made ahead
    kept: dict[Any, tuple[Tensor, tuple[Tensor, ...]]] = field(default_factory=dict)  # what they lie in

    @property
    def plain(self) -> Any:
        """The module's own forward."""
        return type(self.module).forward.__get__(self.module)

    def prepare(self) -> None:
        """A new wave: which points move what?"""
        points = self.wave.points
        if self.wave.everywhere:
            self.moved = dict.fromkeys(self.slots, [True] * len(points))
        else:
            self.moved = {a: [point.touches(slot.site) for point in points] for a, slot in self.slots.items()}

    def ready(self) -> None:
        """A new forward. What is small is made ahead, for all modules in a row: the code that does it stays in the cache."""
        wave, self.ran = self.wave, 0
        self.moves = {a for a, moved in self.moved.items() if True in moved[wave.first : wave.last]}
        if self.makes_vectors:
            for attribute in self.moves:
                slot = self.slots[attribute]
                if slot.tensor.dim() == 1:
                    self.vectors[attribute], outs = self._rows_of(attribute)
                    self.fill(attribute, slot.site, range(wave.copies), outs)

    def _rows_of(self, attribute: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(C, width) uninitialised numbers like a vector's, and each row. The same objects each time: see `Wave.matrices`."""
        like = self.slots[attribute].tensor
        key = attribute, self.wave.copies, like.dtype
        if key not in self.kept or not like.is_cpu:
            with torch.inference_mode(False):
                whole = torch.empty((self.wave.copies, like.numel()), dtype=like.dtype, device=like.device)
            self.kept[key] = whole, whole.unbind()
        return self.kept[key]

    @property
    def makes_vectors(self) -> bool:
        """Whether vectors are needed as (C, width)."""
        return self.way == "rows"

    def done(self) -> None:
        """The forward is over."""
        self.vectors.clear()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer for all copies, or as always if no point moves this module."""
        first = args[0] if args else None
        if not isinstance(first, Tensor):
            first = next((leaf for leaf in flatten(args, kwargs)[0] if isinstance(leaf, Tensor)), None)
        if first is None or first.dim() == 0:
            raise Unsuited(f"{type(self.module).__name__} is called without a batch")
        if self.wave.looking:
            self.learn(first)
            leaves = flatten(args, kwargs)[0]
            self.rowed = [*(self.rowed if self.ran else ()), _rowed(leaves, first.shape[0])]
        self.ran += 1
        if self.each is None or (
            self.each != SHARED and first.shape[0] != self.wave.copies * self.wave.sizes[self.each]
        ):
            raise Unsuited(f"{type(self.module).__name__} gets {first.shape[0]} rows: their number depends on the data")
        if not self.moves:
            return self.plain(*args, **kwargs)
        return self.answer(first, *args, **kwargs)

    def learn(self, first: Tensor) -> None:
        """How many rows belong to a copy? Seen from the first forward: as many as examples, or as many as tokens."""
        name, rows = type(self.module).__name__, first.shape[0]
        before = self.seen[self.ran] if self.ran < len(self.seen) else -1
        each = next((key for key, size in self.wave.sizes.items() if size == before), None)
        each = SHARED if rows == before else each if rows == self.wave.copies * before else None
        if each is None:
            raise Unsuited(f"{name} gets {rows} rows, {before} of one copy, for {self.wave.sizes}")
        if self.each not in (None, each):
            raise Unsuited(f"{name} gets another kind of rows in some calls")
        self.each = each

    def values(self, attribute: str, part: Site, shape: tuple[int, ...]) -> Tensor:
        """A part of a tensor at each point: (C, *shape), in its dtype."""
        like = self.slots[attribute].tensor
        out = torch.empty((self.wave.copies, *shape), dtype=like.dtype, device=like.device)
        self.fill(attribute, part, range(self.wave.copies), list(out))
        return out

    def fill(self, attribute: str, part: Site, copies: range, outs: Sequence[Tensor]) -> None:
        """Write a part of a tensor at some of the points."""
        wave, slot, moved = self.wave, self.slots[attribute], self.moved[attribute]
        points = wave.group(copies)
        if all(moved) or all(moved[wave.first + copy] for copy in copies):
            wave.weights.perturb_many(slot, part, points, outs)
            return
        for copy, point, out in zip(copies, points, outs, strict=True):
            if moved[wave.first + copy]:
                wave.weights.perturb(slot, part, point, out)
            else:
                out.copy_(slot.stored(part).view(out.shape))

    def answer(self, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The output for all copies."""
        if self.each == SHARED:
            raise Unsuited(f"{type(self.module).__name__} gets an input without a row per example")
        if self.way == "rows":
            return self._one_row_each(first, args, kwargs)
        made = self._one_by_one(first, args, kwargs)
        if self.way is None and len({id(p) for p in self.wave.points[self.wave.first : self.wave.last]}) > 1:
            self.way = "rows" if self._rows_give(made, first, args, kwargs) else "copies"
        return made

    # ------------------------------------------------------------------------------------------------------------------
    # Copy by copy

    def _one_by_one(self, first: Tensor, args: Any, kwargs: Any) -> Any:
        copies, total = self.wave.copies, first.shape[0]
        rows = total // copies
        leaves, spec = flatten(args, kwargs)
        cut = self._cut(leaves, total)
        answers: list[Answer] = []
        for start in range(0, copies, AT_ONCE):
            group = range(start, min(start + AT_ONCE, copies))
            made = {a: self._whole(a, slot, group) for a, slot in self.slots.items() if a in self.moves}
            for place, copy in enumerate(group):
                own = [
                    x[copy * rows : (copy + 1) * rows] if has_rows else x
                    for x, has_rows in zip(leaves, cut, strict=True)
                ]
                more, named = unflatten(own, spec)
                output = self._with({a: values[place] for a, values in made.items()}, more, named)
                answers.append(Answer.of(output, rows, 1))
        whole = [_joined(parts) for parts in zip(*(answer.leaves for answer in answers), strict=True)]
        return tree_unflatten(whole, answers[0].spec)

    def _cut(self, leaves: list[Any], total: int) -> Sequence[bool | None]:
        """Which arguments have rows of every copy: those that had when the model was looked at.

        How long a tensor is says little: a mask of positions may happen to have as many.
        """
        cut = self.rowed[self.ran - 1] if self.ran <= len(self.rowed) else ()
        if _rowed(leaves, total) != cut:
            raise Unsuited(f"{type(self.module).__name__} gets arguments of another kind than when it was looked at")
        return cut

    def _whole(self, attribute: str, slot: Slot, group: range) -> list[Tensor]:
        outs = [torch.empty(slot.tensor.shape, dtype=slot.tensor.dtype, device=slot.tensor.device) for _ in group]
        self.fill(attribute, slot.site, group, outs)
        return outs

    def _with(self, replaced: dict[str, Tensor], args: Any, kwargs: Any) -> Any:
        """The module's own forward with other tensors in the place of its own."""
        before = {attribute: self.module._parameters[attribute] for attribute in replaced}
        try:
            self.module._parameters.update(replaced)  # type: ignore[arg-type]
            return self.plain(*args, **kwargs)
        finally:
            self.module._parameters.update(before)

    # ------------------------------------------------------------------------------------------------------------------
    # One row of the weight per example

    def _one_row_each(self, first: Tensor, args: Any, kwargs: Any) -> Any:
        """Vectors as (C * rows, 1, ..., width): elementwise modules broadcast them."""
        copies, rows = self.wave.copies, first.shape[0] // self.wave.copies
        replaced = {}
        for attribute in self.moves:
            values = self.vectors.get(attribute)
            if values is None:
                slot = self.slots[attribute]
                values = self.values(attribute, slot.site, (slot.site.numel,))
            if rows > 1:
                values = values.unsqueeze(1).expand(copies, rows, -1).reshape(copies * rows, -1)
            replaced[attribute] = values.view(copies * rows, *[1] * (first.dim() - 2), -1)
        return self._with(replaced, args, kwargs)

    def _rows_give(self, expected: Any, first: Tensor, args: Any, kwargs: Any) -> bool:
        """Do rows give the same bits as copies? Tried on the first input: fused kernels want the vector itself."""
        if any(slot.tensor.dim() != 1 for slot in self.slots.values()) or first.dim() < 2:
            return False
        if not isinstance(expected, Tensor):
            return False
        try:
            made = self._one_row_each(first, args, kwargs)
        except (RuntimeError, TypeError, ValueError):
            return False
        return isinstance(made, Tensor) and made.dtype == expected.dtype and torch.equal(made, expected)


def _rowed(leaves: list[Any], rows: int) -> tuple[bool | None, ...]:
    """Which leaves have so many rows; None for what is no tensor."""
    return tuple(x.dim() > 0 and x.shape[0] == rows if isinstance(x, Tensor) else None for x in leaves)


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    if any(part != parts[0] for part in parts):
        raise Unsuited("its outputs differ in more than tensors between the copies")
    return parts[0]
