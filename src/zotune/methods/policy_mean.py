"""A vector that a method learns, one number per parameter: in full, in bf16, or in 8 bits with a scale per block.

What is learned in one step is far smaller than what has been learned so far: rounding to nearest would lose nearly all of
it. So the short forms round up or down at random, with the probability that makes the mean right; the random bits are a
function of the stream, the site's name and the element, as all noise here.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from zotune.core.context import Context
from zotune.core.direction import Direction, Scalar, given
from zotune.core.noise import CHUNK, Stream, lanes
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.kernels.contract import Term
from zotune.kernels.workspace import workspace

BLOCK = 64  # numbers that share a scale in 8 bits


class Form(ABC):
    """How the numbers of one tensor are kept."""

    rounds: ClassVar[bool] = True  # whether `write` needs random bits

    def __init__(self, kept: dict[str, Tensor]) -> None:
        self.kept = kept

    @classmethod
    @abstractmethod
    def zeros(cls, numel: int, like: Tensor) -> "Form":
        """As many zeros, on the device of the weights `like`."""

    @staticmethod
    @abstractmethod
    def bytes(numel: int) -> int:
        """Bytes of as many numbers."""

    @abstractmethod
    def read(self, start: int, count: int) -> Tensor:
        """A run of the numbers in full precision: (count,), not to be written to."""

    @abstractmethod
    def write(self, start: int, values: Tensor, bits: Tensor | None) -> None:
        """Keep a run of numbers that starts at a multiple of CHUNK; `bits`: a random integer in [0, 2**16) for each."""


class Full(Form):
    """fp32; fp64 where the weights are."""

    rounds: ClassVar[bool] = False

    @classmethod
    def zeros(cls, numel: int, like: Tensor) -> "Full":
        """See `Form.zeros`."""
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        return cls({"values": torch.zeros(numel, dtype=dtype, device=like.device)})

    @staticmethod
    def bytes(numel: int) -> int:
        """See `Form.bytes`."""
        return 4 * numel

    def read(self, start: int, count: int) -> Tensor:
        """See `Form.read`."""
        return self.kept["values"][start : start + count]

    def write(self, start: int, values: Tensor, bits: Tensor | None) -> None:
        """See `Form.write`."""
        self.kept["values"][start : start + values.numel()] = values


class Bfloat16(Form):
    """The upper half of fp32's bits, rounded up with the probability that the lower half stands for: exactly unbiased."""

    @classmethod
    def zeros(cls, numel: int, like: Tensor) -> "Bfloat16":
        """See `Form.zeros`."""
        return cls({"values": torch.zeros(numel, dtype=torch.bfloat16, device=like.device)})

    @staticmethod
    def bytes(numel: int) -> int:
        """See `Form.bytes`."""
        return 2 * numel

    def read(self, start: int, count: int) -> Tensor:
        """See `Form.read`."""
        return self.kept["values"][start : start + count].to(torch.float32)

    def write(self, start: int, values: Tensor, bits: Tensor | None) -> None:
        """See `Form.write`."""
        assert bits is not None
        raised = values.view(torch.int32) + bits.to(torch.int32)
        self.kept["values"][start : start + values.numel()] = (raised & -0x10000).view(torch.float32)


