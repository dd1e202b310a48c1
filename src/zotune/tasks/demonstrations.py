"""In-context learning: solved examples before the question, a blank line between them, as MeZO does.

A demonstration is its prompt and right option without outer spaces and line breaks. Too long a text loses tokens at its
left end when it is encoded: the first demonstrations go, and the question stays.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from zotune.errors import ConfigError, DataError
from zotune.tasks.task import Example

DEMONSTRATIONS = 32
SEPARATOR = "\n\n"


def with_demonstrations(
    examples: Sequence[Example], pool: Sequence[Example], *, count: int = DEMONSTRATIONS, seed: int | None
) -> list[Example]:
    """Put solved examples of ``pool`` before each question.

    Args:
        examples: the questions.
        pool: training examples, none of them a question.
        count: demonstrations before each.
        seed: draws one set for all questions; None draws a set for each, by its number.

    Raises:
        ConfigError: count is not positive.
        DataError: the pool has fewer than ``count`` examples.
    """
    if count < 1:
        raise ConfigError(f"the number of demonstrations must be at least 1, got {count}.")
    if len(pool) < count:
        raise DataError(f"there are {len(pool)} training examples to show and {count} are asked for; ask for fewer.")
    texts = [(example.prompt + example.options[example.label]).strip() for example in pool]

    def shown(number: int) -> str:
        draw = np.random.default_rng([number] if seed is None else seed)
        return SEPARATOR.join(texts[index] for index in draw.permutation(len(texts))[:count].tolist())

    common = None if seed is None else shown(0)
    return [
        replace(example, prompt=(shown(number) if common is None else common) + SEPARATOR + example.prompt)
        for number, example in enumerate(examples)
    ]
