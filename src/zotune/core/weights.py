"""The trained tensors: what is evaluated near them, and how an update reaches them. `core.storage` keeps their values.

Directions that the device's kernels take (table noise; on the CPU also through masks, stored numbers and thin factors) are
made, added and rounded in one pass over memory; any other is added to full-precision values a chunk at a time, which gives
the same bits.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter

from zotune.core.direction import Direction, kernel_terms
from zotune.core.grouping import Draws
from zotune.core.noise import CHUNK, run_of
from zotune.core.site import Site
from zotune.core.storage import LOW_PRECISION, STORAGES, Carried, Exact, Slot, Stochastic, select
from zotune.errors import ConfigError, ParameterError
from zotune.kernels.contract import Addition, Term
from zotune.kernels.dispatch import backend_for
from zotune.kernels.prepared import Prepared
from zotune.kernels.workspace import workspace

__all__ = ["LOW_PRECISION", "STORAGES", "Carried", "Change", "Slot", "Stochastic", "Weights"]

Change = Callable[[Tensor, Site], None]  # changes full-precision values of a part of a site in place
PLAIN_MEMORY = (Tensor, Parameter)  # subclasses may keep their numbers elsewhere


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
        self._draws = Draws()
        self._begun: Slot | None = None  # a tensor that is being read in pieces, which get its late update

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

    def check_kinds(self) -> None:
        """Raise a ParameterError if a tensor was converted or moved: what is kept beside it goes with its dtype and device."""
        for slot in self:
            was: tuple[object, ...] = (slot.dtype, None if slot.carried is None else slot.carried.device)
            now = (slot.tensor.dtype, None if slot.carried is None else slot.tensor.device)
            if was != now:
                raise ParameterError(
                    f"{slot.site.name!r} was {_kind(was)} when ZO was made, and is {_kind(now)}. Convert and move the model "
                    "first, then make ZO: what it keeps beside each tensor goes with dtype and device."
                )

    def extra_bytes(self) -> int:
        """Bytes that the low-order bits take beside the tensors."""
        return sum(slot.tensor.numel() * slot.storage.bytes_per_parameter for slot in self)

    def perturb(self, slot: Slot, part: Site, point: Direction, out: Tensor) -> None:
        """out = round(value + point) for a part of a site; `out` may be the stored tensor itself."""
        terms = kernel_terms(point, part, slot.tensor.device) if _dense(slot, [out]) else None
        if terms:
            self._in_one_pass(slot, part, terms, [(out, 1.0)])
            return
        self.settle([slot])
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
        rest: Sequence[int] = range(len(points))
        if part is slot.site and (prepared := _prepared(slot, outs)) is not None:
            draws, rest = self._draws.of(points, part, slot.tensor.device)
            if slot.reached:
                self.settle([slot])
            for terms, signs in draws:
                late, slot.late = slot.late, ()
                prepared(terms, signs, late)
        elif _dense(slot, outs):
            draws, rest = self._draws.of(points, part, slot.tensor.device)
            for terms, signs in draws:
                self._in_one_pass(slot, part, terms, [(outs[k], sign) for k, sign in signs])
        for k in rest:
            self.perturb(slot, part, points[k], outs[k])

    def update_all(self, moves: Iterable[tuple[Slot, Change, Direction | None]], late: bool = False) -> None:
        """`update` of many tensors: those that move along table noise together, in one call or launch.

        With `late` these are written by whatever reads them next through this object, in the same pass over memory, or by
        `settle`; until then the stored tensors lag behind. The bits are the same.
        """
        together: dict[torch.device, list[Addition]] = {}
        moves = list(moves)
        self.settle(slot for slot, _, _ in moves)
        for slot, change, along in moves:
            if (addition := _as_addition(slot, along)) is None:
                self.update(slot, change)
            elif late and all(term.replayed for term in addition.terms):  # a learned vector may move before then
                slot.late = tuple(addition.terms)
            else:
                together.setdefault(slot.tensor.device, []).append(addition)
        for device, additions in together.items():
            backend_for(device).update_many(additions)

    def settle(self, slots: Iterable[Slot] | None = None) -> None:
        """Write the updates that are late, of all tensors or of some: before anything reads the tensors themselves."""
        late: dict[torch.device, list[Addition]] = {}
        whole = []
        for slot in self if slots is None else slots:
            if slot.reached:
                rest = slot.site.part(slot.reached, slot.site.count - slot.reached)
                _addition(slot, slot.late, rest).apply(backend_for(slot.tensor.device).update)
                slot.late, slot.reached = (), 0
            elif slot.late:
                late.setdefault(slot.tensor.device, []).append(_addition(slot, slot.late))
                whole.append(slot)
        self._begun = None
        for device, additions in late.items():
            backend_for(device).update_many(additions)
        for slot in whole:  # not before it is written: nothing is lost by an error
            slot.late = ()

    def finish(self) -> None:
        """After a query that may have ended early: no tensor has got its late update in part."""
        if self._begun is not None:
            self.settle([self._begun])

    def update(self, slot: Slot, change: Change, along: Direction | None = None) -> None:
        """Apply a change to the full-precision values of one site.

        Args:
            slot: the tensor.
            change: changes the values of a part in place.
            along: if all that `change` does is to add this direction, then it may be added in one pass instead.
        """
        self.settle([slot])
        if (addition := _as_addition(slot, along)) is not None:
            addition.apply(backend_for(slot.tensor.device).update)
            return
        if isinstance(slot.storage, Exact):
            change(slot.tensor, slot.site)
            return
        for _, piece in slot.site.chunks(CHUNK) if slot.tensor.is_contiguous() else [(0, slot.site)]:
            values = slot.storage.read(slot, piece, _values(slot, piece))
            change(values, piece)
            slot.storage.write(slot, piece, values)

    # ------------------------------------------------------------------------------------------------------------------

    def _in_one_pass(
        self, slot: Slot, part: Site, terms: tuple[Term, ...], outs: Sequence[tuple[Tensor, float]]
    ) -> None:
        """out = round(value + sign * terms) for each (out, sign)."""
        backend, flat = backend_for(slot.tensor.device), [(_flat(out), sign) for out, sign in outs]
        run = run_of(part, slot.tensor.device)
        if slot.late and part.rows is not None and not slot.reached:
            moved = _addition(slot, slot.late, part)  # copies of the rows, and of their carried bits
            backend.update(_flat(moved.stored), _low(moved), run, slot.late)
            backend.perturb(flat, _flat(moved.stored), _low(moved), run, terms)
            return
        if slot.late and part.rows is None and part.start == slot.reached:
            backend.update_and_perturb(_addition(slot, slot.late, part), flat, terms)
            self._advance(slot, part.count)
            return
        if slot.late:
            self.settle([slot])
        carried = slot.carried if isinstance(slot.storage, Carried) else None
        low = None if carried is None else _flat(select(carried, slot.site, part))
        backend.perturb(flat, _flat(slot.stored(part)), low, run, terms)

    def _advance(self, slot: Slot, count: int) -> None:
        """So many elements more have got the late update."""
        slot.reached += count
        self._begun = slot
        if slot.reached == slot.site.count:
            slot.late, slot.reached, self._begun = (), 0, None


def _kind(kind: tuple[object, ...]) -> str:
    return " on ".join(str(part) for part in kind if part is not None)


def _as_addition(slot: Slot, along: Direction | None) -> Addition | None:
    """What the kernels need to know to add a direction; None if they cannot."""
    if along is None or not isinstance(slot.storage, (Carried, Exact)) or not _dense(slot, []):
        return None
    terms = kernel_terms(along, slot.site, slot.tensor.device)
    return _addition(slot, terms) if terms else None


def _addition(slot: Slot, terms: tuple[Term, ...], part: Site | None = None) -> Addition:
    """Of the whole tensor, or of a part: of the tensor's own memory if that is a run, of copies of chosen rows."""
    low = slot.storage.low_bits(slot) if isinstance(slot.storage, Carried) else None
    if part is None or part is slot.site:
        return Addition(slot.tensor, low, slot.site.id, terms)
    carried = None if low is None else select(low, slot.site, part)
    return Addition(slot.stored(part), carried, slot.site.id, terms, part.start)


