"""What a back end does where it has no kernel of its own: the parts one after the other."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from zotune.kernels.contract import Addition, Term, Update
from zotune.kernels.halves import JOIN, SPLIT
from zotune.kernels.moments import piece_sums
from zotune.kernels.prepared import Prepared


class Unfused:
    """See `kernels.contract.Backend`, of which `update` and `perturb` are to be given."""

    update: Update
    perturb: Callable[..., None]

    def takes(self, terms: Sequence[Term]) -> bool:
        """See `Backend.takes`: noise alone."""
        return all(term.drawn for term in terms)

    def update_and_perturb(
        self, addition: Addition, outs: Sequence[tuple[Tensor, float]], terms: Sequence[Term]
    ) -> None:
        """See `Backend.update_and_perturb`."""
        addition.apply(self.update)
        self.perturb(outs, *addition.flat, terms)

    def prepared(self, stored: Tensor, carried: Tensor | None, site: int, outs: Sequence[Tensor]) -> Prepared:
        """See `Backend.prepared`."""
        return Prepared(self, stored, carried, site, outs)

    def read(self, stored: Tensor, carried: Tensor | None, out: Tensor) -> None:
        """See `Backend.read`."""
        out.copy_(stored)
        if carried is not None:
            JOIN[stored.dtype](out, stored, carried)

    def write(self, values: Tensor, stored: Tensor, carried: Tensor) -> None:
        """See `Backend.write`."""
        SPLIT[stored.dtype](values, stored, carried)

    def moments(self, values: Tensor, pivot: float) -> Tensor:
        """See `Backend.moments`."""
        return piece_sums(values, pivot)

    def adds_low_rank(self, dtype: torch.dtype) -> bool:
        """See `Backend.adds_low_rank`."""
        return False

    def add_low_rank(self, y: Tensor, x: Tensor, kept: Tensor, fresh: Tensor) -> None:
        """See `Backend.add_low_rank`."""
        inner = torch.mm(x.to(kept.dtype), kept.t()).view(len(fresh), -1, len(kept))
        y.add_(torch.bmm(inner, fresh).view(y.shape))
