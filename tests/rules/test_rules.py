"""Every rule is the formula of its paper, keeps what it says it keeps, resumes and replays."""

import pytest
import torch
from tests.checks import rules
from tests.checks.engines import make
from tests.checks.ledger import check_replay_rebuilds_the_weights
from tests.support.models import CASES, assert_same_bits, bits, snapshot

from zotune.core.direction import HERE
from zotune.core.elementwise import Sign
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.optim.optimizer import ZO
from zotune.rules import RULES, make_rule

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
every_rule = pytest.mark.parametrize("rule", RULES)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        *((rule, {}) for rule in RULES),
        ("momentum", {"beta": 0.5}),
        ("momentum_replayed", {"beta": 0.8, "window": 4}),
        ("adam", {"beta1": 0.5, "beta2": 0.9, "delta": 1e-3}),
        ("adamm", {"beta1": 0.5, "beta2": 0.9, "delta": 1e-3}),
        ("jaguar", {"beta": 0.3}),
    ],
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_equals_the_readable_twin(rule, options, weight_decay):
    rules.check_equals_the_readable_twin(rule, weight_decay, **options)


@every_rule
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
def test_chunks_do_not_matter(rule, dtype):
    rules.check_chunks_do_not_matter(rule, dtype)


@every_rule
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_resumes_in_the_middle_of_a_run(rule, dtype):
    options = {"window": 3} if rule == "momentum_replayed" else {}
    rules.check_resumes(rule, dtype=dtype, rule_options=options)


@every_rule
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_replays_from_the_ledger(tmp_path, rule, dtype):
    check_replay_rebuilds_the_weights(tmp_path / "ledger.jsonl", dtype, rule=rule)


@every_rule
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_lr_0_changes_no_bit(rule, dtype):
    rules.check_lr_0_changes_no_bit(rule, dtype)


@every_rule
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_lr_0_changes_no_bit_of_low_precision(rule, dtype):
    case = CASES["mlp"](dtype)
    if dtype == BF16:  # fp16 values are rebuilt by an addition, which has no -0.0
        dict(case.named)["inner.bias"].data[:3] = torch.tensor([-0.0, 0.0, -0.0])
    before = snapshot(case)
    opt = make(case, "in_place", rule=rule)
    for _ in range(3):
        opt.step(case.closure)
    assert_same_bits(before, snapshot(case))


@every_rule
def test_declared_bytes(rule):
    rules.check_declared_bytes(rule)


@every_rule
def test_works_on_fp64_values_at_full_precision(rule):
    """A move of 1e-12 beside 1 is seen: buffers of fp64 weights are fp64."""
    start = torch.ones(3, 4, dtype=FP64)
    moved, state = rules.apply(make_rule(rule), [rules.noise(0)], lr=1e-12, start=start)
    assert float((moved - start).abs().min()) > 0
    assert all(value.dtype == FP64 for key, value in state.items() if key != "step")


@every_rule
def test_weight_decay_is_decoupled(rule):
    """With a zero estimate only the decay is left, w (1 - lr wd), and none for biases and norms."""
    start = torch.randn(3, 4, dtype=FP64)
    for name, factor in (("a.weight", 1 - 0.1 * 0.3), ("a.bias", 1.0), ("norm.weight", 1.0)):
        moved, _ = rules.apply(make_rule(rule), [HERE], lr=0.1, weight_decay=0.3, start=start, name=name)
        assert torch.equal(moved, start * factor)


@every_rule
def test_groups_have_their_own_lr(rule):
    case = CASES["mlp"](FP32)
    opt = ZO([{"params": case.named[:2]}, {"params": case.named[2:], "lr": 0.0}], lr=1e-2, eps=1e-2, rule=rule)
    before = snapshot(case)
    for _ in range(3):  # an odd number: two signs can cancel
        opt.step(case.closure)
    moved = [name for name, p in case.named if not torch.equal(before[name], bits(p))]
    assert moved == [name for name, _ in case.named[:2]]


@every_rule
def test_layerwise_and_in_place_agree(rule):
    """The same queries to rounding of fp64 products in another order, amplified by 1/eps; signs are not near 0 here."""
    ends = []
    for engine in ("in_place", "layerwise"):
        torch.manual_seed(0)
        case = CASES["mlp"](FP64)
        opt = make(case, engine, lr=1e-3, rule=rule)
        for _ in range(4):
            opt.step(case.closure)
        ends.append(torch.cat([p.detach().flatten() for _, p in case.named]))
    assert torch.allclose(*ends, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rule", [rule for rule in RULES if "trial" in RULES[rule].offers])
def test_the_trial_is_the_update(rule):
    rules.check_the_trial_is_the_update(rule)


@pytest.mark.parametrize("rule", [rule for rule in RULES if "trial" not in RULES[rule].offers])
def test_a_rule_that_remembers_cannot_be_tried(rule):
    with pytest.raises(ConfigError, match=f"{rule!r} cannot be tried"):
        make_rule(rule).trial(rules.noise(), rules.group())


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        *((rule, {"beta": beta}) for rule in ("momentum", "momentum_replayed", "jaguar") for beta in (-0.1, 1.0)),
        *((rule, {beta: 1.0}) for rule in ("adam", "adamm") for beta in ("beta1", "beta2")),
        ("adam", {"delta": 0.0}),
        ("adamm", {"delta": -1.0}),
        ("adamm", {"delta": 0.0}),
        ("momentum_replayed", {"window": 0}),
    ],
)
def test_options_out_of_range(rule, options):
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must be .* \\(rule {rule!r}\\)"):
        make_rule(rule, options)