def _low(addition: Addition) -> Tensor | None:
    return None if addition.carried is None else _flat(addition.carried)


def _dense(slot: Slot, outs: Sequence[Tensor]) -> bool:
    """Whether the kernels can read parts of a tensor and write the outs: plain memory in row-major order."""
    whole = slot.tensor
    if type(whole) not in PLAIN_MEMORY or not whole.is_contiguous() or whole.numel() != slot.site.count:
        return False
    return all(out.dtype == whole.dtype and out.device == whole.device and out.is_contiguous() for out in outs)


def _prepared(slot: Slot, outs: Sequence[Tensor]) -> Prepared | None:
    """What writes the whole tensor into these outs; made anew unless it was asked for the same tuple before.

    On the CPU, where looking costs as much as writing; elsewhere it would hold memory of the device.
    """
    backend, whole = backend_for(slot.tensor.device), slot.tensor
    if not whole.is_cpu:
        return None
    low = slot.carried if isinstance(slot.storage, Carried) else None
    if slot.prepared is not None and slot.prepared.fits(backend, whole, low, outs):
        return slot.prepared
    slot.prepared = None
    if type(outs) is tuple and outs and _dense(slot, outs):
        slot.prepared = backend.prepared(whole, low, slot.site.id, outs)
    return slot.prepared


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 1 else tensor.reshape(-1)


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


def _values(slot: Slot, part: Site) -> Tensor:
    return workspace("values", part.numel, torch.float32, slot.tensor.device)
