"""The second half of a step: a `ZO`'s rule moves the weights along the estimate."""

from functools import partial
from typing import Any

from torch import Tensor

from zotune.core.context import Estimate
from zotune.core.direction import Direction
from zotune.core.site import Site
from zotune.core.step import Rule
from zotune.core.weights import Change, Slot


def move(opt: Any, estimate: Estimate) -> None:
    """Move all tensors of a `ZO` as its rule says; low-rank parts of the move may wait as factors (`Folding.take`)."""
    folding, weights, where = opt.folding, opt.weights, (opt.seed, opt.step_number)
    later: set[str] = set()
    if folding.every and folding.low_rank:
        later = folding.take(estimate.direction, opt.rule.trial, opt.param_groups, *where)
    weights.low_precision.begin(*where)
    moves: list[tuple[Slot, Change, Direction | None]] = []
    for group in opt.param_groups:
        slots = [weights.by_tensor[id(parameter)] for parameter in group["params"]]
        slots = [slot for slot in slots if slot.site.name not in later]
        along = opt.rule.displacements([slot.site for slot in slots], estimate, group)
        changes = [partial(_change, opt.rule, estimate, group, opt.state[slot.tensor]) for slot in slots]
        moves.extend(zip(slots, changes, along, strict=True))
    weights.update_all(moves, folding.late)


def _change(
    rule: Rule, estimate: Estimate, group: dict[str, Any], state: dict[str, Any], values: Tensor, part: Site
) -> None:
    rule(values, part, estimate, group, state)
