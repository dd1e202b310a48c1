"""ZO is a well-behaved torch optimizer; bad input is refused with words; forwards are counted; NaN never reaches weights."""

import copy
import math
import pathlib
import warnings

import numpy as np
import pytest
import torch
from tests.checks.engines import check_nonfinite_losses_are_refused, make
from tests.support.models import CASES, assert_same_bits, snapshot
from torch import nn

import zotune
from zotune.engines import ENGINES
from zotune.errors import ClosureError, ConfigError, ParameterError
from zotune.methods.mezo import MeZO
from zotune.optim.optimizer import ZO
from zotune.optim.parameters import default_eps
from zotune.optim.patience import PATIENCE

engines = pytest.mark.parametrize("engine", ENGINES)


def small():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(8, 4)
    return model, lambda: model(x).square().mean()


# ----------------------------------------------------------------------------------------------------------------------
# torch.optim, point by point (named tuples, step, groups, state, saving)


def test_accepts_tensors_pairs_and_groups():
    model, closure = small()
    first, second = list(model.named_parameters())[:2], list(model.named_parameters())[2:]
    for given in (
        model.parameters(),
        model.named_parameters(),
        [{"params": first}, {"params": second, "lr": 0.1}],
        [{"params": [p for _, p in first]}, {"params": [p for _, p in second], "lr": 0.1}],
        [{"params": model[0].weight}],
    ):
        opt = ZO(given, lr=1e-3)
        opt.step(closure)
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.step_number == 1


def test_what_it_prints_names_its_parts():
    model, _ = small()
    printed = repr(ZO([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.5}], "lozo"))
    for part in ("LOZO(rank=2", "SGD()", "engine='auto'", "step=0", "2 tensors with {'lr': 0.5"):
        assert part in printed
    assert "zo_" not in printed


