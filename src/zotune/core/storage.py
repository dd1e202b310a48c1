"""How the full-precision values of a trained tensor are kept in the precision that it is stored in.

fp32 and fp64 tensors hold their values themselves. An update is never simply added to fp16 or bf16 storage: of 1,000
updates of 1e-6 almost nothing arrives. By default the bits that do not fit are carried beside the tensor in 16 bits a
parameter, so that the stored tensor plus the carried bits is an fp32 number (`kernels.halves`):

    bf16:  fp32 bits = stored bits * 2**16 + carried          exactly every fp32 number
    fp16:  value     = stored + carried * ulp(stored) / 2**16  every fp32 number above 2**-13, 2**-40 absolute below

"plain" (round to nearest) and "stochastic" (round up or down at random) keep nothing; they are here to be compared with.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from zotune.core.noise import lanes, stream
from zotune.core.site import Site
from zotune.kernels.contract import Term
from zotune.kernels.dispatch import backend_for
from zotune.kernels.prepared import Prepared

LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass
class Slot:
    """One trained tensor: where its values live."""

    site: Site
    tensor: Tensor
    storage: "Storage"
    dtype: torch.dtype = field(init=False)  # of the tensor when its storage was chosen
    carried: Tensor | None = None  # int16, same shape, once there is something to carry
    late: tuple[Term, ...] = ()  # an update that `core.weights` has yet to write: see `Weights.settle`
    reached: int = 0  # elements that have got it, during a query that reads the tensor in pieces
    prepared: Prepared | None = None  # of `Weights.perturb_many`, for the outs that it got last

    def __post_init__(self) -> None:
        """What `Weights.check_kinds` compares with."""
        self.dtype = self.tensor.dtype

    def stored(self, part: Site) -> Tensor:
        """The stored numbers of a part: a view for a run of elements, a copy for chosen rows."""
        return select(self.tensor, self.site, part)


def select(whole: Tensor, site: Site, part: Site) -> Tensor:
    """The part of a tensor that holds `site`: a flat view for a run, a copy for rows."""
    if part is site and whole.is_contiguous():
        return whole.view(-1)
    if part.rows is not None:
        return whole[part.rows]
    if part.count == site.count and not whole.is_contiguous():
        return whole
    flat = whole.view(-1)
    offset = part.start - site.start
    return flat if part.count == site.count else flat[offset : offset + part.count]


class Storage(ABC):
    """How full-precision values are read from and written to a stored tensor."""

    name: str
    bytes_per_parameter: int = 0

    def begin(self, seed: int, step: int) -> None:  # noqa: B027 - most storages have nothing to do
        """A step's update is about to be written; storages that draw random bits draw new ones for it."""

    @abstractmethod
    def read(self, slot: Slot, part: Site, out: Tensor | None = None) -> Tensor:
        """Full-precision values of a part: in `out` (fp32, flat), or in a fresh tensor."""

    @abstractmethod
    def write(self, slot: Slot, part: Site, values: Tensor) -> None:
        """Keep full-precision values of a part that is a run of elements."""


class Exact(Storage):
    """fp32 and fp64: the tensor is its own full-precision value."""

    name = "exact"

    def read(self, slot: Slot, part: Site, out: Tensor | None = None) -> Tensor:
        """See `Storage.read`."""
        stored = slot.stored(part)
        return stored.clone() if out is None else out.view(stored.shape).copy_(stored)

    def write(self, slot: Slot, part: Site, values: Tensor) -> None:
        """See `Storage.write`."""
        slot.stored(part).copy_(values)


class Plain(Storage):
    """Round to nearest and keep nothing: small updates vanish. For comparison."""

    name = "plain"

    def read(self, slot: Slot, part: Site, out: Tensor | None = None) -> Tensor:
        """See `Storage.read`."""
        return _widen(slot.stored(part), out)

    def write(self, slot: Slot, part: Site, values: Tensor) -> None:
        """See `Storage.write`."""
        slot.stored(part).copy_(values)


class Stochastic(Plain):
    """Round up or down with the probability that makes the mean right. For comparison; its random bits are replayable."""

    name = "stochastic"

    def __init__(self) -> None:
        self._bits = stream(0, "rounding", 0)

    def begin(self, seed: int, step: int) -> None:
        """See `Storage.begin`."""
        self._bits = stream(seed, "rounding", step)

    def write(self, slot: Slot, part: Site, values: Tensor) -> None:
        """See `Storage.write`."""
        bits = lanes(self._bits, part, values.device)
        low = _toward_zero(values, slot.tensor.dtype)
        high = torch.where(values == low.float(), low, _next_away(low, values))
        share = (values - low.float()) / (high.float() - low.float()).where(high != low, torch.ones_like(values))
        up = share * 65536.0 > bits.view(values.shape).to(torch.float32)
        slot.stored(part).copy_(torch.where(up, high, low))


class Carried(Storage):
    """The low-order bits are carried in an int16 beside the tensor: stored + carried is an fp32 number."""

    name = "carry"
    bytes_per_parameter = 2

    def read(self, slot: Slot, part: Site, out: Tensor | None = None) -> Tensor:
        """See `Storage.read`."""
        stored = slot.stored(part)
        low = None if slot.carried is None else select(slot.carried, slot.site, part).view(stored.shape)
        values = torch.empty_like(stored, dtype=torch.float32) if out is None else out.view(stored.shape)
        backend_for(stored.device).read(stored, low, values)
        return values

    def write(self, slot: Slot, part: Site, values: Tensor) -> None:
        """See `Storage.write`."""
        stored = slot.stored(part)
        carried = select(self.low_bits(slot), slot.site, part).view(stored.shape)
        backend_for(stored.device).write(values.view(stored.shape), stored, carried)

    def low_bits(self, slot: Slot) -> Tensor:
        """The carried bits, zeros at first."""
        if slot.carried is None:
            slot.carried = torch.zeros(slot.tensor.shape, dtype=torch.int16, device=slot.tensor.device)
        return slot.carried


STORAGES: dict[str, type[Storage]] = {"carry": Carried, "plain": Plain, "stochastic": Stochastic}


# ----------------------------------------------------------------------------------------------------------------------
# Rounding


def _widen(stored: Tensor, out: Tensor | None) -> Tensor:
    return stored.to(torch.float32) if out is None else out.view(stored.shape).copy_(stored)


def _toward_zero(values: Tensor, dtype: torch.dtype) -> Tensor:
    near = values.to(dtype)
    too_far = near.to(torch.float32).abs() > values.abs()
    return torch.where(too_far, _step_bits(near, -1), near)


def _next_away(low: Tensor, values: Tensor) -> Tensor:
    signed_zero = torch.copysign(low, values.to(low.dtype))  # so that the step from zero goes the right way
    return _step_bits(signed_zero, 1)


def _step_bits(values: Tensor, by: int) -> Tensor:
    """The neighbouring 16-bit float farther from (by=1) or nearer to (by=-1) zero: magnitudes are ordered like their bits."""
    return (values.view(torch.int16) + by).view(values.dtype)
