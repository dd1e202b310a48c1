"""Embeddings and linear layers with C copies of their rows.

Embeddings look up perturbed copies of the rows that occur. Products with a perturbed matrix are done copy by copy, out of
scratch that is written for two copies at a time (both signs of a pair from one draw). Low-rank points are added on the
activations (`engines.batched_low_rank`); layers that get the same input (queries, keys and values) share the first of the
two thin products.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.core.weights import Slot
from zotune.engines.batched_calls import Unsuited, writes_to
from zotune.engines.batched_low_rank import Thin, ThinProducts, same_objects, thin_terms
from zotune.engines.batched_modules import AT_ONCE, SHARED, Copied, Wave
from zotune.engines.batched_sheets import FreshProducts, Side
from zotune.engines.forms import occurring

# What a number of a matrix costs, in numbers that thin products read or write: measured with 250 to 1,000 rows a copy.
MATRIX = 3
# (copies, (copies, *shape), each of these): makes the matrices of some copies
Write = Callable[[range, Tensor, tuple[Tensor, ...]], None]


class CopiedEmbedding(Copied):
    """nn.Embedding: perturbed copies of the rows that occur."""

    def answer(self, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `Copied.answer`."""
        slot, copies = self.slots["weight"], self.wave.copies
        distinct, places = occurring(first, slot.site.shape[0])  # (k,)
        table = self.values("weight", slot.site.take(distinct), (distinct.numel(), slot.site.width))
        if self.each != SHARED:
            offsets = torch.arange(copies, device=first.device) * distinct.numel()
            places = places.view(copies, -1) + offsets[:, None]
            return F.embedding(places.view(first.shape), table.view(-1, slot.site.width))
        if first.dim() > 1 and first.shape[0] != 1:
            raise Unsuited(f"{type(self.module).__name__} gets an input without a row per example")
        one = table[:, places.view(-1)]  # (C, positions, width), the same for all examples of a copy
        return one.repeat_interleave(self.wave.sizes["examples"], 0)