@pytest.mark.filterwarnings("ignore:Step 1 was refused")
def test_steps_that_were_refused_are_not_counted_by_adam():
    """t is the number of accepted steps: a NaN in between leaves the bias correction where it was."""
    counts = []
    for losses in ([3.0, 1.0, 3.0, 1.0], [3.0, 1.0, float("nan"), 1.0, 3.0, 1.0]):
        p = torch.nn.Parameter(torch.zeros(1, dtype=FP64))
        opt, answers = ZO([("a", p)], lr=0.1, eps=0.5, rule="adam", engine="in_place"), iter([0.0, *losses])
        for _ in range(len(losses) // 2):
            opt.step(lambda answers=answers, p=p: next(answers) + 0 * float(p.detach()))
        counts.append((opt.refused, float(opt.state[p]["step"])))
    assert counts == [(0, 2.0), (1, 2.0)]


# ----------------------------------------------------------------------------------------------------------------------
# Single rules


def test_sign_moves_every_number_by_lr():
    rules.check_sign_moves_every_number_by_lr()


def test_sign_does_not_see_the_scale_of_the_loss():
    rules.check_sign_does_not_see_the_scale_of_the_loss()


def test_sign_of_nothing_is_nothing():
    start = torch.tensor([-0.0, 2.0])
    moved, _ = rules.apply(make_rule("sign"), [0.0 * rules.noise()], start=start)
    assert torch.equal(bits(moved), bits(start))


def test_sign_of_rows_and_slices_is_that_of_the_whole():
    site, direction = Site("a", (40, 13)), Sign(0.3 * rules.noise(0) - rules.noise(1))
    whole = direction.realise(site)
    rows = torch.tensor([7, 0, 39])
    assert torch.equal(direction.realise(site.take(rows)).view(3, 13), whole[rows])
    assert torch.equal(direction.realise(site.part(100, 77)), whole.view(-1)[100:177])
    skew = torch.zeros(13, 40).t()
    direction.add_to(skew, site)
    assert torch.equal(skew, whole)


def test_momentum_is_the_heavy_ball_on_the_log():
    rules.check_momentum_is_the_heavy_ball_on_the_log()


@pytest.mark.parametrize(("window", "beta"), [(32, 0.9), (3, 0.5), (1, 0.9)])
def test_replayed_momentum_is_momentum(window, beta):
    rules.check_replayed_momentum_is_momentum(window, beta)


def test_a_window_of_one_is_sgd():
    ends = [
        rules.apply(make_rule(*rule), [rules.noise(k) for k in range(5)])[0]
        for rule in (("sgd",), ("momentum_replayed", {"window": 1}))
    ]
    assert torch.equal(*ends)


def test_replayed_momentum_keeps_no_tensor_and_a_few_kilobytes(tmp_path):
    case = CASES["mlp"](FP32)
    opt = make(case, "in_place", lr=1e-3, rule="momentum_replayed")
    for _ in range(40):
        opt.step(case.closure)
    torch.save(opt.rule.state_dict(), tmp_path / "rule")
    assert len(opt.rule.state_dict()["past"]) == 32
    assert (tmp_path / "rule").stat().st_size < 16_000
    assert all(set(state) == {"step"} for state in opt.state.values())


def test_adam_is_torch_adam():
    rules.check_adam_is_torch_adam()


def test_adam_without_memory_is_sign():
    rules.check_adam_without_memory_is_sign()


def test_adamm_never_forgets_a_large_estimate():
    rules.check_adamm_never_forgets_a_large_estimate()


def test_first_step_of_adamm_is_not_corrected():
    """From zero state m / sqrt(v) = (1 - beta1) / sqrt(1 - beta2) in every coordinate, whatever g is.

    delta is below 1e-7 of sqrt(v), since the table holds no number below 1/32.
    """
    moved, _ = rules.apply(make_rule("adamm"), [3.0 * rules.noise()], lr=1.0)
    assert torch.allclose(moved.abs(), torch.full_like(moved, 0.1 / 0.001**0.5), rtol=1e-6)


def test_jaguar_keeps_what_was_not_touched():
    rules.check_jaguar_keeps_what_was_not_touched()


def test_jaguar_without_memory_is_sign():
    directions = [(k + 0.5) * rules.noise(k) for k in range(4)]
    ends = [rules.apply(make_rule(*rule), directions)[0] for rule in (("sign",), ("jaguar", {"beta": 0.0}))]
    assert torch.equal(*ends)
