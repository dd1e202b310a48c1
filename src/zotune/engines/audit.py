"""Which stored tensors does a forward pass really read?

A perturbation that the forward pass does not see makes both losses of a pair equal, and training stands still without a
word. So the first queries run under a dispatch mode that notes every operation whose input is a trained tensor's memory.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zotune.core.weights import Slot


class ReadAudit(TorchDispatchMode):
    """Notes the names of the sites whose stored memory is an input of any operation."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        super().__init__()
        self.names = {slot.tensor.untyped_storage().data_ptr(): slot.site.name for slot in slots}
        self.read: set[str] = set()
        self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the inputs, then do what was asked."""
        kwargs = kwargs or {}
        if not self._paused:
            for value in tree_iter((args, kwargs)):
                if isinstance(value, Tensor):
                    name = self.names.get(value.untyped_storage().data_ptr())
                    if name is not None:
                        self.read.add(name)
        return func(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what the engine itself reads."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before
