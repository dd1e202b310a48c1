"""Sites: the trainable tensors, under names that do not change when a wrapper is put around the model."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import prod

from torch import Tensor

from zotune.kernels.contract import Run

# Wrappers put these components into a parameter's name; they say nothing about the tensor.
_WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
# PEFT puts the adapter's name ("default") right behind these components: modules, and parameters (then it ends the name).
_ADAPTER_MODULES = frozenset({"lora_A", "lora_B", "lora_magnitude_vector", "prompt_encoder", "modules_to_save"})
_ADAPTER_PARAMETERS = frozenset({"lora_embedding_A", "lora_embedding_B", "ia3_l", "vera_lambda_b", "vera_lambda_d"})
_PEFT_PREFIX = ["base_model", "model"]


def canonical_name(name: str) -> str:
    """The tensor's name without wrappers, PEFT's prefix and the adapter's name.

    >>> canonical_name("_orig_mod.base_model.model.model.layers.0.q_proj.lora_A.default.weight")
    'model.layers.0.q_proj.lora_A.weight'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if parts[:2] == _PEFT_PREFIX:
        parts = parts[2:]
    kept: list[str] = []
    for number, part in enumerate(parts, start=1):
        behind = parts[number - 2] if number > 1 else ""
        if behind in _ADAPTER_PARAMETERS or (behind in _ADAPTER_MODULES and number < len(parts)):
            continue
        kept.append(part)
    return ".".join(kept) or name


@lru_cache(maxsize=65536)
def site_id(name: str) -> int:
    """64 bits that stand for a canonical name in the noise's counter."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Site:
    """One trainable tensor, or the part of it that is meant.

    A part is a run of elements (`start`, `count`, in row-major order of the whole tensor: this process's slice, or a
    chunk being worked on), or a choice of `rows` along the first dimension (the embedding rows a batch uses).
    Noise depends on `name` and on element numbers in the whole tensor alone, so parts agree with the whole.
    """

    name: str  # canonical
    shape: tuple[int, ...]  # of the whole tensor
    start: int = 0
    count: int = -1  # -1: to the end
    rows: Tensor | None = None  # (k,) int64; then start and count are not used

    def __post_init__(self) -> None:
        """Fill in the count of a site that is given without one."""
        if self.count < 0:
            object.__setattr__(self, "count", prod(self.shape) - self.start)

    @cached_property
    def id(self) -> int:
        """64 bits that stand for the name."""
        return site_id(self.name)

    @cached_property
    def width(self) -> int:
        """Elements in one row (one index of the first dimension)."""
        return prod(self.shape[1:])

    @cached_property
    def run(self) -> Run:
        """The elements meant, as the kernels are told."""
        return Run(self.id, self.start, self.count, self.rows, self.width)

    @property
    def numel(self) -> int:
        """Elements meant."""
        return self.count if self.rows is None else self.rows.numel() * self.width

    def part(self, start: int, count: int) -> "Site":
        """The elements start ... start + count - 1 of a site that is a run."""
        return replace(self, start=self.start + start, count=count)

    def row_range(self, first: int, last: int) -> "Site":
        """Rows first ... last - 1 of a whole site."""
        return self.part(first * self.width, (last - first) * self.width)

    def take(self, rows: Tensor) -> "Site":
        """The chosen rows of a whole site, in the given order."""
        return replace(self, rows=rows)

    def chunks(self, limit: int) -> Iterator[tuple[int, "Site"]]:
        """Runs of at most `limit` elements (whole rows where a row fits), with their offset into this site."""
        if self.rows is not None or self.count <= limit:
            yield 0, self
            return
        size = limit - limit % self.width if self.width <= limit else limit
        for offset in range(0, self.count, size):
            yield offset, self.part(offset, min(size, self.count - offset))
