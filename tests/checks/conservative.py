"""Claims about ZO-SGD-Cons that mutations must break."""

import torch

from tests.checks.engines import make
from tests.checks.mezo import SEED, twin_model
from tests.reference.conservative import conservative_step
from tests.support.models import CASES, bits, snapshot
from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.optim.optimizer import ZO

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
OF = {"sgd": lambda g: g, "sign": torch.sign}


def check_equals_the_readable_twin(rule="sgd", lr=0.8, steps=20):
    """20 steps in fp64 against plain loops: a few 2**-53 a step, amplified by 1/eps = 100. Returns which choices occurred."""
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    opt = ZO(named, "conservative", lr=lr, eps=1e-2, seed=SEED, rule=rule)
    choices = set()
    for step in range(steps):

        def draw(name, step=step):
            return Noise(stream(SEED, "step", step, 0)).realise(Site(name, tuple(twin[name].shape)), FP64)

        expected, choice = conservative_step(twin, loss, draw, lr=lr, eps=1e-2, of=OF[rule])
        logged = opt.step(lambda: loss(dict(named)))
        assert abs(float(logged) - expected) < 1e-9
        assert opt.last.estimate.info["choice"] == choice
        choices.add(choice)
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-9, name
    return choices


def run(answers, **settings):
    """One step with given answers for: here, plus, minus, down, up. Returns optimizer, bits before and after, logged loss."""
    case = CASES["mlp"](FP32)
    opt = make(case, "in_place", method="conservative", lr=1e-2, **settings)
    before, given = snapshot(case), iter([0.0, *answers])  # the engine looks at the model once
    logged = opt.step(lambda: torch.tensor(next(given)) + 0 * sum(p.detach().sum() for _, p in case.named))
    return opt, before, snapshot(case), float(logged)


def check_the_smallest_loss_wins():
    """The choice is the argmin, ties stay, candidates without a finite loss never win; the logged loss is L(theta)."""
    nan, inf = float("nan"), float("inf")
    rows = [
        ((1.0, 1.5, 0.5, 0.25, 2.0), 1),
        ((1.0, 1.5, 0.5, 2.0, 0.25), -1),
        ((1.0, 1.5, 0.5, 0.75, 0.25), -1),
        ((1.0, 1.5, 0.5, 1.25, 2.0), 0),
        ((1.0, 1.5, 0.5, 1.0, 1.0), 0),
        ((1.0, 1.5, 0.5, nan, 2.0), 0),
        ((1.0, 1.5, 0.5, nan, 0.5), -1),
        ((1.0, 1.5, 0.5, 0.5, nan), 1),
        ((1.0, 1.5, 0.5, nan, nan), 0),
        ((1.0, 1.5, 0.5, inf, -inf), 0),
    ]
    for answers, choice in rows:
        opt, before, after, logged = run(answers)
        assert opt.last.accepted
        assert opt.last.estimate.info["choice"] == choice, answers
        moved = any(not torch.equal(before[name], after[name]) for name in before)
        assert moved == (choice != 0), f"{answers}: moved {moved}"
        assert logged == 1.0, f"logged {logged}"


def check_the_candidate_is_the_update(rule="sgd", dtype=FP64, steps=16):
    """The weights after the step are, bit for bit, the weights at which the winner was asked.

    The closure answers random numbers, so that each of the three wins now and then.
    """
    torch.manual_seed(1)
    case = CASES["mlp"](dtype)
    opt = make(case, "in_place", method="conservative", lr=1e-3, rule=rule)
    asked, answers = [], torch.Generator().manual_seed(2)

    def closure():
        asked.append(snapshot(case))
        return torch.rand(1, generator=answers)[0] + 0 * sum(p.detach().sum() for _, p in case.named)

    seen = set()
    for _ in range(steps):
        opt.step(closure)
        here, _, _, down, up = asked[-5:]
        choice = opt.last.estimate.info["choice"]
        winner = {0.0: here, 1.0: down, -1.0: up}[choice]
        for name, p in case.named:
            assert torch.equal(bits(p), winner[name]), f"{name}: the step is not the candidate that won"
        seen.add(choice)
    assert seen == {0.0, 1.0, -1.0}, f"only {seen}: too little was compared"


def check_the_loss_never_increases(rule="sgd", lr=0.005, steps=25):
    """C3 on one batch, with a step size at which MeZO does increase it. Exact in fp64: equal weights, equal losses."""
    torch.manual_seed(1)
    case = CASES["mlp"](FP64)
    opt = make(case, "in_place", method="conservative", lr=lr, rule=rule)
    losses = []
    for _ in range(steps):
        before = snapshot(case)
        losses.append(float(case.closure().detach()))
        opt.step(case.closure)
        assert float(case.closure().detach()) <= losses[-1]
        stayed = all(torch.equal(before[name], bits(p)) for name, p in case.named)
        assert stayed == (opt.last.estimate.info["choice"] == 0)
    assert opt.forwards == 5 * steps
    return losses
