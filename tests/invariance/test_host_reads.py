"""Losses on a GPU are read on the host once a step, so that nothing waits for the forward passes in between."""

import math

import pytest
import torch
from tests.support.methods import Variant
from tests.support.models import CASES, assert_same_bits, snapshot
from tests.support.remote import Remote, remote

from zotune.core.context import Context, Estimate, as_losses, on_host
from zotune.core.direction import HERE, Combination, Noise
from zotune.core.noise import stream
from zotune.core.step import settle
from zotune.engines.in_place import InPlace
from zotune.engines.query import ask

PLAIN = [
    Variant("mezo"),
    Variant("mezo", {"n": 3}),
    Variant("mezo", {"sides": 1}),
    Variant("kerzoo", {"n": 2, "order": 5}),
    Variant("kerzoo", {"variant": "released"}),
    Variant("kerzoo", {"source": "rademacher"}),
    Variant("subzero", {"rank": 2, "n": 2}),
    Variant("jaguar"),
    Variant("sparse"),
    Variant("es"),
    Variant("zo_finetuner", {"networks": "untrained"}),
]


@pytest.fixture(autouse=True)
def _forget():
    Remote.reads.clear()
    with torch.no_grad():  # as in `ZO.step`
        yield


def fresh(dtype=torch.float32):
    torch.manual_seed(0)
    return CASES["mlp"](dtype)


def step_of(opt, closure, seen=None):
    """A step as `ZO.step` takes it, up to the ledger's line; returns the outcome. What was read before the end: `seen`."""
    ctx = Context(
        step=opt.step_number,
        seed=opt.seed,
        hyperparameters={"eps": opt.param_groups[0]["eps"]},
        sites=[slot.site for slot in opt.weights],
        ask=lambda points: opt.engine.losses(points, closure, 0),
        weight=lambda site: opt.weights.slots[site.name].tensor,
    )
    estimate = opt.method.estimate(ctx)
    if seen is not None:
        seen.extend(Remote.reads)
    outcome = settle(opt.method, ctx, estimate, lambda outcome: None, lambda: None)
    opt._move(outcome.estimate)
    opt.param_groups[0]["zo_step"] += 1
    return outcome


@pytest.mark.parametrize("variant", PLAIN, ids=lambda v: v.id)
def test_a_step_reads_once(variant):
    """The engine has looked at the model before; then one copy a step, at its end."""
    case = fresh()
    opt, seen = variant.optimizer(case), []
    case.closure()
    step_of(opt, case.closure)
    opt.engine._unread = set()  # every tensor was seen to be read
    for _ in range(3):
        Remote.reads.clear()
        outcome = step_of(opt, lambda: remote(case.closure()), seen)
        assert seen == []
        assert len(Remote.reads) == 1, Remote.reads
        assert outcome.accepted


@pytest.mark.parametrize("variant", PLAIN, ids=lambda v: v.id)
def test_the_bits_are_those_of_losses_on_the_cpu(variant):
    ends = []
    for wrap in (lambda loss: loss, remote):
        case = fresh()
        opt = variant.optimizer(case)
        losses = [step_of(opt, lambda c=case, w=wrap: w(c.closure())).losses for _ in range(4)]
        ends.append((snapshot(case), losses))
    assert ends[0][1] == ends[1][1]
    assert_same_bits(ends[0][0], ends[1][0])


def test_a_whole_step_of_the_optimizer_reads_once():
    case = fresh()
    opt = Variant("mezo").optimizer(case)
    opt.step(case.closure)
    opt.engine._unread = set()
    Remote.reads.clear()
    opt.step(lambda: remote(case.closure()))
    assert len(Remote.reads) == 1, Remote.reads


def test_a_method_that_looks_is_seen():
    """The counter counts: what this file claims would fail for a method that reads a loss in the middle."""

    class Nosy:
        def estimate(self, ctx):
            plus, minus = ctx.loss([HERE, HERE])
            looks = [
                lambda: float(plus), lambda: plus > minus or None, lambda: ctx.losses, lambda: [plus, minus][0].tolist(),
                lambda: plus.item(), lambda: math.isfinite(plus), lambda: max(plus, minus), lambda: plus.cpu(),
                lambda: torch.stack([plus, minus])[torch.stack([plus, minus]).isfinite()], lambda: f"{plus:.3f}",
            ]  # fmt: skip
            for number, look in enumerate(looks):
                Remote.reads.clear()
                look()
                assert Remote.reads, number
            return Estimate(HERE, plus)

    answers = remote(torch.tensor([1.0, 2.0], dtype=torch.float64))
    Nosy().estimate(context(lambda points: answers))


def context(ask):
    return Context(step=0, seed=0, hyperparameters={"eps": 1e-3}, sites=[], ask=ask, weight=None)


