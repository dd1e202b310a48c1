"""Rewards: a user's function of a generated text and its row, found by name and checked at every call."""

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import numpy as np
from torch import Tensor

from zotune.errors import ConfigError, DataError
from zotune.tasks.importing import find_object
from zotune.tasks.task import Row, Task

Reward = Callable[[str, Row], float]
"""A user's score of a generated text and its row: larger is better."""


def find_reward(task: Task, function: str | Reward | None = None) -> Reward:
    """The function given (itself, or ``module:function``), else the task's own.

    Raises:
        ConfigError: there is none, or it cannot be called with a text and a row.
    """
    found = find_object(function, "the reward") if isinstance(function, str) else function or task.reward
    if found is None:
        raise ConfigError(
            f"task {task.name!r} has no reward of its own; name a function of (text, row) as module:function or "
            "path/to/file.py:function."
        )
    if not callable(found):
        raise ConfigError(f"the reward {function!r} is a {type(found).__name__}; a function of (text, row) is needed.")
    try:
        inspect.signature(found).bind("", {})
    except TypeError as error:
        raise ConfigError(f"the reward {function!r} cannot be called with (text, row): {error}.") from error
    except ValueError:  # a function of C says nothing of its arguments
        pass
    return found


def reward_of(function: Reward, text: str, row: Row | None) -> float:
    """What a reward says of a text.

    Raises:
        DataError: not one finite number.
    """
    value: Any = function(text, row or {})
    number = value.item() if isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1 else value
    if not isinstance(number, Real) or not math.isfinite(number):
        raise DataError(f"the reward of {text[:60]!r} is {value!r}; a finite number is needed.")
    return float(number)
