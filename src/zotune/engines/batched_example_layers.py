"""What trained modules do with rows of examples that each have a direction of their own: u with signs.

Several points stand below each other, and in each of them its examples: of (C * B * g, ...) rows, those from (c B + i) g
on belong to example i at point c. All points of a forward are multiples of one `core.signed.PerExample`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.core.direction import Direction
from zotune.core.noise import Stream
from zotune.core.signed import PerExample, for_example, signs_of
from zotune.core.site import Site
from zotune.core.weights import Slot
from zotune.engines.batched_calls import Unsuited, flatten
from zotune.engines.batched_modules import SHARED, Copied, Wave
from zotune.engines.forms import occurring
from zotune.errors import EngineError
from zotune.kernels.workspace import workspace

PIECE = 1 << 22  # elements of u at once


@dataclass
class ExampleWave(Wave):
    """The examples of the points that a forward answers for; each of them is a copy with a point of its own."""

    whole: Wave | None = None  # the same with the points as copies
    examples: int = 1  # B
    together: Sequence[Direction] = ()  # the points of this forward
    signs: dict[Any, Tensor] = field(default_factory=dict)

    def begin(
        self, points: Sequence[Direction], numbers: range, examples: int, sizes: dict[str, int], looking: bool
    ) -> None:
        """A new forward for the points of these numbers; `sizes`: rows of one point."""
        assert self.whole is not None
        if any(size % examples for size in sizes.values()):
            raise Unsuited(f"{sizes} rows are not divided by {examples} examples")
        self.together = [points[number] for number in numbers]
        self.examples, self.looking = examples, looking
        self.points = [for_example(point, i) for point in self.together for i in range(examples)]
        self.first, self.last = 0, len(self.points)
        self.whole.sizes = sizes
        self.sizes = {kind: size // examples for kind, size in sizes.items()}
        self.groups.clear()
        self.signs.clear()

    def forget(self) -> None:
        """Hold nothing."""
        super().forget()
        self.points = self.together = ()
        self.signs.clear()

    def signs_of(self, source: Stream, site: Site, side: str, like: Tensor) -> Tensor:
        """(B, rows or columns), on the device and in the dtype of `like`."""
        key = (source, site.name, side, like.dtype, like.device)
        if key not in self.signs:
            self.signs[key] = signs_of(source, site, side, self.examples).to(like.device, like.dtype)
        return self.signs[key]


@dataclass
class Turned:
    """A site's part in the points of a forward: step * u, with these signs, times a ratio for each point."""

    u: PerExample
    step: float
    ratios: list[float]  # (C,): 1.0 and -1.0 in a pair

    def made(self, part: Site, dtype: torch.dtype, device: torch.device) -> Tensor:
        """step * u on a part, in scratch: (elements,)."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        out = workspace("flipout", part.numel, wide, device)
        out.zero_()
        self.u.inner.add_to(out, part, self.step)
        return out if wide == dtype else out.to(dtype)


@dataclass
class ExampleCopied(Copied):
    """Any module: elementwise with a vector for each example, where that gives the same bits; else example by example."""

    wave: ExampleWave

    def prepare(self) -> None:
        """See `Copied.prepare`."""
        wave, each = self.wave, self.wave.examples
        self.moved = {
            a: [moves for p in wave.together for moves in [p.touches(slot.site)] * each]
            for a, slot in self.slots.items()
        }

    def learn(self, first: Tensor) -> None:
        """See `Copied.learn`: rows of points, not of examples."""
        assert self.wave.whole is not None
        mine, self.wave = self.wave, self.wave.whole  # type: ignore[assignment]
        try:
            super().learn(first)
        finally:
            self.wave = mine

    def outside(self, *args: Any, **kwargs: Any) -> Any:
        """Answer for one point where nobody has looked at how the rows lie."""
        first = next((leaf for leaf in flatten(args, kwargs)[0] if isinstance(leaf, Tensor) and leaf.dim()), None)
        assert self.wave.whole is not None
        sizes, rows = self.wave.whole.sizes, -1 if first is None else first.shape[0]
        self.each = next((kind for kind, size in sizes.items() if size == rows), None)
        if self.each is None:
            shape = "no tensor" if first is None else f"an input of shape {tuple(first.shape)}"
            raise Unsuited(f"{type(self.module).__name__} gets {shape}, and there are {sizes}")
        return self(*args, **kwargs)

    def turned(self, attribute: str) -> Turned:
        """How the points of this forward move a tensor."""
        site, found = self.slots[attribute].site, []
        for point in self.wave.together:
            leaves = point.leaves(site)
            if leaves is None or len(leaves) > 1 or (leaves and not isinstance(leaves[0][1], PerExample)):
                raise EngineError(
                    "Points of examples must be multiples of one PerExample direction; this one is a sum with others."
                )
            found.append(leaves[0] if leaves else (0.0, None))
        which = [leaf for _, leaf in found if isinstance(leaf, PerExample)]
        if any(leaf is not which[0] for leaf in which):
            raise EngineError(
                "Points of examples that share a forward must be multiples of the same PerExample direction."
            )
        scales = [float(scale) for scale, _ in found]
        step = next((abs(scale) for scale in scales if scale), 1.0)
        return Turned(which[0], step, [scale / step for scale in scales])

    def turns(self, attribute: str, like: Tensor) -> tuple[Turned, Tensor, Tensor, Tensor]:
        """The move of a tensor, (C,) ratios, and its signs of rows (B, m) and of columns (B, n), as `like`."""
        turned, site = self.turned(attribute), self.slots[attribute].site
        ratios = torch.tensor(turned.ratios, dtype=like.dtype, device=like.device)
        rows, columns = (self.wave.signs_of(turned.u.source, site, side, like) for side in ("rows", "columns"))
        return turned, ratios, rows, columns

    def values(self, attribute: str, part: Site, shape: tuple[int, ...]) -> Tensor:
        """See `Copied.values`: vectors are made for all examples from one draw, with the bits of one at a time."""
        slot = self.slots[attribute]
        if slot.tensor.dim() != 1 or part is not slot.site or not all(self.moved[attribute]):
            return super().values(attribute, part, shape)
        values = slot.storage.read(slot, part).view(-1)
        turned, ratios, rows, columns = self.turns(attribute, values)
        moves = ratios[:, None, None] * (turned.made(part, values.dtype, values.device) * (rows * columns))
        return (values + moves).view(-1, *shape).to(slot.tensor.dtype)


@dataclass
class ExampleNorm(ExampleCopied):
    """nn.LayerNorm and nn.RMSNorm: fused kernels want one vector, so it is put on behind them."""

    def answer(self, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `Copied.answer`."""
        norm = self.module
        if self.each == SHARED or len(norm.normalized_shape) != 1:  # type: ignore[arg-type]
            return super().answer(first, *args, **kwargs)
        wide = first if first.dtype == torch.float64 else first.float()
        if isinstance(norm, nn.LayerNorm):
            made = F.layer_norm(wide, norm.normalized_shape, eps=norm.eps)
        else:
            made = F.rms_norm(wide, norm.normalized_shape, eps=norm.eps)  # type: ignore[arg-type]
        made = made.view(self.wave.copies, -1, made.shape[-1])
        weight, bias = self._vector("weight"), self._vector("bias")
        made = made if weight is None else made * weight.to(made.dtype)
        made = made if bias is None else made + bias.to(made.dtype)
        return made.view(first.shape).to(first.dtype)

    def _vector(self, attribute: str) -> Tensor | None:
        """(C * B, 1, width), or (width,) if it does not move."""
        own = self.module._parameters.get(attribute)
        if own is None or attribute not in self.moves:
            return own
        return self.values(attribute, self.slots[attribute].site, (own.numel(),)).unsqueeze(1)