def test_every_public_name_is_there():
    assert set(zotune.__all__) <= set(dir(zotune))
    for name in zotune.__all__:
        assert getattr(zotune, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Zo'"):
        zotune.Zo  # noqa: B018


def test_names_are_kept_and_canonical():
    model, _ = small()
    opt = ZO(nn.DataParallel(model).named_parameters())
    assert opt.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert list(opt.weights.slots) == opt.param_groups[0]["param_names"]


def test_unnamed_tensors_of_all_groups_have_names_of_their_own():
    """Equal names would mean equal noise."""
    groups = [{"params": [torch.zeros(3, requires_grad=True)]} for _ in range(3)]
    assert list(ZO(groups).weights.slots) == ["param0", "group1.param0", "group2.param0"]


def test_frozen_tensors_are_left_out():
    model, closure = small()
    model[0].requires_grad_(False)
    opt = ZO(model.named_parameters())
    opt.step(closure)
    assert list(opt.weights.slots) == ["2.weight", "2.bias"]


def test_step_returns_the_loss_as_a_number_without_a_graph():
    model, closure = small()
    loss = ZO(model.named_parameters(), lr=0.0).step(closure)
    assert loss.shape == ()
    assert loss.dtype == torch.float64
    assert not loss.requires_grad
    # the mean of both sides is eps^2 times a curvature away
    assert float(loss) == pytest.approx(float(closure().detach()), rel=1e-2)


def test_query_then_step_is_step():
    results = []
    for split in (False, True):
        torch.manual_seed(0)
        model, closure = small()
        opt = ZO(model.named_parameters(), lr=0.1)
        for _ in range(3):
            if split:
                asked = opt.query(closure)
                assert float(asked) == float(opt.step())
            else:
                opt.step(closure)
        results.append(snapshot(type("", (), {"named": list(model.named_parameters())})))
    assert_same_bits(*results)


def test_query_moves_nothing():
    case = CASES["mlp"](torch.float32)
    before, opt = snapshot(case), make(case, "layerwise", lr=0.1)
    opt.query(case.closure)
    assert_same_bits(before, snapshot(case))
    assert opt.step_number == 0


def test_step_without_a_closure_needs_a_query():
    model, closure = small()
    opt = ZO(model.named_parameters(), lr=0.1)
    with pytest.raises(ClosureError, match=r"step\(closure\), or query\(closure\) and then step"):
        opt.step()
    opt.step(closure)
    with pytest.raises(ClosureError, match="query"):
        opt.step()  # the estimate was used up


def test_step_of_nothing_with_lr_zero_makes_the_state():
    """What torch.distributed.checkpoint does with an optimizer that has none."""
    model, _ = small()
    opt = ZO(model.named_parameters(), lr=0.0)
    assert opt.step(closure=None) is None
    assert len(opt.state) == 4
    assert opt.step_number == 0


def test_hooks_run():
    model, closure = small()
    opt, seen = ZO(model.named_parameters()), []
    opt.register_step_pre_hook(lambda *_: seen.append("before"))
    opt.register_step_post_hook(lambda *_: seen.append("after"))
    opt.step(closure)
    assert seen == ["before", "after"]


@pytest.mark.parametrize(
    "make_schedule",
    [
        lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda k: 1 / (1 + k)),
        lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10),
        lambda opt: torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=10, cycle_momentum=False),
    ],
)
def test_schedulers(make_schedule):
    model, closure = small()
    opt = ZO(model.named_parameters(), lr=0.01)
    schedule = make_schedule(opt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns when it does not recognise the optimizer's step
        rates = []
        for _ in range(3):
            opt.step(closure)
            schedule.step()
            rates.append(opt.param_groups[0]["lr"])
    assert len(set(rates)) == 3


def test_no_tensor_state_before_the_first_step():
    """accelerate calls load_state_dict(state_dict()) in its constructor."""
    model, _ = small()
    opt = ZO(model.bfloat16().named_parameters())
    assert opt.state_dict()["state"] == {}
    opt.load_state_dict(opt.state_dict())
    opt.zero_grad()
    assert opt.step_number == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_survives_torch_load_with_weights_only(tmp_path, dtype):
    """Tensors keep their dtype: torch's own loading would cast the int16 and fp32 state to bf16."""
    case = CASES["mlp"](dtype)
    opt = make(case, "in_place", lr=1e-3)
    opt.step(case.closure)
    for slot in opt.weights:
        opt.state[slot.tensor]["average"] = torch.full(slot.tensor.shape, 1.0001, dtype=torch.float32)
    torch.save(opt.state_dict(), tmp_path / "optimizer.pt")
    other = make(CASES["mlp"](dtype), "in_place")
    other.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    for slot, before in zip(other.weights, opt.weights, strict=True):
        ours, theirs = other.state[slot.tensor], opt.state[before.tensor]
        assert ours.keys() == theirs.keys()
        assert ours["average"].dtype == torch.float32
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in theirs)
        assert (slot.carried is None) == (dtype == torch.float32)
        assert slot.carried is None or slot.carried.dtype == torch.int16
        assert slot.carried is ours.get("carried")
    assert other.param_groups[0]["zo_step"] == 1
    assert other.param_groups[0]["lr"] == 1e-3


def test_loading_does_not_tie_the_two_optimizers_together():
    case = CASES["mlp"](torch.bfloat16)
    opt = make(case, "in_place", lr=1e-3)
    opt.step(case.closure)
    kept = {name: slot.carried.clone() for name, slot in opt.weights.slots.items()}
    other_case = CASES["mlp"](torch.bfloat16)
    other_case.module.load_state_dict(case.module.state_dict())
    other = make(other_case, "in_place", lr=1e-3)
    other.load_state_dict(opt.state_dict())
    other.step(other_case.closure)
    assert other.refused == 0
    assert all(torch.equal(opt.weights.slots[name].carried, value) for name, value in kept.items())


def test_loading_a_state_from_before_the_first_move_drops_the_carried_bits():
    case = CASES["mlp"](torch.bfloat16)
    opt = make(case, "in_place", lr=1e-3)
    start = copy.deepcopy(opt.state_dict())
    opt.step(case.closure)
    opt.load_state_dict(start)
    assert all(slot.carried is None for slot in opt.weights)