@dataclass
class CopiedLinear(Copied):
    """nn.Linear, and transformers' Conv1D, whose matrix is stored as (in, out)."""

    transposed: ClassVar[bool] = False
    thin: Thin | None = None  # the wave's points as low-rank terms, if they are all that
    side: Side | None = None  # or, better, on the sheets that they share
    thin_products: ThinProducts = field(default_factory=ThinProducts)
    fresh_products: FreshProducts = field(default_factory=FreshProducts)
    together: tuple[list[Tensor], Tensor] | None = None  # factors of the layers that it leads, and all side by side
    leader: "CopiedLinear | None" = None  # the layer that gets the same input before this one
    followers: "list[CopiedLinear]" = field(default_factory=list)

    @property
    def makes_vectors(self) -> bool:
        """See `Copied.makes_vectors`."""
        return True

    @property
    def low_rank(self) -> bool:
        """Whether the points of the wave are evaluated on activations."""
        return self.thin is not None or self.side is not None

    @property
    def sides(self) -> ThinProducts | FreshProducts:
        """The thin products."""
        return self.thin_products if self.side is None else self.fresh_products

    def prepare(self) -> None:
        """See `Copied.prepare`."""
        super().prepare()
        self.thin = self.side = None
        if True in self.moved.get("weight", ()) and not self.wave.everywhere:
            site = self.slots["weight"].site
            self.side = self.wave.fresh.on(site, "right" if self.transposed else "left")
            if self.side is None:
                self.thin = thin_terms(self.wave.low_rank, site, self.transposed)

    def ready(self) -> None:
        """See `Copied.ready`."""
        super().ready()
        if "weight" not in self.moves:
            return
        wave, slot = self.wave, self.slots["weight"]
        if self.side is not None:
            self.fresh_products.ready(self.side, wave.fresh_factor(slot.site.name, slot.tensor), slot.tensor)
        elif self.thin is not None:
            self.thin_products.ready(self.thin, wave.first, wave.last, slot.tensor, wave.columns)

    def done(self) -> None:
        """See `Copied.done`."""
        super().done()
        self.sides.done()

    def answer(self, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `Copied.answer`."""
        if self.each == SHARED:
            raise Unsuited(f"{type(self.module).__name__} gets an input without a row per example")
        weight, bias = self.module._parameters["weight"], self.module._parameters.get("bias")
        assert weight is not None
        rows = first.reshape(-1, first.shape[-1])  # 2-d: thin 3-d slices take a slow path in bf16 on the CPU
        biases = self.vectors.get("bias")  # (C, out)
        write = self._writes(rows.shape[0] // self.wave.copies, weight)
        if write is not None:
            made = self._by_copies(rows, write, bias, biases)
        else:
            made = self._product(rows, weight, bias if biases is None else None)
            if "weight" in self.moves:
                self.sides.add(made, rows, self._inner(first, rows, made))
            if biases is not None:
                made.view(self.wave.copies, -1, made.shape[1]).add_(biases.unsqueeze(1))
        return made.view(*first.shape[:-1], made.shape[-1])

    def _product(self, rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(rows, matrix.t() if self.transposed else matrix, bias)

    # ------------------------------------------------------------------------------------------------------------------
    # A matrix for each copy

    def _by_copies(
        self,
        rows: Tensor,
        write: Write,
        bias: Tensor | None,
        biases: Tensor | None,
    ) -> Tensor:
        """A product of each copy's rows with its matrix in scratch; two are made and multiplied at a time.

        Args:
            rows: of all copies.
            write: makes the matrices.
            bias: the same for all copies, or None.
            biases: (C, out), or None.
        """
        like, copies = self.slots["weight"].tensor, self.wave.copies
        own = rows.view(copies, -1, rows.shape[1])
        if copies == AT_ONCE:
            return self._multiplied(own, like, write, range(copies), bias, biases).view(rows.shape[0], -1)
        pieces: list[Tensor] = []
        for start in range(0, copies, AT_ONCE):
            some = slice(start, min(start + AT_ONCE, copies))
            vectors = None if biases is None else biases[some]
            pieces.append(self._multiplied(own[some], like, write, range(some.start, some.stop), bias, vectors))
        return torch.cat(pieces).view(rows.shape[0], -1)

    def _multiplied(
        self, own: Tensor, like: Tensor, write: Write, copies: range, bias: Tensor | None, biases: Tensor | None
    ) -> Tensor:
        whole, each = self.wave.matrices(like)
        if len(copies) < AT_ONCE:
            whole, each = whole[: len(copies)], each[: len(copies)]
        write(copies, whole, each)
        factors = whole if self.transposed else whole.transpose(1, 2)
        if biases is not None:
            return torch.baddbmm(biases.unsqueeze(1), own, factors)
        return torch.bmm(own, factors) if bias is None else torch.baddbmm(bias, own, factors)

    def _writes(self, rows: int, matrix: Tensor) -> Write | None:
        """What makes a matrix for each copy, if the copies of so many rows each are to be multiplied by their own.

        Low-rank points: if that costs less than thin products. Those read what goes in, and read and write what comes out:
        from memory, when it is much. A matrix is made, written and read. On the CPU; elsewhere it has not been measured.
        """
        if "weight" not in self.moves:
            return None
        if not self.low_rank:
            return self._noisy
        width, out = matrix.shape if self.transposed else matrix.shape[::-1]
        return self._displaced if matrix.is_cpu and rows * (width + 2 * out) > MATRIX * width * out else None

    def _noisy(self, copies: range, whole: Tensor, each: tuple[Tensor, ...]) -> None:
        self.fill("weight", self.slots["weight"].site, copies, each)

    def _displaced(self, copies: range, whole: Tensor, each: tuple[Tensor, ...]) -> None:
        """The stored matrix and the thin terms, rounded once."""
        matrix = self.slots["weight"].tensor
        into, fresh = self.sides.factors(copies, matrix)
        into = into.expand(len(copies), -1, -1)
        left, right = (into, fresh) if self.transposed else (fresh.transpose(1, 2), into.transpose(1, 2))
        torch.baddbmm(matrix.expand_as(whole), left, right, out=whole)  # into a tensor: no autocast

    # ------------------------------------------------------------------------------------------------------------------
    # Low-rank points

    def learn(self, first: Tensor) -> None:
        """See `Copied.learn`. Also: which layers are called one after the other with the same input?"""
        super().learn(first)
        wave = self.wave
        if wave.input is first and wave.leader is not None and self.ran == 0:
            self.leader = wave.leader
            wave.leader.followers.append(self)
        else:
            wave.input, wave.leader = first, self

    def _inner(self, first: Tensor, rows: Tensor, like: Tensor) -> Tensor | None:
        """rows @ into, out of the product that the leader of these layers has made for all of them."""
        wave = self.wave
        if self.side is not None and self.fresh_products.alone:
            return None
        if self.leader is not None:
            if wave.leader is not self.leader or wave.input is not first or wave.version != writes_to(first):
                return None
            return None if wave.products is None else wave.products.pop(id(self), None)
        group = [self, *(f for f in self.followers if f.low_rank and "weight" in f.moves)]
        if len(group) == 1:
            return None
        factors = [each.sides.into for each in group]
        if any(factor.dtype != like.dtype for factor in factors):
            return None
        if self.together is None or not same_objects(self.together[0], factors):
            self.together = factors, torch.cat(factors, 1)
        product = torch.mm(rows, self.together[1])
        pieces = torch.split(product, [factor.shape[1] for factor in factors], 1)
        wave.leader, wave.input, wave.version = self, first, writes_to(first)
        wave.products = {id(each): piece for each, piece in zip(group, pieces, strict=True)}
        return wave.products.pop(id(self))


class CopiedConv1D(CopiedLinear):
    """transformers.pytorch_utils.Conv1D."""

    transposed = True


def copied(module: nn.Module, slots: dict[str, Slot], wave: Wave, seen: list[int]) -> Copied:
    """The forward for a module that holds trained tensors."""
    kind: type[Copied] = Copied
    weight = module._parameters.get("weight")
    if weight is not None and weight.is_contiguous():
        name = f"{type(module).__module__}.{type(module).__name__}"
        if type(module) is nn.Linear:
            kind = CopiedLinear
        elif name == "transformers.pytorch_utils.Conv1D":
            kind = CopiedConv1D
        elif type(module) is nn.Embedding and module.max_norm is None and "weight" in slots:
            kind = CopiedEmbedding
    return kind(module, slots, wave, seen)
