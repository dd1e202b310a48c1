"""Hooks on every module, for calls of one thread.

torch's global hooks fire wherever any module runs. Another thread may run another model meanwhile (a reward, an evaluation),
and it must neither be looked at nor be mistaken for a part of the query.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils.hooks import RemovableHandle


class Hooks:
    """`enter` before each module that this thread runs, `leave` after it, until `remove`."""

    def __init__(
        self,
        enter: Callable[..., None],
        leave: Callable[..., None] | None = None,
        *,
        with_kwargs: bool = False,
        always: bool = False,
        elsewhere: Callable[..., None] | None = None,
    ) -> None:
        """`with_kwargs` and `always_call` as in torch, for `leave`; `elsewhere` is told of other threads' calls."""
        own = threading.get_ident()

        def here(hook: Callable[..., None], other: Callable[..., None] | None = None) -> Callable[..., None]:
            def fire(*given: Any) -> None:
                if torch.compiler.is_compiling() or threading.get_ident() == own:  # dynamo cannot trace the second
                    hook(*given)
                elif other is not None:
                    other(*given)

            return fire

        self._handles: list[RemovableHandle] = [register_module_forward_pre_hook(here(enter, elsewhere))]
        if leave is not None:
            self._handles.append(register_module_forward_hook(here(leave), with_kwargs=with_kwargs, always_call=always))

    def remove(self) -> None:
        """No more calls."""
        for handle in self._handles:
            handle.remove()
            _global_forward_hooks_with_kwargs.pop(handle.id, None)  # torch leaves it behind
        self._handles = []
