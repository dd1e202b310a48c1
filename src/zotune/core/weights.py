"""The trained tensors and how their full-precision values are kept.

fp32 and fp64 tensors hold their values themselves. An update is never simply added to fp16 or bf16 storage: of 1,000
updates of 1e-6 almost nothing arrives. By default the bits that do not fit are carried beside the tensor in 16 bits a
parameter, so that the stored tensor plus the carried bits is an fp32 number:

    bf16:  fp32 bits = stored bits * 2**16 + carried          exactly every fp32 number
    fp16:  value     = stored + carried * ulp(stored) / 2**16  every fp32 number above 2**-13, 2**-40 absolute below

"plain" (round to nearest) and "stochastic" (round up or down at random) keep nothing; they are here to be compared with.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from zotune.core.direction import Direction
from zotune.core.errors import ConfigError, ParameterError
from zotune.core.noise import CHUNK, stream
from zotune.core.site import Site
from zotune.core.workspace import workspace
from zotune.kernels.philox import words

LOW_PRECISION = (torch.bfloat16, torch.float16)
Change = Callable[[Tensor, Site], None]  # changes full-precision values of a part of a site in place


@dataclass
class Slot:
    """One trained tensor: where its values live."""

    site: Site
    tensor: Tensor
    storage: "Storage"
    carried: Tensor | None = None  # int16, same shape, once there is something to carry

    def stored(self, part: Site) -> Tensor:
        """The stored numbers of a part: a view for a run of elements, a copy for chosen rows."""
        return select(self.tensor, self.site, part)


def select(whole: Tensor, site: Site, part: Site) -> Tensor:
    """The part of a tensor that holds `site`: a flat view for a run, a copy for rows."""
    if part.rows is not None:
        return whole[part.rows]
    if part.count == site.count and not whole.is_contiguous():
        return whole
    offset = part.start - site.start
    return whole.view(-1)[offset : offset + part.count]


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
        first, last = part.start // 8, -(-(part.start + part.count) // 8)
        blocks = torch.arange(first, last, device=values.device)
        lanes = words(self._bits.key, part.id, blocks)
        bits = torch.stack((lanes & 0xFFFF, lanes >> 16), dim=2).view(-1)[part.start - first * 8 :][: part.count]
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
        values = _widen(stored, out)
        if slot.carried is not None:
            _JOIN[slot.tensor.dtype](values, stored, select(slot.carried, slot.site, part).view(stored.shape))
        return values

    def write(self, slot: Slot, part: Site, values: Tensor) -> None:
        """See `Storage.write`."""
        if slot.carried is None:
            slot.carried = torch.zeros(slot.tensor.shape, dtype=torch.int16, device=slot.tensor.device)
        stored = slot.stored(part)
        carried = select(slot.carried, slot.site, part).view(stored.shape)
        _SPLIT[slot.tensor.dtype](values.view(stored.shape), stored, carried)


STORAGES: dict[str, type[Storage]] = {"carry": Carried, "plain": Plain, "stochastic": Stochastic}


class Weights:
    """All trained tensors under their sites."""

    def __init__(self, named: Iterable[tuple[str, Tensor]], low_precision: str = "carry") -> None:
        if low_precision not in STORAGES:
            raise ConfigError(f"low_precision must be one of {', '.join(STORAGES)}; got {low_precision!r}.")
        exact, low = Exact(), STORAGES[low_precision]()
        self.low_precision = low
        self.slots: dict[str, Slot] = {}
        for name, tensor in named:
            site = Site(name, tuple(tensor.shape))
            if name in self.slots:
                raise ParameterError(f"Two trained tensors share the canonical name {name!r}; noise is keyed by names.")
            self.slots[name] = Slot(site, tensor, low if tensor.dtype in LOW_PRECISION else exact)
        if len({slot.site.id for slot in self.slots.values()}) != len(self.slots):
            raise ParameterError("Two names hash to the same 64 bits; rename one of the tensors.")
        _refuse_shared_memory(self.slots.values())
        self.by_tensor = {id(slot.tensor): slot for slot in self.slots.values()}

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots.values())

    @property
    def numel(self) -> int:
        """Trained numbers in all."""
        return sum(slot.tensor.numel() for slot in self)

    @property
    def devices(self) -> set[torch.device]:
        """Devices that hold trained tensors."""
        return {slot.tensor.device for slot in self}

    def extra_bytes(self) -> int:
        """Bytes that the low-order bits take beside the tensors."""
        return sum(slot.tensor.numel() * slot.storage.bytes_per_parameter for slot in self)

    def perturb(self, slot: Slot, part: Site, point: Direction, out: Tensor) -> None:
        """out = round(value + point) for a part of a site; `out` may be the stored tensor itself."""
        if isinstance(slot.storage, Exact):
            if out is not slot.tensor:
                out.copy_(slot.stored(part).view(out.shape))
            point.add_to(out, part)
            return
        pieces = part.chunks(CHUNK) if out.is_contiguous() and slot.tensor.is_contiguous() else [(0, part)]
        for offset, piece in pieces:
            values = slot.storage.read(slot, piece, _values(slot, piece))
            point.add_to(values, piece)
            target = out if piece is part else out.view(-1)[offset : offset + piece.count]
            target.copy_(values.view(target.shape))

    def perturb_many(self, slot: Slot, part: Site, points: Sequence[Direction], outs: Sequence[Tensor]) -> None:
        """outs[k] = round(value + points[k]), the same bits as `perturb` of each; none of them is the stored tensor."""
        for point, out in zip(points, outs, strict=True):
            self.perturb(slot, part, point, out)

    def update(self, slot: Slot, change: Change) -> None:
        """Apply a change to the full-precision values of one site."""
        if isinstance(slot.storage, Exact):
            change(slot.tensor, slot.site)
            return
        for _, piece in slot.site.chunks(CHUNK) if slot.tensor.is_contiguous() else [(0, slot.site)]:
            values = slot.storage.read(slot, piece, _values(slot, piece))
            change(values, piece)
            slot.storage.write(slot, piece, values)


def _refuse_shared_memory(slots: Iterable[Slot]) -> None:
    """Two sites in the same memory would be perturbed twice, and moved twice."""
    tensors = [(str(slot.tensor.device), slot.tensor, slot.site.name) for slot in slots]
    runs = sorted((device, t.data_ptr(), t.data_ptr() + t.nbytes, name) for device, t, name in tensors if t.nbytes)
    for (here, _, end, one), (there, start, _, other) in pairwise(runs):
        if here == there and start < end:
            raise ParameterError(
                f"The trained tensors {one!r} and {other!r} share memory, so one would be moved twice. Tie them by making "
                "them the same nn.Parameter (named_parameters() then lists it once), or train only one of them."
            )


# ----------------------------------------------------------------------------------------------------------------------
# Splitting fp32 numbers into a 16-bit float and 16 carried bits, and back.


def _values(slot: Slot, part: Site) -> Tensor:
    return workspace("values", part.numel, torch.float32, slot.tensor.device)


def _widen(stored: Tensor, out: Tensor | None) -> Tensor:
    return stored.to(torch.float32) if out is None else out.view(stored.shape).copy_(stored)


def _split_bf16(values: Tensor, stored: Tensor, carried: Tensor) -> None:
    bits = values.view(torch.int32)
    # The nearest bf16, halves away from zero: then what is left of the bits is their low half, as a signed number.
    high = workspace("bits", bits.numel(), torch.int32, bits.device).view(bits.shape)
    torch.add(bits, 0x8000, out=high).bitwise_right_shift_(16)
    stored.view(torch.int16).copy_(high)
    carried.copy_(bits)  # keeps the low 16 bits


def _join_bf16(values: Tensor, stored: Tensor, carried: Tensor) -> None:
    bits = workspace("bits", carried.numel(), torch.int32, carried.device).view(carried.shape)
    values.view(torch.int32).add_(bits.copy_(carried))


@lru_cache(maxsize=8)
def _fp16_units(device: torch.device) -> Tensor:
    """ulp / 2**16 of an fp16 number by its exponent field; the field 0 (subnormal) has the ulp of field 1."""
    exponent = torch.arange(32).clamp(min=1)
    return torch.ldexp(torch.ones(32), exponent - 25 - 16).to(device)


def _fp16_unit(stored: Tensor) -> Tensor:
    field = (stored.view(torch.int16).to(torch.int32) >> 10) & 31
    return _fp16_units(stored.device)[field]


def _split_fp16(values: Tensor, stored: Tensor, carried: Tensor) -> None:
    stored.copy_(values)
    rest = (values - stored.to(torch.float32)) / _fp16_unit(stored)  # exact: a power of two
    carried.copy_(rest.round().clamp(-32768, 32767))


def _join_fp16(values: Tensor, stored: Tensor, carried: Tensor) -> None:
    rest = carried.to(torch.float32) * _fp16_unit(stored)
    values.add_(rest.masked_fill_(carried == 0, -0.0))  # adding 0.0 would turn -0.0 into 0.0; -0.0 changes nothing


Halves = Callable[[Tensor, Tensor, Tensor], None]  # (values, stored, carried), all of one shape
_SPLIT: dict[torch.dtype, Halves] = {torch.bfloat16: _split_bf16, torch.float16: _split_fp16}  # writes the last two
_JOIN: dict[torch.dtype, Halves] = {torch.bfloat16: _join_bf16, torch.float16: _join_fp16}  # completes widened values


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
