"""How a batch of examples lies in memory: as few rows as answer for every option, and where to look in them.

A token is predicted at the position before it, so the last token of an option is never fed. Each option therefore
needs the row prompt + option[:-1]; options share a row when these are equal or one begins with the other. Options
of one token all share the one row that is the prompt. Positions at which several options look (the prompt's end)
are looked up once.

Rows are padded on the right. In a causal model a token sees only what is before it, so no token of an example ever
sees padding: no attention mask is needed (the fast attention path stays open), positions count from 0 as the model
does by itself, and what an example gets does not depend on its neighbours in the batch. `packed` has a layout without
padding and with each prompt once, for models that heed a mask.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from zotune.errors import DataError
from zotune.tasks.encoding import Encoded

Tokens = tuple[int, ...]
Place = Callable[[int, Tokens, int], tuple[int, int]]
"""Example, what is fed of an option, tokens of it that are done -> row and position that predict the next token."""


@dataclass(frozen=True)
class Layout:
    """Index tensors of a batch, on the CPU: B examples, K options at most, R rows, Q queries, T option tokens."""

    input_ids: Tensor  # (R, S) int64, padded on the right
    query_row: Tensor  # (Q,) int64, row of each position whose prediction is needed
    query_position: Tensor  # (Q,) int64, that position
    token_query: Tensor  # (T,) int64, the query that predicts each option token
    token_id: Tensor  # (T,) int64, the option token
    token_option: Tensor  # (T,) int64, the option it belongs to, as example * K + option
    token_weight: Tensor  # (T,) fp64, 1 / number of tokens of that option
    present: Tensor  # (B, K) bool, False where an example has fewer options than K
    labels: Tensor  # (B,) int64
    position_ids: Tensor | None = None  # (R, S) int64; None: each row counts from 0
    ends: Tensor | None = None  # (R, S) int64: token i of a row sees token j if j <= i < ends[j]; None: if j <= i


def lay_out(batch: Sequence[Encoded], pad_id: int) -> Layout:
    """Lay a batch out in rows.

    Args:
        batch: B examples, with at least one option each.
        pad_id: fills up rows; any id the model knows, nothing depends on it.

    Raises:
        DataError: the batch is empty, or an example has no prompt, an empty option, or a label without an option.
    """
    check_batch(batch)
    tails = [_tails(example) for example in batch]
    rows = [[*example.prompt_ids, *tail] for example, own in zip(batch, tails, strict=True) for tail in own]
    first_rows = list(accumulate(map(len, tails), initial=0))

    def place(number: int, fed: Tokens, done: int) -> tuple[int, int]:
        row = next(row for row, tail in enumerate(tails[number]) if tail[: len(fed)] == fed)
        return first_rows[number] + row, len(batch[number].prompt_ids) + done - 1

    return index_tokens(batch, _pad(rows, pad_id), place)


def index_tokens(batch: Sequence[Encoded], input_ids: Tensor, place: Place) -> Layout:
    """Number the queries of a batch whose rows are laid out already: one for each beginning of an example's options."""
    width = max(len(example.option_ids) for example in batch)
    queries: list[tuple[int, int]] = []
    token_query, token_id, token_option, token_weight = [], [], [], []
    for number, example in enumerate(batch):
        seen: dict[Tokens, int] = {}  # what was said of an option so far -> the query that predicts the next token
        for choice, option in enumerate(example.option_ids):
            fed = tuple(option[:-1])
            for done, token in enumerate(option):
                if fed[:done] not in seen:
                    seen[fed[:done]] = len(queries)
                    queries.append(place(number, fed, done))
                token_query.append(seen[fed[:done]])
                token_id.append(token)
                token_option.append(number * width + choice)
                token_weight.append(1.0 / len(option))
    places = torch.tensor(queries)
    present = [[choice < len(example.option_ids) for choice in range(width)] for example in batch]
    return Layout(
        input_ids=input_ids,
        query_row=places[:, 0],
        query_position=places[:, 1],
        token_query=torch.tensor(token_query),
        token_id=torch.tensor(token_id),
        token_option=torch.tensor(token_option),
        token_weight=torch.tensor(token_weight, dtype=torch.float64),
        present=torch.tensor(present),
        labels=torch.tensor([example.label for example in batch]),
    )


def check_batch(batch: Sequence[Encoded]) -> None:
    """Raise a DataError unless there are examples, each with a prompt, options and a label among them."""
    if not batch:
        raise DataError("the batch is empty; at least one example is needed.")
    for number, example in enumerate(batch):
        _check(example, number)


def count_rows(example: Encoded) -> int:
    """How many rows an example takes in a batch."""
    return len(_tails(example))


def _tails(example: Encoded) -> list[Tokens]:
    """What must be fed after the prompt: the options without their last token, those that begin another left out."""
    fed = sorted({tuple(option[:-1]) for option in example.option_ids}, key=lambda tail: (-len(tail), tail))
    kept: list[Tokens] = []
    for tail in fed:
        if not any(other[: len(tail)] == tail for other in kept):
            kept.append(tail)
    return kept


def _pad(rows: list[list[int]], pad_id: int) -> Tensor:
    ids = torch.full((len(rows), max(map(len, rows))), pad_id, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    return ids


def _check(example: Encoded, number: int) -> None:
    if not example.prompt_ids or not example.option_ids or not all(example.option_ids):
        raise DataError(
            f"example {number} of the batch has {len(example.prompt_ids)} prompt tokens and options of "
            f"{[len(option) for option in example.option_ids]} tokens; the prompt and every option need at least one."
        )
    if not 0 <= example.label < len(example.option_ids):
        raise DataError(
            f"example {number} of the batch has label {example.label} of {len(example.option_ids)} options."
        )