@pytest.mark.parametrize(
    ("saved", "wanted", "told"),
    [
        ({"method": "ldsd"}, {"method": "mezo"}, "method 'ldsd', not 'mezo'"),
        ({"rule": "adam"}, {"rule": "momentum"}, "rule 'adam', not 'momentum'"),
        ({"noise": "rademacher"}, {}, "noise 'rademacher', not 'normal'"),
        ({"low_precision": "plain"}, {}, "low_precision 'plain', not 'carry'"),
    ],
)
def test_a_state_of_another_kind_is_refused_before_anything_is_taken_up(saved, wanted, told):
    case = CASES["mlp"](torch.bfloat16)
    opt = make(case, "in_place", lr=1e-3, **saved)
    opt.step(case.closure)
    other = make(case, "in_place", **wanted)
    with pytest.raises(ConfigError, match=told):
        other.load_state_dict(opt.state_dict())
    assert other.step_number == 0


def test_a_state_of_other_tensors_is_refused():
    """The numbers of an fp16 tensor's low-order bits mean something else than those of a bf16 tensor."""
    case, half = CASES["mlp"](torch.bfloat16), CASES["mlp"](torch.float16)
    opt = make(case, "in_place", lr=1e-3)
    opt.step(case.closure)
    with pytest.raises(ConfigError, match=r"bfloat16.*float16"):
        make(half, "in_place").load_state_dict(opt.state_dict())
    with pytest.raises(ConfigError, match="in another order"):
        ZO(reversed(case.named)).load_state_dict(opt.state_dict())
    wider = [(name, nn.Parameter(torch.zeros(2, *p.shape, dtype=p.dtype))) for name, p in case.named]
    with pytest.raises(ConfigError, match="parameters"):
        ZO(wider).load_state_dict(opt.state_dict())
    adam = torch.optim.AdamW(case.module.parameters())
    with pytest.raises(ConfigError, match=r"not the state of a zotune\.ZO"):
        opt.load_state_dict(adam.state_dict())


def test_loading_drops_a_pending_query():
    case = CASES["mlp"](torch.float32)
    opt = make(case, "in_place", lr=1e-3)
    start = copy.deepcopy(opt.state_dict())
    opt.query(case.closure)
    opt.load_state_dict(start)
    with pytest.raises(ClosureError):
        opt.step()


def test_distributed_checkpoint_allocates_no_gradients():
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, closure = small()
    opt = ZO(model.named_parameters(), lr=0.1)
    opt.step(closure)
    written = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: written.append(p))
    before = [p.detach().clone() for p in model.parameters()]
    state = get_optimizer_state_dict(model, opt)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    opt.param_groups[0]["zo_step"] = 7
    set_optimizer_state_dict(model, opt, state)
    assert opt.step_number == 1