@dataclass
class ExampleLinear(ExampleCopied):
    """nn.Linear, and transformers' Conv1D, whose matrix is stored as (in, out): one product more."""

    transposed: ClassVar[bool] = False

    def answer(self, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `Copied.answer`."""
        if self.each == SHARED:
            raise Unsuited(f"{type(self.module).__name__} gets an input without a row per example")
        weight, bias = self.module._parameters["weight"], self.module._parameters.get("bias")
        assert weight is not None
        rows = first.reshape(-1, first.shape[-1])
        made = F.linear(rows, weight.t() if self.transposed else weight, bias)
        if "weight" in self.moves:
            self._add_matrix(made, rows)
        if "bias" in self.moves:
            turned, ratios, signs, columns = self.turns("bias", made)
            u = turned.made(self.slots["bias"].site, made.dtype, made.device)
            made.view(len(ratios), len(signs), -1, len(u)).add_(
                (ratios[:, None, None] * (u * (signs * columns)))[:, :, None]
            )
        return made.view(*first.shape[:-1], made.shape[-1])

    def _add_matrix(self, made: Tensor, rows: Tensor) -> None:
        """made += ((x_i * before_i) (step u)^T) * after_i * ratio of the point."""
        site = self.slots["weight"].site
        turned, ratios, of_rows, of_columns = self.turns("weight", made)
        before, after = (of_rows, of_columns) if self.transposed else (of_columns, of_rows)
        points, examples, inputs, outputs = len(ratios), len(before), rows.shape[1], made.shape[1]
        x = rows.view(points, examples, -1, inputs) * before[:, None].to(rows.dtype)
        x = x.view(-1, inputs)
        whole = made.view(points, examples, -1, outputs)
        factors = (ratios[:, None, None] * after)[:, :, None]  # (C, B, 1, out)
        step = outputs if self.transposed else max(1, PIECE // inputs)
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            part = site if self.transposed else site.row_range(start, stop)
            u = turned.made(part, self.slots["weight"].tensor.dtype, made.device)
            u = u.view(inputs, outputs).t() if self.transposed else u.view(stop - start, inputs)
            product = F.linear(x, u).view(points, examples, -1, stop - start)
            whole[..., start:stop].addcmul_(product, factors[..., start:stop])


class ExampleConv1D(ExampleLinear):
    """transformers.pytorch_utils.Conv1D."""

    transposed = True


@dataclass
class ExampleEmbedding(ExampleCopied):
    """nn.Embedding: rows of u that occur, with the signs of each example."""

    def answer(self, first: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See `Copied.answer`."""
        wave, slot = self.wave, self.slots["weight"]
        shared = self.each == SHARED
        if shared and first.dim() > 1 and first.shape[0] != 1:
            raise Unsuited(f"{type(self.module).__name__} gets an input without a row per example")
        own = F.embedding(first, slot.tensor)
        turned, ratios, of_rows, of_columns = self.turns("weight", own)
        distinct, places = occurring(first, self.slots["weight"].site.shape[0])
        u = turned.made(slot.site.take(distinct), own.dtype, own.device).view(distinct.numel(), -1)
        points, examples, width = len(ratios), len(of_rows), own.shape[-1]
        if shared:
            ids, drawn, own = first.view(1, 1, -1), u[places.view(-1)], own.view(1, 1, -1, width)
        else:
            ids, own = first.view(points, examples, -1), own.view(points, examples, -1, width)
            drawn = u[places.view(points, examples, -1)]
        turning = of_rows[torch.arange(examples, device=first.device)[None, :, None], ids]  # (C or 1, B, positions)
        made = own + drawn * (turning * ratios[:, None, None])[..., None] * of_columns[:, None]
        if not shared:
            return made.view(*first.shape, width)
        return made.view(points * examples, -1, width).repeat_interleave(wave.sizes["examples"], 0)


KINDS: dict[str, type[ExampleCopied]] = {
    "torch.nn.modules.linear.Linear": ExampleLinear,
    "transformers.pytorch_utils.Conv1D": ExampleConv1D,
    "torch.nn.modules.sparse.Embedding": ExampleEmbedding,
    "torch.nn.modules.normalization.LayerNorm": ExampleNorm,
    "torch.nn.modules.normalization.RMSNorm": ExampleNorm,
}


def for_examples(module: nn.Module, slots: dict[str, Slot], wave: ExampleWave, seen: list[int]) -> ExampleCopied:
    """The forward for a module that holds trained tensors."""
    kind = KINDS.get(f"{type(module).__module__}.{type(module).__qualname__}", ExampleCopied)
    weight = module._parameters.get("weight")
    plain = weight is None or weight.is_contiguous()
    if not plain or (kind is ExampleEmbedding and (module.max_norm is not None or "weight" not in slots)):
        kind = ExampleCopied
    return kind(module, slots, wave, seen)
