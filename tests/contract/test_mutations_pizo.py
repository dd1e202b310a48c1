"""Faults of PIZO put in on purpose; the first is that of two of the released trainers."""

from dataclasses import dataclass, replace

import pytest
import torch
from tests.checks import pizo
from tests.support.mutations import sees

from zotune.core.direction import Direction, Noise
from zotune.core.noise import stream
from zotune.methods import pizo as module
from zotune.methods.pizo import Pizo


@dataclass(frozen=True, eq=False)
class SeedSetForEachTensor(Direction):
    """The seed is set again for every tensor: only the first one gets the noise that was ranked."""

    ranked: Direction
    number: int

    def add_to(self, out, site, scale=1.0):
        first = site.name in ("block0.weight", "inner.weight")
        (self.ranked if first else Noise(stream(99, "other", self.number), "gaussian")).add_to(out, site, scale)


def other_noise_than_ranked(patch):
    numbers = iter(range(10**9))

    def guiding(z, order, elite):
        return right([SeedSetForEachTensor(one, next(numbers) // 4 * 4 + i) for i, one in enumerate(z)], order, elite)

    right = module.guiding
    patch.setitem(module.VARIANTS, "guiding", guiding)


def ranking_reversed(patch):
    right = module.ranked
    patch.setattr(module, "ranked", lambda losses: right(losses)[::-1])


def largest_instead_of_smallest(patch):
    patch.setitem(module.VARIANTS, "greedy", lambda z, order, elite: z[order[-1]])


def ranks_ignored(patch):
    patch.setattr(module, "ranked", lambda losses: list(range(len(losses))))


def nan_ranked_first(patch):
    patch.setattr(module, "ranked", lambda losses: torch.nan_to_num(losses, -1e9, 1e9, -1e9).argsort().tolist())


def sums_instead_of_means(patch):
    patch.setitem(module.VARIANTS, "guiding", lambda z, order, elite: float(elite) * right(z, order, elite))
    right = module.guiding


def equal_groups(patch):
    """The s best against the s worst: Lemma 4's form, which is Algorithm 1's only for alpha = 1/2."""
    right = module.guiding

    def guiding(z, order, elite):
        few = [*order[:elite], *order[-elite:]]
        return right([z[i] for i in few], range(len(few)), elite)

    patch.setitem(module.VARIANTS, "guiding", guiding)


def logged(choose):
    def put_in(patch):
        right = Pizo.estimate
        patch.setattr(Pizo, "estimate", lambda self, ctx: replace(right(self, ctx), loss=choose(ctx.losses)))

    return put_in


def one_side_wrong(patch):
    """The plus side is the winner's, and the minus side somebody else's."""
    patch.setitem(module.VARIANTS, "greedy", lambda z, order, elite: z[0])


@pytest.mark.parametrize(
    ("put_in", "check"),
    [
        (other_noise_than_ranked, pizo.check_the_pool_is_what_v_is_made_of),
        (other_noise_than_ranked, pizo.check_every_tensor_is_ranked),
        (other_noise_than_ranked, lambda: pizo.check_equals_the_readable_twin(steps=1)),
        (ranking_reversed, pizo.check_moments),
        (ranking_reversed, lambda: pizo.check_equals_the_readable_twin("greedy", steps=2)),
        (ranking_reversed, lambda: pizo.check_equals_the_readable_twin(pool=3, steps=2)),
        (largest_instead_of_smallest, lambda: pizo.check_equals_the_readable_twin("greedy", steps=2)),
        (largest_instead_of_smallest, lambda: pizo.check_moments("greedy", 4)),
        (ranks_ignored, pizo.check_moments),
        (ranks_ignored, lambda: pizo.check_equals_the_readable_twin(steps=3)),
        (nan_ranked_first, pizo.check_nan_never_wins),
        (sums_instead_of_means, pizo.check_moments),
        (sums_instead_of_means, lambda: pizo.check_equals_the_readable_twin(steps=1)),
        (equal_groups, lambda: pizo.check_equals_the_readable_twin(pool=6, alpha=0.34, steps=1)),
        (logged(min), pizo.check_logged_loss_is_the_mean_of_the_pair),
        (logged(min), lambda: pizo.check_logged_loss_is_the_mean_of_the_pair("greedy")),
        (logged(lambda losses: losses[-2]), pizo.check_logged_loss_is_the_mean_of_the_pair),
        (one_side_wrong, lambda: pizo.check_equals_the_readable_twin("greedy", steps=3)),
    ],
)
def test_a_fault_is_seen(monkeypatch, put_in, check):
    sees(monkeypatch, put_in, check)