def test_distributed_checkpoint_of_a_new_optimizer_moves_nothing():
    """Then torch makes the state by a step with lr 0 and no closure."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, closure = small()
    opt = ZO(model.named_parameters(), lr=0.1)
    before = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert opt.param_groups[0]["lr"] == 0.1
    opt.step(closure)


def test_groups_are_fixed_at_construction():
    model, _ = small()
    opt = ZO(model[0].named_parameters())
    with pytest.raises(ConfigError, match="give all groups to the constructor"):
        opt.add_param_group({"params": list(model[2].parameters())})


def test_tensors_stay_where_they_are():
    """Static addresses, for CUDA graphs and sharded views: written in place, never replaced."""
    case = CASES["mlp"](torch.bfloat16)
    addresses = [t.data_ptr() for _, t in case.named]
    opt = make(case, "layerwise", lr=1e-3)
    for _ in range(2):
        opt.step(case.closure)
    assert [t.data_ptr() for _, t in case.named] == addresses


def test_works_when_gradients_are_disabled_or_not():
    model, closure = small()
    opt = ZO(model.named_parameters())
    with torch.no_grad():
        opt.step(closure)
    with torch.enable_grad():
        opt.step(closure)
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("ledger", [str, pathlib.Path])
def test_a_ledger_by_path(tmp_path, ledger):
    model, closure = small()
    ZO(model.named_parameters(), ledger=ledger(tmp_path / "run.jsonl")).step(closure)
    assert (tmp_path / "run.jsonl").stat().st_size


# ----------------------------------------------------------------------------------------------------------------------
# Contract 7: budget


@engines
@pytest.mark.parametrize("name", ["mlp", "attention", "gpt2", "bare"])
@pytest.mark.parametrize("options", [{}, {"n": 3}, {"sides": 1}, {"n": 3, "sides": 1}])
def test_forwards_are_those_declared(engine, name, options, monkeypatch):
    """Calls of the closure, less what the engine spends on checking: at the beginning, and at the later looks."""
    monkeypatch.setattr("zotune.engines.layerwise.LOOKS", frozenset())
    case, calls = CASES[name](torch.float32), []
    opt = make(case, engine, method_options=options)

    def closure():
        calls.append(None)
        return case.closure()

    checks = []
    for step in range(4):
        if step == 3:
            monkeypatch.setattr("zotune.engines.layerwise.LOOKS", frozenset(range(100)))
        opt.step(closure)
        checks.append(opt.engine.check_forwards)
    assert opt.forwards == 4 * opt.method.forwards
    assert len(calls) == opt.forwards + checks[-1]
    assert checks[:3] == [checks[0]] * 3
    assert (checks[3] > checks[2]) == (engine != "in_place")
    assert 1 <= checks[0] <= (1 if engine == "in_place" else 7)


# ----------------------------------------------------------------------------------------------------------------------
# Contract 10: what is not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nonfinite_losses_are_refused(bad):
    check_nonfinite_losses_are_refused(bad)


def test_a_weight_decay_does_not_move_weights_in_a_refused_step():
    case = CASES["mlp"](torch.float32)
    opt = make(case, "in_place", lr=0.1, weight_decay=0.5)
    opt.step(case.closure)
    before = snapshot(case)
    with pytest.warns(UserWarning, match="refused"):
        opt.step(lambda: math.nan)
    assert_same_bits(before, snapshot(case))


def test_repeated_nonfinite_losses_stop_the_run_with_advice():
    case = CASES["mlp"](torch.float32)
    opt = make(case, "in_place", lr=1e-3)
    opt.step(case.closure)
    before = snapshot(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(PATIENCE - 1):
            opt.step(lambda: math.nan)
        with pytest.raises(ClosureError, match=r"10 steps in a row .*Lower lr or eps, or run the forward pass in bf16"):
            opt.step(lambda: math.nan)
    assert opt.refused == PATIENCE
    assert_same_bits(before, snapshot(case))


def test_refusals_that_are_not_in_a_row_do_not_stop_the_run():
    case = CASES["bare"](torch.float32)
    opt = make(case, "in_place", lr=1e-3)
    opt.step(case.closure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(PATIENCE):
            opt.step(lambda: math.nan)
            opt.step(case.closure)
    assert opt.refused == PATIENCE
    assert opt.step_number == 2 * PATIENCE + 1


@engines
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_a_number_at_the_start(engine, bad):
    model, closure = small()
    with pytest.raises(ClosureError, match=r"loss at the current weights is (nan|inf), before any perturbation"):
        ZO(model.named_parameters(), engine=engine).step(lambda: closure() * bad)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: what was given, what is needed, what to do


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "returned NoneType.*Does it end with `return loss`"),
        ("0.5", "returned str"),
        (True, "returned bool"),
        ([0.5], "returned list"),
        (torch.zeros(3), r"tensor of shape \(3,\); one number is needed.*\.mean\(\)"),
        (torch.zeros(0), r"shape \(0,\)"),
    ],
)
def test_closures_that_return_no_loss(answer, message):
    model, _ = small()
    with pytest.raises(ClosureError, match=message):
        ZO(model.named_parameters()).step(lambda: answer)


@pytest.mark.parametrize("kind", [float, np.float64, np.float32, int, torch.tensor, lambda v: torch.tensor([[v]])])
def test_closures_may_return_any_kind_of_number(kind):
    a = nn.Parameter(torch.ones(3))
    loss = ZO([("a", a)], eps=0.5).step(lambda: kind(float(a.sum()) * 4))
    assert float(loss) == pytest.approx(12, abs=1)  # both sides of 12, each cut to a whole number where `kind` is int


def test_a_closure_in_low_precision_is_read_exactly():
    a = nn.Parameter(torch.ones(3))
    loss = ZO([("a", a)], engine="in_place").step(lambda: torch.tensor(1 / 3).bfloat16() + 0 * a.sum().bfloat16())
    assert float(loss) == float(torch.tensor(1 / 3).bfloat16())


def test_no_trainable_parameters():
    model, _ = small()
    model.requires_grad_(False)
    with pytest.raises(ParameterError, match=r"No trainable parameters: got 4 tensors.*requires_grad_"):
        ZO(model.named_parameters())
    with pytest.raises(ParameterError, match="No trainable parameters: got 0 tensors"):
        ZO([])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (nn.Linear(2, 2), r"not a module: pass model.named_parameters\(\)"),
        (torch.zeros(3, requires_grad=True), "wrap it in a list"),
        (["weight"], "got str"),
        ([("a", 3)], "got int"),
        ([("w", nn.Parameter(torch.zeros(4).to(torch.float8_e4m3fn)))], "w has dtype torch.float8_e4m3fn.*adapter"),
        ([("w", nn.Parameter(torch.zeros(4, dtype=torch.complex64)))], "dtype torch.complex64"),
        ([("w", nn.Parameter(torch.empty(4, device="meta")))], "meta device"),
        ([("module.w", nn.Parameter(torch.zeros(1))), ("w", nn.Parameter(torch.zeros(1)))], "canonical name 'w'"),
    ],
)
def test_parameters_that_cannot_be_trained(params, message):
    with pytest.raises(ParameterError, match=message):
        ZO(params)


def test_quantised_integer_weights_are_frozen_and_say_so():
    packed = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ParameterError, match=r"none with requires_grad.*adapter"):
        ZO([("w", packed)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1e-6}, "lr must be at least 0.*got -1e-06"),
        ({"lr": math.nan}, "lr must be"),
        ({"lr": math.inf}, "lr must be"),
        ({"eps": 0.0}, "eps must be positive.*got 0.0"),
        ({"eps": -1e-3}, "eps must be positive"),
        ({"eps": math.inf}, "eps must be positive"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0"),
        ({"method": "mezzo"}, "Unknown method 'mezzo'. Did you mean 'mezo'"),
        ({"method": "adam"}, "Unknown method 'adam'. Known: mezo,"),
        ({"method_options": {"side": 1}}, "no option 'side'. Did you mean 'sides'"),
        ({"method_options": {"n": 0}}, "n must be at least 1"),
        ({"method": MeZO(), "method_options": {"n": 1}}, "an object already has its own"),
        ({"rule": "adamw"}, "Unknown rule 'adamw'. Did you mean 'adam'"),
        ({"engine": "inplace"}, "engine must be 'auto', 'layerwise', .*; got 'inplace'"),
        ({"noise": "gauss"}, "noise must be one of normal, gaussian, rademacher; got 'gauss'"),
        ({"low_precision": "fp32"}, "low_precision must be one of carry"),
    ],
)
def test_settings_out_of_range(settings, message):
    model, _ = small()
    with pytest.raises(ConfigError, match=message):
        ZO(model.named_parameters(), **settings)


def test_a_schedule_that_leaves_the_range_is_refused_before_any_forward():
    model, closure = small()
    opt, calls = ZO(model.named_parameters()), []
    opt.param_groups[0]["eps"] = 0.0
    with pytest.raises(ConfigError, match="eps must be positive"):
        opt.step(lambda: calls.append(None) or closure())
    assert not calls


def test_group_settings_are_checked_too():
    model, _ = small()
    with pytest.raises(ConfigError, match="lr must be"):
        ZO([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": -1.0}])


# ----------------------------------------------------------------------------------------------------------------------
# The default eps


def test_default_eps_by_precision():
    assert default_eps([torch.zeros(1)]) == 1e-3
    assert default_eps([torch.zeros(1), torch.zeros(1).bfloat16()]) == 1e-2
    model, _ = small()
    assert ZO(model.named_parameters()).param_groups[0]["eps"] == 1e-3


@pytest.mark.parametrize(
    ("dtype", "eps", "warns"),
    [
        (torch.bfloat16, 1e-2, False),
        (torch.bfloat16, 1e-4, True),
        (torch.float16, 1e-3, False),
        (torch.float16, 1e-5, True),
        (torch.float32, 1e-5, False),
    ],
)
def test_an_eps_below_the_precision_is_warned_about_with_a_number(dtype, eps, warns):
    tensor = [("w", nn.Parameter(torch.zeros(3, dtype=dtype)))]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ZO(tensor, eps=eps)
    assert bool(caught) is warns
    assert not warns or "%" in str(caught[0].message)
