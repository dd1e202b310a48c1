"""ZO-SGD-Cons takes the best of three, exactly as tried, and its loss on the batch never rises (C3)."""

from itertools import pairwise

import pytest
import torch
from tests.checks import conservative as checks
from tests.checks.engines import make
from tests.checks.rules import check_resumes
from tests.support.models import CASES

from zotune.errors import ConfigError
from zotune.methods.conservative import Conservative
from zotune.optim.optimizer import ZO
from zotune.rules import RULES


def test_equals_the_readable_twin():
    """The opposite step wins rarely with sgd: where eps and lr see the same curve it is uphill."""
    assert checks.check_equals_the_readable_twin("sgd") >= {0, 1}


def test_equals_the_readable_twin_with_signs():
    assert checks.check_equals_the_readable_twin("sign", lr=0.05) == {0, 1, -1}


def test_the_smallest_loss_wins():
    checks.check_the_smallest_loss_wins()


@pytest.mark.parametrize("rule", ["sgd", "sign"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_candidate_is_the_update(rule, dtype):
    checks.check_the_candidate_is_the_update(rule, dtype)


@pytest.mark.parametrize(("rule", "lr"), [("sgd", 0.005), ("sign", 0.03)])
def test_the_loss_never_increases(rule, lr):
    losses = checks.check_the_loss_never_increases(rule, lr)
    assert losses[-1] < losses[0]


def test_mezo_does_increase_the_loss_there():
    """Else the test above would show nothing."""
    torch.manual_seed(1)
    case = CASES["mlp"](torch.float64)
    opt, losses = make(case, "in_place", lr=0.005), []
    for _ in range(25):
        opt.step(case.closure)
        losses.append(float(case.closure().detach()))
    assert any(later > earlier for earlier, later in pairwise(losses))


@pytest.mark.filterwarnings("ignore:Step 0 was refused")
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_refused_before_anything_is_tried(at, bad):
    answers = [1.0, 1.5, 0.5]
    answers[at] = bad
    opt, before, after, _ = checks.run([*answers, 0.0, 0.0])
    assert opt.refused == 1
    assert len(opt.last.losses) == 3
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("rule", [rule for rule in RULES if "trial" not in RULES[rule].offers])
def test_rules_that_remember_are_refused(rule):
    with pytest.raises(ConfigError, match="cannot be tried"):
        ZO(CASES["bare"](torch.float32).named, "conservative", rule=rule)


def test_weight_decay_is_refused():
    case = CASES["bare"](torch.float32)
    with pytest.raises(ConfigError, match="set it to 0"):
        ZO(case.named, "conservative", lr=1e-3, eps=1e-2, weight_decay=0.1).step(case.closure)


@pytest.mark.parametrize("rule", ["sgd", "sign"])
def test_resumes(rule):
    check_resumes(rule, "conservative", torch.bfloat16)


def test_groups_with_other_lr_are_tried_as_they_are_moved():
    """The candidate's loss is the loss after the step, with two learning rates: fp64, equal weights, equal bits."""
    torch.manual_seed(1)
    case = CASES["mlp"](torch.float64)
    groups = [{"params": case.named[:3], "lr": 5e-4}, {"params": case.named[3:]}]
    opt, chosen = ZO(groups, "conservative", lr=1e-4, eps=1e-2, engine="in_place"), set()
    for _ in range(6):
        opt.step(case.closure)
        here, _, _, down, up = opt.last.losses
        chosen.add(opt.last.estimate.info["choice"])
        assert float(case.closure().detach()) == {0: here, 1: down, -1: up}[opt.last.estimate.info["choice"]]
    assert chosen - {0}, "no step was taken, so nothing was compared"


def test_declared():
    assert Conservative().forwards == 5
    assert Conservative().needs == {"trial"}