class Int8(Form):
    """q * scale with q in -127 ... 127 and the scale, an fp32 number, of the largest of each block."""

    @classmethod
    def zeros(cls, numel: int, like: Tensor) -> "Int8":
        """See `Form.zeros`."""
        blocks = -(-numel // BLOCK)
        q = torch.zeros(blocks, BLOCK, dtype=torch.int8, device=like.device)
        return cls({"q": q, "scale": torch.zeros(blocks, 1, device=like.device)})

    @staticmethod
    def bytes(numel: int) -> int:
        """See `Form.bytes`; the last block is kept whole."""
        return -(-numel // BLOCK) * (BLOCK + 4)

    def read(self, start: int, count: int) -> Tensor:
        """See `Form.read`."""
        first, last = start // BLOCK, -(-(start + count) // BLOCK)
        values = self.kept["q"][first:last].to(torch.float32) * self.kept["scale"][first:last]
        return values.view(-1)[start - first * BLOCK :][:count]

    def write(self, start: int, values: Tensor, bits: Tensor | None) -> None:
        """See `Form.write`."""
        assert bits is not None
        first, blocks, rest = start // BLOCK, -(-values.numel() // BLOCK), -values.numel() % BLOCK
        whole = torch.nn.functional.pad(values, (0, rest)).view(blocks, BLOCK)
        scale = whole.abs().amax(dim=1, keepdim=True) / 127
        up = torch.nn.functional.pad((bits.to(torch.float32) + 0.5) / 65536, (0, rest)).view(blocks, BLOCK)
        q = (whole / scale.where(scale > 0, torch.ones_like(scale)) + up).floor_().clamp_(-127, 127)
        self.kept["q"][first : first + blocks] = q.to(torch.int8)
        self.kept["scale"][first : first + blocks] = scale


FORMS: dict[str, type[Form]] = {"fp32": Full, "bf16": Bfloat16, "int8": Int8}


class PolicyMean(Direction):
    """A learned vector over all sites. It starts at zero and is allocated by `place`."""

    def __init__(self, form: str) -> None:
        self.form = form
        self._kept: dict[str, Form] = {}
        self._sites: dict[str, Site] = {}

    def place(self, ctx: Context) -> None:
        """Allocate the vector beside the weights, or bring a loaded one to them. Done once."""
        if self._sites:
            return
        if missing := [site.name for site in ctx.sites if self._kept and site.name not in self._kept]:
            raise ConfigError(f"The loaded mean has nothing for {missing[:3]}: it belongs to other trained tensors.")
        for site in ctx.sites:
            weight = ctx.weight(site)
            made = FORMS[self.form].zeros(site.numel, weight)
            if loaded := self._kept.get(site.name):
                made.kept = {key: value.to(weight.device) for key, value in loaded.kept.items()}
            self._kept[site.name] = made
        self._sites = {site.name: site for site in ctx.sites}

    def add_to(self, out: Tensor, site: Site, scale: Scalar = 1.0) -> None:
        """See `Direction.add_to`."""
        form = self._kept[site.name]
        if site.rows is not None:
            for row, number in zip(out.view(-1, site.width), site.rows.tolist(), strict=True):
                row.add_(form.read(number * site.width, site.width).to(out.device, out.dtype) * scale)
        elif out.is_contiguous():
            flat = out.view(-1)
            for offset, part in site.chunks(CHUNK):
                values = form.read(part.start, part.count).to(out.device, out.dtype)
                flat[offset : offset + part.count].add_(values * scale)
        else:
            out.add_((form.read(site.start, site.count).to(out.device, out.dtype) * scale).view(out.shape))

    def term(self, site: Site, scale: Scalar) -> Term | None:
        """See `Direction.term`: where the numbers are kept one by one."""
        values = self._kept[site.name].kept.get("values")
        return None if values is None else given(values, site, scale)

    def move(self, change: Direction, keep: float, source: Stream) -> None:
        """mean <- keep * mean + change, on the sites that the change touches. `source`: the bits of the rounding."""
        for site in self._sites.values():
            if not change.touches(site):
                continue
            form = self._kept[site.name]
            if keep == 1.0 and isinstance(form, Full):
                change.add_to(form.kept["values"], site)
                continue
            for start in range(0, site.numel, CHUNK):
                part = site.part(start, min(CHUNK, site.numel - start))
                old = form.read(part.start, part.count)
                values = workspace("policy mean", part.count, old.dtype, old.device).copy_(old).mul_(keep)
                change.add_to(values, part)
                bits = lanes(source, part, old.device) if form.rounds else None
                form.write(part.start, values, bits)

    def device_of(self, site: Site) -> torch.device:
        """Where the site's part of the vector lies."""
        return next(tensor.device for tensor in self._kept[site.name].kept.values())

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """Bytes kept for these sites."""
        return sum(FORMS[self.form].bytes(site.numel) for site in sites)

    def state_dict(self) -> dict[str, Any]:
        """The form and its tensors, by site."""
        return {"form": self.form, "tensors": {name: dict(form.kept) for name, form in self._kept.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copy what `state_dict` returned."""
        if state["form"] != self.form:
            raise ConfigError(
                f"The saved mean is kept in {state['form']!r}; the method was made with mean={self.form!r}."
            )
        made = FORMS[self.form]
        self._kept = {n: made({k: t.detach().clone() for k, t in kept.items()}) for n, kept in state["tensors"].items()}
        self._sites = {}