def test_everything_is_read_in_one_copy():
    """Losses, the logged loss, coefficients and remarks, each in its place; numbers stay what they are."""
    losses = [[0.1, 0.2], [0.3]]
    ctx = context(lambda points: remote(torch.tensor(losses[len(points) % 2], dtype=torch.float64)))
    first, second = ctx.loss([HERE, HERE]), ctx.loss([HERE])
    z = [Noise(stream(0, k)) for k in range(3)]
    direction = Combination(((second[0] - first[0], z[0]), (7.0, z[1]), (first.sum(), z[2])))
    estimate = ctx.read(Estimate(direction, first.mean(), {"a": 1.5, "b": second[0] * 2, "c": torch.tensor(4.0)}))
    assert len(Remote.reads) == 1
    assert ctx.losses == [0.1, 0.2, 0.3]
    assert [c for c, _ in estimate.direction.terms] == [0.3 - 0.1, 7.0, 0.1 + 0.2]
    assert [inner for _, inner in estimate.direction.terms] == z
    assert estimate.loss == (0.1 + 0.2) / 2
    assert estimate.info == {"a": 1.5, "b": 0.6, "c": 4.0}
    assert all(type(value) is float for value in (estimate.loss, *estimate.info.values()))
    assert ctx.read(estimate) is estimate
    assert len(Remote.reads) == 1


def test_a_method_may_write_to_the_losses_it_was_given():
    for place in (lambda t: t, remote):
        ctx = context(lambda points, place=place: place(torch.tensor([1.0, 2.0], dtype=torch.float64)))
        ctx.loss([HERE, HERE]).sub_(5.0)
        assert ctx.losses == [1.0, 2.0]


def test_losses_and_slopes_stay_in_order():
    ctx = context(lambda points: remote(torch.tensor([1.0], dtype=torch.float64)))
    ctx._slope = lambda direction: (2.0, 3.0)
    ctx.loss([HERE])
    ctx.slope(HERE)
    ctx.loss([HERE])
    assert ctx.losses == [1.0, 2.0, 3.0, 1.0]


def test_losses_that_are_not_finite_are_refused_at_the_end():
    case = fresh()
    opt = Variant("mezo").optimizer(case)
    step_of(opt, case.closure)
    before = snapshot(case)
    ctx = context(lambda points: remote(torch.tensor([math.nan, 1.0], dtype=torch.float64)))
    moved = []
    outcome = settle(opt.method, ctx, opt.method.estimate(ctx), moved.append, lambda: moved.append("moved"))
    assert not outcome.accepted
    assert moved == [outcome]
    assert len(Remote.reads) == 1
    assert math.isnan(outcome.losses[0])
    assert_same_bits(before, snapshot(case))


def test_answers_of_one_query_are_not_overwritten_by_the_next():
    """A captured graph writes its loss to the same memory in every replay."""
    case = fresh()
    place = remote(torch.zeros((), dtype=torch.float64))
    counted = iter(range(1, 5))

    def closure():
        case.closure()
        return place.fill_(next(counted))

    engine = InPlace(Variant("mezo").optimizer(case).weights)
    engine._unread = set()
    z = Noise(stream(0, "z"))
    assert on_host([engine.losses([1e-3 * z, -1e-3 * z, HERE], closure, 0)]) == [1.0, 2.0, 3.0]


def test_losses_keep_their_place():
    """On a device if all lie there; numbers and tensors of several devices meet on the host, in order."""
    there, here = remote(torch.tensor(1.5)), torch.tensor(0.5)
    assert isinstance(as_losses([there, there]), Remote)
    assert as_losses([there, there]).dtype == torch.float64
    Remote.reads.clear()
    for mixed, expected in (([there, 2.0], [1.5, 2.0]), ([here, there], [0.5, 1.5]), ([], [])):
        made = as_losses(mixed)
        assert not isinstance(made, Remote)
        assert made.tolist() == expected
        assert made.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_an_answer_stays_where_it_was_computed(dtype, shape):
    case = fresh()
    weights = Variant("mezo").optimizer(case).weights
    number = torch.full(shape, 1 / 3, dtype=dtype)
    made = ask(lambda: remote(number), weights, 0)
    assert isinstance(made, Remote)
    assert made.shape == ()
    assert made.dtype == torch.float64
    assert not Remote.reads
    assert float(made) == ask(lambda: number, weights, 0) == float(number)


def test_an_answer_that_is_no_number_is_refused_on_a_device_too():
    from zotune.errors import ClosureError

    weights = Variant("mezo").optimizer(fresh()).weights
    with pytest.raises(ClosureError, match="shape"):
        ask(lambda: remote(torch.zeros(2)), weights, 0)
