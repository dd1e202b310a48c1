"""A whole tensor that is written at displaced points into the same outs, query after query.

What a call must look at (kinds of memory, sizes, addresses) is looked at once: a model has hundreds of small tensors, and on
the CPU the looking costs as much as the noise of one of them.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zotune.kernels.contract import Addition, Term

Signs = Sequence[tuple[int, float]]  # (number of an out, sign)


class Prepared:
    """`Backend.perturb`, or `Backend.update_and_perturb`, of one tensor.

    Args:
        backend: whose (`kernels.contract.Backend`).
        stored: contiguous.
        carried: beside it, or None.
        site: 64-bit id.
        outs: like `stored`, and not it.
    """

    def __init__(self, backend: Any, stored: Tensor, carried: Tensor | None, site: int, outs: Sequence[Tensor]) -> None:
        self.backend, self.stored, self.carried, self.site, self.outs = backend, stored, carried, site, outs
        self._address, self._dtype = stored.data_ptr(), stored.dtype
        self._flat = [out.view(-1) for out in outs]

    def fits(self, backend: Any, stored: Tensor, carried: Tensor | None, outs: Sequence[Tensor]) -> bool:
        """Whether it is still the same memory that is meant."""
        return (
            self.outs is outs
            and self.carried is carried
            and self.stored is stored
            and self.backend is backend
            and self._address == stored.data_ptr()
            and self._dtype == stored.dtype
        )

    def __call__(self, terms: Sequence[Term], signs: Signs, update: Sequence[Term] = ()) -> None:
        """outs[k] = round(value + sign * terms) for each (k, sign), after an update of the value by other terms."""
        outs = [(self._flat[k], sign) for k, sign in signs]
        if update:
            self.backend.update_and_perturb(Addition(self.stored, self.carried, self.site, update), outs, terms)
        else:
            self.backend.perturb(outs, *Addition(self.stored, self.carried, self.site, ()).flat, terms)
