"""A batch with nothing twice: the prompt is fed once for all options, and short examples share a row.

What is fed of an example is a tree: the prompt, and after it what its options begin with, each beginning once. In
preorder the tokens that come after token j fill one run j + 1 ... end[j] - 1, so token i sees token j exactly if
j <= i < end[j]. Several trees fit into a row behind each other: none sees another, and positions count from 0 in each.
One forward pass with such a mask does the work of a prompt kept for its options (whose body is called twice, so that
perturbed weights are made twice) and of batches sorted by length.

Whether a model heeds masks and positions is tried once. It is not done where dropout is on: another layout draws other
masks than a row for each option.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from zotune.tasks.encoding import Encoded
from zotune.tasks.layout import Layout, Tokens, index_tokens

LEAST_SAVING = 1 / 8
"""Share of the fed tokens that must be saved: attention with a mask of its own is a little slower than the plain one."""

DEAR = 256
"""Length of a row at which looking back over it costs as much as all else that is done with a token."""


def pack(batch: Sequence[Encoded], pad_id: int, longest: float = math.inf) -> Layout:
    """Lay a batch out in trees, in rows no longer than `longest` or than the largest tree."""
    trees = [_tree(example) for example in batch]
    sizes = [len(example.prompt_ids) + len(tree) for example, tree in zip(batch, trees, strict=True)]
    bins, length = _rows(sizes, longest)
    ids = torch.full((len(bins), length), pad_id)
    positions = torch.zeros((len(bins), length), dtype=torch.int64)
    ends = torch.arange(1, length + 1).repeat(len(bins), 1)  # what fills up a row sees itself only
    starts: dict[int, tuple[int, int]] = {}
    for row, members in enumerate(bins):
        start = 0
        for number in members:
            starts[number] = (row, start)
            prompt, tree = batch[number].prompt_ids, trees[number]
            here = slice(start, start + sizes[number])
            ids[row, here] = torch.tensor([*prompt, *(node[-1] for node in tree)])
            positions[row, here] = torch.tensor([*range(len(prompt)), *(len(prompt) + len(n) - 1 for n in tree)])
            ends[row, here] = start + torch.tensor([sizes[number]] * len(prompt) + _ends(tree, len(prompt)))
            start += sizes[number]
    nodes = [{node: place for place, node in enumerate(tree)} for tree in trees]
    layout = index_tokens(batch, ids, partial(_place, batch, nodes, starts))
    return replace(layout, position_ids=positions, ends=ends)


def packed_size(batch: Sequence[Encoded], longest: float = math.inf) -> tuple[int, int]:
    """Rows and their length that `pack` would give."""
    bins, length = _rows([len(example.prompt_ids) + len(_tree(example)) for example in batch], longest)
    return len(bins), length


def visible(ends: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask that is added to attention scores: (R, 1, S, S), 0 where a token is seen, the lowest number elsewhere."""
    place = torch.arange(ends.shape[1], device=ends.device)
    seen = (place <= place[:, None]) & (place[:, None] < ends[:, None, :])  # (R, looking, looked at)
    return torch.zeros(seen.shape, dtype=dtype, device=ends.device).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def dropout_is_on(model: nn.Module) -> bool:
    """Whether a module in training mode drops anything, by itself or by a setting of its own."""
    return any(module.training and any(_rates(module)) for module in model.modules())


def _rates(module: nn.Module) -> list[float]:
    own: dict[str, Any] = vars(module)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return [float(module.p)]
    return [float(value) for name, value in own.items() if "dropout" in name and isinstance(value, (int, float))]


def _tree(example: Encoded) -> list[Tokens]:
    """What is fed after the prompt: every beginning of an option but the whole, once, in preorder (of the dictionary)."""
    return sorted({tuple(option[:done]) for option in example.option_ids for done in range(1, len(option))})


def _ends(tree: list[Tokens], base: int) -> list[int]:
    """For each node the place behind its last descendant, counted from ``base``."""
    sizes = [1] * len(tree)
    place = {node: number for number, node in enumerate(tree)}
    for number in range(len(tree) - 1, -1, -1):
        if len(tree[number]) > 1:
            sizes[place[tree[number][:-1]]] += sizes[number]
    return [base + number + size for number, size in enumerate(sizes)]


def _rows(sizes: Sequence[int], longest: float) -> tuple[list[list[int]], int]:
    """Numbers of the trees in each row, and how long rows are: what costs least of rows up to twice as long as a tree."""
    largest = max(sizes)
    lengths = {largest + largest * eighths // 8 for eighths in range(9)}
    made = [_fill(sizes, length) for length in sorted(lengths) if length in (largest, min(length, longest))]
    return min(made, key=lambda rows: len(rows[0]) * rows[1] * (1 + rows[1] / DEAR))


def _fill(sizes: Sequence[int], longest: int) -> tuple[list[list[int]], int]:
    """The largest first, each into the first row with room for it; and the length of the fullest row."""
    bins: list[list[int]] = []
    room: list[int] = []
    for number in sorted(range(len(sizes)), key=lambda number: (-sizes[number], number)):
        row = next((row for row, left in enumerate(room) if left >= sizes[number]), len(bins))
        if row == len(bins):
            bins.append([])
            room.append(longest)
        bins[row].append(number)
        room[row] -= sizes[number]
    return bins, longest - min(room)


def _place(
    batch: Sequence[Encoded],
    nodes: Sequence[dict[Tokens, int]],
    starts: dict[int, tuple[int, int]],
    number: int,
    fed: Tokens,
    done: int,
) -> tuple[int, int]:
    """Row and position of the prediction after ``done`` tokens of an option."""
    row, start = starts[number]
    last = nodes[number][fed[:done]] if done else -1
    return row, start + len(batch[number].prompt_ids) + last
