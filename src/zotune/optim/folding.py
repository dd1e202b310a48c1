"""Folding: when the moves of steps are written into the weights, and what counts as the weights until then.

Moves of low-rank steps add up as factors beside the weights. A dense move is written by the query that reads the tensor
next (`Weights.update_all`), which saves a pass over memory and changes no bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from zotune.core.direction import Direction
from zotune.core.pending import Move, Pending, moves_of
from zotune.core.site import Site
from zotune.core.weights import Weights
from zotune.errors import ClosureError
from zotune.kernels.contract import Mask, Term

Trial = Callable[[Direction, dict[str, Any]], Direction]  # where a rule would move a parameter group


class Folding:
    """Pending moves of an optimizer, folded into its weights in every `every`-th step; 0: nothing is ever pending."""

    def __init__(self, weights: Weights, every: int, low_rank: bool) -> None:
        self.weights = weights
        self.every = every
        self.low_rank = low_rank  # whether the method's moves are; else they are late
        self.pending = Pending()
        self._inside = False  # of `folded`

    @property
    def late(self) -> bool:
        """Whether a step's move is written by the query that reads the tensor next."""
        return self.every > 0 and not self.low_rank

    def check(self) -> None:
        """Weights that are about to be put back cannot be trained."""
        if self._inside:
            raise ClosureError(
                "A step inside folded() would be lost: its weights are put back at the end of the block."
            )

    def displaced(self, points: Sequence[Direction], sites: Sequence[Site]) -> list[Direction]:
        """Points around the weights that count, as displacements from the stored ones."""
        return self.pending.displaced(points, sites)

    def weight(self, site: Site) -> Tensor:
        """Full-precision values that count, flat: stored, and what is pending."""
        slot = self.weights.slots[site.name]
        self.weights.settle([slot])
        if slot.tensor.is_contiguous():
            values = slot.storage.read(slot, site)
        else:  # whose parts are no runs of memory
            first = site.start - slot.site.start
            values = slot.storage.read(slot, slot.site).reshape(-1)[first : first + site.count]
        if self.pending:
            self.pending.direction().add_to(values, site)
        return values

    def take(
        self, direction: Direction, trial: Trial, groups: Sequence[dict[str, Any]], seed: int, step: int
    ) -> set[str]:
        """Keep the low-rank part of a step's move. Returns the names of the tensors whose move that is.

        A move that shares no factor with what is pending on its tensors is the beginning of a new interval: then what is
        pending is folded first.
        """
        moves: list[Move] = []
        names: set[str] = set()
        for group in groups:
            sites = [self.weights.by_tensor[id(parameter)].site for parameter in group["params"]]
            made, inside = moves_of(trial(direction, group), sites)
            moves += [move for move in made if bool(move.coefficients.any())]
            names |= inside
        if not self.pending.fits(moves):
            self.fold(seed, step)
        self.pending.absorb(moves)
        if self.pending and self.pending.is_full():
            self.fold(seed, step)
        return names

    def is_due(self, step: int) -> bool:
        """Whether the weights are folded after `step` steps: a function of that number alone."""
        return self.every > 0 and step % self.every == 0

    def fold(self, seed: int, step: int) -> None:
        """Write what is pending into the weights, with one rounding of each number's sum."""
        self.weights.settle()
        if self.pending:
            self.weights.low_precision.begin(seed, -1 - step)  # other random bits than the step's own update has
            self.pending.write(self.weights)
            self.pending.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """What has not been written yet: tensors, numbers and strings."""
        late: dict[tuple[Term, ...], list[str]] = {}
        for slot in self.weights:
            if slot.late:
                late.setdefault(slot.late, []).append(slot.site.name)
        written = [{"names": names, "late": [_written(term) for term in terms]} for terms, names in late.items()]
        return [*self.pending.state_dict(), *written]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Take up what `state_dict` returned, and forget what was waiting before."""
        self.pending.load_state_dict([saved for saved in state if "late" not in saved])
        for slot in self.weights:
            slot.late = ()
        for saved in state:
            for name in saved["names"] if "late" in saved else ():
                self.weights.slots[name].late = tuple(_read(*written) for written in saved["late"])

    @contextmanager
    def folded(self, seed: int, step: int) -> Iterator[None]:
        """Folded inside the block; afterwards everything has its own bits again (what was late is written, as it will be)."""
        with torch.no_grad():
            self.weights.settle()
        if not self.pending:
            yield
            return
        slots = [self.weights.slots[name] for name in self.pending.names]
        saved = [
            (slot, slot.tensor.detach().clone(), None if slot.carried is None else slot.carried.clone())
            for slot in slots
        ]
        pending, self.pending, self._inside = self.pending, Pending(), True
        try:
            with torch.no_grad():
                self.weights.low_precision.begin(seed, -1 - step)
                pending.write(self.weights)
            yield
        finally:
            for slot, tensor, carried in saved:
                slot.tensor.detach().copy_(tensor)
                if carried is None:
                    slot.carried = None
                elif slot.carried is not None:
                    slot.carried.copy_(carried)
            self.pending, self._inside = pending, False


def _written(term: Term) -> list[Any]:
    """All of a term of noise, and nothing else is ever late: no tensor has to be kept."""
    mask = [] if term.mask is None else [*term.mask.key, term.mask.limit]
    return [*term.key, term.book, float(term.scale), *mask]


def _read(a: int, b: int, book: str, scale: float, *mask: int) -> Term:
    return Term((a, b), book, scale, Mask((mask[0], mask[1]), mask[2]) if mask else None)
