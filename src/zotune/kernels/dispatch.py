"""Which back end makes the noise on a device, and why.

CPU: the compiled kernels where the installation built them, else pure torch. CUDA: Triton where it is installed, else pure
torch. Anything else: pure torch. All give the same bits. ZOTUNE_KERNELS=native or reference forces one of the first two.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

from zotune.errors import KernelError
from zotune.kernels.contract import Backend, Run, Term
from zotune.kernels.native import MissingError, NativeBackend, compiled_file, load
from zotune.kernels.reference import ReferenceBackend

VARIABLE = "ZOTUNE_KERNELS"
FORCED = ("native", "reference")


@dataclass(frozen=True)
class Choice:
    """A back end and why it is the one."""

    backend: Backend
    reason: str


def backend_for(device: torch.device) -> Backend:
    """The back end of a device."""
    return choice_for(device.type).backend


def choice_for(kind: str) -> Choice:
    """The back end of a kind of device ("cpu", "cuda", ...) and why; made once a process.

    Raises:
        KernelError: ZOTUNE_KERNELS names no back end, or one that is not there.
    """
    return _by_hand.get(kind) or _choose(kind)


@lru_cache(maxsize=8)
def _choose(kind: str) -> Choice:
    wanted = os.environ.get(VARIABLE, "")
    if wanted and wanted not in FORCED:
        raise KernelError(f"{VARIABLE} must be one of {', '.join(FORCED)}, or not set; got {wanted!r}.")
    if wanted == "reference":
        return Choice(ReferenceBackend(), f"pure torch and numpy: {VARIABLE}=reference asks for it")
    return CHOICES.get(kind, _other)(wanted == "native")


def _cpu(forced: bool) -> Choice:
    try:
        backend = NativeBackend(load(compiled_file()))
        check(backend)
    except MissingError as error:
        if forced:
            raise KernelError(f"{VARIABLE}=native asks for the compiled kernels, but {error}.") from error
        return Choice(ReferenceBackend(), f"pure torch and numpy, several times slower than compiled kernels: {error}")
    why = f"{VARIABLE}=native asks for them" if forced else "compiled when zotune was installed"
    return Choice(backend, f"compiled kernels ({why}); {backend.level()} instructions; {backend.runtime.reason}")


def _cuda(forced: bool) -> Choice:
    if find_spec("triton") is None:
        return Choice(ReferenceBackend(), "pure torch: triton is not installed")
    try:
        from zotune.kernels.triton_many import Triton  # noqa: PLC0415 - imports triton
    except ImportError as error:
        return Choice(ReferenceBackend(), f"pure torch: triton does not load ({error})")
    return Choice(Triton(), "Triton kernels")


def _other(forced: bool) -> Choice:
    return Choice(ReferenceBackend(), "pure torch: there are no kernels for this kind of device")


CHOICES: dict[str, Callable[[bool], Choice]] = {"cpu": _cpu, "cuda": _cuda}


def check(backend: NativeBackend) -> None:
    """A library that was built with other arithmetic than it asks for must not be used: compare it with the reference.

    Raises:
        MissingError: it gives other bits.
    """
    terms = [Term((1, 2), "normal", 0.1), Term((3, 4), "rademacher", 1e-3)]
    run, start = Run(5 << 40, 77, 1 << 14), torch.linspace(-1.0, 1.0, 1 << 14)
    ours, reference = start.clone(), start.clone()
    backend.add(ours, run, terms)
    ReferenceBackend().add(reference, run, terms)
    if not torch.equal(ours, reference):
        raise MissingError("the compiled kernels round otherwise than they must. Was zotune built with -ffast-math?")


_by_hand: dict[str, Choice] = {}


@contextmanager
def using(backend: Backend, kind: str = "cpu") -> Iterator[None]:
    """Use this back end on a kind of device inside the block, in all threads: for tests and benchmarks."""
    before = dict(_by_hand)
    _by_hand[kind] = Choice(backend, "put in by hand")
    try:
        yield
    finally:
        _by_hand.clear()
        _by_hand.update(before)
