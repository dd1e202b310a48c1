"""Which stored tensors does a forward pass really read?

A perturbation that the forward pass does not see makes both losses of a pair equal, and training stands still without a
word. So the first queries run under a dispatch mode that notes every operation whose input is a trained tensor's memory.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zotune.core.weights import Slot


def memory_of(tensor: Tensor) -> int | None:
    """The address of a tensor's memory, which its views share; None for what has none (sparse, torch.func's)."""
    if tensor.layout is not torch.strided:
        return None
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):
        return None


class ReadAudit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of the sites whose stored memory is an input of any operation."""

    def __init__(self, slots: Iterable[Slot]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: dict[int | None, set[str]] = {}  # one storage may hold several tensors, as of an LSTM on CUDA
        for slot in slots:
            self.names.setdefault(memory_of(slot.tensor), set()).add(slot.site.name)
        self.read: set[str] = set()
        self._paused = False
        self._eager: Any = None

    def __enter__(self) -> "ReadAudit":
        # A compiled model runs uncompiled here. What compiled code reads is not seen; and dynamo, which cannot work under a
        # dispatch mode, would mark the code that it meets as never to be compiled, for good and without a word.
        self._eager = torch.compiler.set_stance("force_eager")
        self._eager.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._eager.__exit__(*exception)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the inputs, then do what was asked."""
        kwargs = kwargs or {}
        if not self._paused:
            for value in (*args, *kwargs.values()):
                if isinstance(value, Tensor):
                    self._note(value)
                elif isinstance(value, list | tuple | dict):
                    for inner in tree_iter(value):
                        if isinstance(inner, Tensor):
                            self._note(inner)
        return func(*args, **kwargs)

    def _note(self, tensor: Tensor) -> None:
        self.read |= self.names.get(memory_of(tensor), set())

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count what the engine itself reads."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before
