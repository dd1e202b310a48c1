"""What a back end of the fused kernels does: table noise is made, multiplied and added in one pass over memory.

Functions on one run of elements (or on chosen rows) of one site. A back end may take more than noise (`Backend.takes`): noise
through a mask, numbers of a tensor, products of thin factors. All back ends give the same bits: each product
scale * z is rounded to the precision of the sum; several are summed in their order, starting from -0.0; the sum is added to the
value with one rounding; nothing is contracted into a fused multiply-add. Precision is fp32 (fp64 for fp64 tensors).

    value   of an fp32 or fp64 tensor is what is stored; of a bf16 or fp16 tensor, what is stored with the carried bits
            (`core.weights` defines how), or what is stored alone where nothing is carried
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from zotune.kernels.philox import Words


@dataclass(frozen=True)
class Mask:
    """Which elements of a site are kept: those whose 16 random bits are below `limit`; the product is -0.0 on the others."""

    key: Words  # of the stream of the bits
    limit: int  # of LANES, above 0


@dataclass(frozen=True, eq=False)
class ThinFactors:
    """left (m, r) @ right (r, n), with the site's elements in row-major order; no product or sum is rounded in fp64."""

    left: Tensor  # fp32
    right: Tensor  # fp32, contiguous
    single: bool  # nor in fp32


@dataclass(frozen=True)
class Term:
    """scale * z of one stream; or scale * the numbers of a tensor, or scale * a product of thin factors."""

    key: Words  # of the stream
    book: str  # "normal", "rademacher", "given" or "low-rank"
    scale: float | Tensor  # a number, or a 0-d tensor, which is not read on the host if it lies on a GPU
    mask: Mask | None = None
    numbers: Tensor | None = None  # of "given": flat, one for each element of the whole site, in any precision
    factors: ThinFactors | None = None  # of "low-rank"

    @classmethod
    def given(cls, numbers: Tensor, scale: float | Tensor) -> "Term":
        """scale * numbers, which may change between calls but stay where they are."""
        return cls((0, 0), "given", scale, numbers=numbers)

    @classmethod
    def low_rank(cls, factors: ThinFactors, scale: float | Tensor) -> "Term":
        """scale * left @ right: the product is rounded, then its multiple."""
        return cls((0, 0), "low-rank", scale, factors=factors)

    @property
    def drawn(self) -> bool:
        """Whether it is noise and nothing else, which every back end makes."""
        return self.mask is None and self.replayed

    @property
    def replayed(self) -> bool:
        """Whether it is made of random bits alone, which are the same whenever they are asked for."""
        return self.numbers is None and self.factors is None


@dataclass(frozen=True)
class Run:
    """Which elements of a site: start ... start + count - 1 in row-major order; or `rows`, each `width` elements."""

    site: int  # 64-bit id
    start: int
    count: int
    rows: Tensor | None = None  # (k,) int64
    width: int = 0


LANES = 1 << 16  # values of an element's random bits in a mask

Update = Callable[[Tensor, Tensor | None, Run, Sequence[Term]], None]  # `Backend.update`


@dataclass(frozen=True)
class Addition:
    """One tensor, whole or a run of its elements, and what is added to its values."""

    stored: Tensor  # contiguous
    carried: Tensor | None  # int16, for bf16 and fp16
    site: int  # 64-bit id
    terms: Sequence[Term]
    start: int = 0  # number of the first element in the site

    @property
    def flat(self) -> tuple[Tensor, Tensor | None, Run]:
        """The tensors as one run of elements."""
        flat = self.stored.view(-1)
        return flat, None if self.carried is None else self.carried.view(-1), Run(self.site, self.start, flat.numel())

    def apply(self, update: Update) -> None:
        """By a call of its own."""
        update(*self.flat, self.terms)


class Backend(Protocol):
    """One implementation. Tensors are flat and contiguous, on one device."""

    name: str

    def takes(self, terms: Sequence[Term]) -> bool:
        """Whether such terms may be given to it: all back ends take noise."""
        ...

    def add(self, out: Tensor, run: Run, terms: Sequence[Term]) -> None:
        """out += sum of terms; fp32 or fp64."""
        ...

    def perturb(
        self,
        outs: Sequence[tuple[Tensor, float]],
        stored: Tensor,
        carried: Tensor | None,
        run: Run,
        terms: Sequence[Term],
    ) -> None:
        """out = round(value + sign * sum of terms) for each (out, sign), sign +1 or -1, from one draw.

        `outs` have the dtype of `stored`; one of them may be `stored` itself if it is the only one. `carried`: int16.
        """
        ...

    def update(self, stored: Tensor, carried: Tensor | None, run: Run, terms: Sequence[Term]) -> None:
        """value += sum of terms, kept in `stored` and `carried` (bf16, fp16: both are written), or in `stored` (fp32, fp64)."""
        ...

    def update_many(self, additions: Sequence[Addition]) -> None:
        """`update` of many whole tensors on one device, in any order."""
        ...

    def update_and_perturb(
        self, addition: Addition, outs: Sequence[tuple[Tensor, float]], terms: Sequence[Term]
    ) -> None:
        """`update` of one tensor, and then `perturb` of it: in one pass where there is a kernel for that."""
        ...

    def prepared(self, stored: Tensor, carried: Tensor | None, site: int, outs: Sequence[Tensor]) -> Any:
        """What does these two for one tensor and the same outs again and again: see `kernels.prepared`."""
        ...

    def read(self, stored: Tensor, carried: Tensor | None, out: Tensor) -> None:
        """out (fp32) = the values of a bf16 or fp16 tensor, or of a part of one, of any one shape."""
        ...

    def write(self, values: Tensor, stored: Tensor, carried: Tensor) -> None:
        """Keep fp32 values in a bf16 or fp16 tensor, or a part of one, and its carried bits."""
        ...

    def moments(self, values: Tensor, pivot: float) -> Tensor:
        """`kernels.moments.piece_sums` of flat values, the same bits."""
        ...

    def adds_low_rank(self, dtype: torch.dtype) -> bool:
        """Whether there is an `add_low_rank` for activations of this dtype; else torch's products must do."""
        ...

    def add_low_rank(self, y: Tensor, x: Tensor, kept: Tensor, fresh: Tensor) -> None:
        """y += (x @ kept.T) @ fresh[c] for the rows of each copy c: (C * n, out), (C * n, in), (rank, in), (C, rank, out).

        Factors are fp32, sums as well; these are no bits of noise, so that back ends may round otherwise.
        """
        ...


def written(tensors: Iterable[Tensor]) -> None:
    """What torch's own operations in place do: autograd must know that the old values are gone."""
    for tensor in tensors:
        if not tensor.is_inference():
            torch.autograd.graph.increment_version(tensor)
