"""Faults of ZO-SGD-Cons put in on purpose; the released code has the last two."""

from dataclasses import replace

import pytest
import torch
from tests.checks import conservative as checks
from tests.support.mutations import sees

from zotune.core.context import Context
from zotune.core.direction import HERE
from zotune.methods.conservative import Conservative
from zotune.optim import querying


def chosen(change):
    """The estimate put through `change(estimate, g, ctx)`, where g is the step that was tried."""

    def put_in(patch):
        right = Conservative.estimate
        tried = []

        def trial(self, direction):
            tried.append(direction)
            return right_trial(self, direction)

        right_trial = Context.trial
        patch.setattr(Context, "trial", trial)

        def estimate(self, ctx):
            tried.clear()
            made = right(self, ctx)
            return change(made, tried[0], ctx) if tried else made

        patch.setattr(Conservative, "estimate", estimate)

    put_in.__name__ = change.__name__
    return put_in


def decide(estimate, g, choice):
    return replace(estimate, direction={0: HERE, 1: g, -1: -g}[choice], info={**estimate.info, "choice": float(choice)})


def largest_loss_wins(estimate, g, ctx):
    here, _, _, down, up = ctx.losses
    losses = {0: here, 1: down, -1: up}
    return decide(estimate, g, max(losses, key=losses.get))


def never_stays(estimate, g, ctx):
    return decide(estimate, g, 1 if ctx.losses[3] <= ctx.losses[4] else -1)


def opposite_is_taken(estimate, g, ctx):
    return replace(estimate, direction=-estimate.direction)


def candidate_loss_logged(estimate, g, ctx):
    return replace(estimate, loss=min(ctx.losses[0], *ctx.losses[3:]))


def not_a_number_takes_the_opposite(estimate, g, ctx):
    here, _, _, down, up = ctx.losses
    if here < down and here < up:
        return decide(estimate, g, 0)
    return decide(estimate, g, 1 if down < up and down <= here else -1)


def tried_with_another_lr(patch):
    right = querying.trial_of
    patch.setattr(querying, "trial_of", lambda *given: 0.5 * right(*given))


def not_undone(patch):
    """The second candidate starts from the first one: -2g on top of +g through a rule for which that is not -g."""
    right = Context.trial
    calls = []

    def trial(self, direction):
        calls.append(right(self, direction))
        return calls[-1] if len(calls) % 2 else 2.0 * calls[-1] + 0.9 * calls[-2]

    patch.setattr(Context, "trial", trial)


BOTH = [checks.check_the_smallest_loss_wins, checks.check_the_loss_never_increases]
MUTATIONS = [
    *((chosen(largest_loss_wins), check) for check in BOTH),
    *((chosen(never_stays), check) for check in BOTH),
    (chosen(opposite_is_taken), checks.check_equals_the_readable_twin),
    (chosen(opposite_is_taken), checks.check_the_candidate_is_the_update),
    (chosen(candidate_loss_logged), checks.check_the_smallest_loss_wins),
    (tried_with_another_lr, checks.check_the_candidate_is_the_update),
    (tried_with_another_lr, lambda: checks.check_the_candidate_is_the_update("sign", torch.float32)),
    (not_undone, lambda: checks.check_the_candidate_is_the_update("sign")),
    (chosen(not_a_number_takes_the_opposite), checks.check_the_smallest_loss_wins),
]


@pytest.mark.parametrize(("put_in", "check"), MUTATIONS)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)
