"""Embeddings and linear layers with C copies of their rows.

Embeddings look up perturbed copies of the rows that occur. Products with a perturbed matrix are done copy by copy, out of
scratch that is written for two copies at a time (both signs of a pair from one draw). Low-rank points are added on the
activations (`engines.batched_low_rank`); layers that get the same input (queries, keys and values) share the first of the
two thin products.
"""

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


class CopiedEmbedding(Copied):
    """nn.Embedding: perturbed copies of the rows that occur."""

    def answer(self, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `Copied.answer`."""
        slot, copies = self.slots["weight"], self.wave.copies
        distinct, places = occurring(first)  # (k,)
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
        if not self.low_rank and "weight" in self.moves:
            made = self._dense(rows, self.slots["weight"], bias, biases)
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
    # Dense points

    def _dense(self, rows: Tensor, slot: Slot, bias: Tensor | None, biases: Tensor | None) -> Tensor:
        """A product of each copy's rows with its matrix in scratch; two are made and multiplied at a time."""
        copies, each, like = self.wave.copies, rows.shape[0] // self.wave.copies, slot.tensor
        width = like.shape[1] if self.transposed else like.shape[0]
        into = None if _casts(rows, like) else rows.new_empty(copies, each, width)
        pieces: list[Tensor] = []
        for start in range(0, copies, AT_ONCE):
            stop = min(start + AT_ONCE, copies)
            whole, scratch = self.wave.matrices(like)
            self.fill("weight", slot.site, range(start, stop), scratch[: stop - start])
            factors = whole[: stop - start] if self.transposed else whole[: stop - start].transpose(1, 2)
            own = rows[start * each : stop * each].reshape(stop - start, each, -1)
            out = None if into is None else into[start:stop]
            if biases is not None:
                made = torch.baddbmm(biases[start:stop].unsqueeze(1), own, factors, out=out)
            elif bias is not None:
                made = torch.baddbmm(bias, own, factors, out=out)
            else:
                made = torch.bmm(own, factors, out=out)
            pieces.append(made)
        return (torch.cat(pieces) if into is None else into).view(rows.shape[0], width)

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


def _casts(rows: Tensor, matrix: Tensor) -> bool:
    """Whether a product casts its factors, which products into a given tensor do not."""
    return rows.dtype != matrix.dtype or torch.is_autocast_enabled(rows.device.type)


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
