"""Contract 5: base weights + ledger = trained weights. Contract 6: resume equals the uninterrupted run. All bit for bit."""

import json
import math
import warnings

import pytest
import torch
from tests.checks.engines import make, steps
from tests.checks.ledger import (
    base_case,
    check_a_full_disk_loses_nothing,
    check_a_torn_last_line_is_dropped,
    check_replay_rebuilds_the_weights,
    check_resume_from_any_step,
    run_with_ledger,
)
from tests.support.models import CASES, assert_same_bits, snapshot
from torch import nn

from zotune.core.ledger import Entry, Ledger, read_ledger, sites_hash, weights_hash
from zotune.errors import ClosureError, LedgerError, StateError
from zotune.optim.optimizer import ZO
from zotune.optim.patience import PATIENCE
from zotune.optim.replaying import optimizer_for, replay


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


def lines(path):
    return path.read_text().splitlines(keepends=True)


# ----------------------------------------------------------------------------------------------------------------------
# Replay


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method_options": {"n": 3}},
        {"method_options": {"sides": 1}},
        {"noise": "rademacher", "weight_decay": 0.1},
        {"low_precision": "stochastic"},
        {"engine": "layerwise"},
    ],
    ids=str,
)
def test_replay_rebuilds_the_weights(path, dtype, settings):
    check_replay_rebuilds_the_weights(path, dtype, **settings)


def test_replay_of_a_schedule(path):
    """lr, eps and decay change from step to step: written when they change, read back exactly."""
    torch.manual_seed(0)
    case = CASES["mlp"](torch.float32)
    opt = make(case, "in_place", lr=1e-3, ledger=path)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 7)
    for step in range(6):
        opt.param_groups[0]["eps"] = 1e-3 * (1 + step // 3)
        opt.step(case.closure)
        schedule.step()
    base = base_case()
    replay(optimizer_for(base.named, read_ledger(path)), read_ledger(path).entries)
    assert_same_bits(snapshot(case), snapshot(base))


def test_replay_takes_a_path_a_file_that_was_read_or_entries(path):
    case, _ = run_with_ledger(path, steps=3)
    found = read_ledger(path)
    for ledger in (path, str(path), found, found.entries):
        base = base_case()
        replay(optimizer_for(base.named, path), ledger)
        assert_same_bits(snapshot(case), snapshot(base))


def test_replay_with_groups(path):
    """The header does not say which tensor was in which group, so the caller makes the optimizer; guessing is refused."""
    torch.manual_seed(0)
    case = CASES["mlp"](torch.float32)

    def grouped(named, ledger=None):
        return ZO(
            [{"params": named[:3]}, {"params": named[3:], "lr": 2e-4, "eps": 0.1}], lr=1e-3, eps=0.02, ledger=ledger
        )

    opt = grouped(case.named, path)
    for _ in range(4):
        opt.step(case.closure)
    base = base_case()
    with pytest.raises(LedgerError, match="2 parameter groups"):
        optimizer_for(base.named, read_ledger(path))
    replay(grouped(base.named), read_ledger(path).entries)
    assert_same_bits(snapshot(case), snapshot(base))


def test_replay_goes_on_where_the_optimizer_stands(path):
    case, _ = run_with_ledger(path, steps=6)
    base = base_case()
    opt, seen = optimizer_for(base.named, read_ledger(path)), []
    replay(opt, read_ledger(path).entries[:2])
    replay(opt, read_ledger(path).entries, progress=seen.append)
    assert seen == [2, 3, 4, 5]
    assert_same_bits(snapshot(case), snapshot(base))


def test_losses_are_read_back_exactly(path):
    """Including those that JSON has no number for."""
    ledger = Ledger(path)
    numbers = [0.1, 1 / 3, 1e-310, -0.0, 123456789.12345679, math.pi]
    header = lambda: {"ledger": 1, "groups": [{"lr": 0.1}]}  # noqa: E731
    ledger.append(header, Entry(0, numbers[0], numbers, [{"lr": 0.1}]))
    ledger.append(header, Entry(1, math.nan, [math.inf, -math.inf, math.nan], [{"lr": 0.1 / 3}]))
    entries = read_ledger(path).entries
    assert [v.hex() for v in entries[0].losses] == [v.hex() for v in numbers]
    assert entries[1].losses[:2] == [math.inf, -math.inf]
    assert math.isnan(entries[1].losses[2])
    assert math.isnan(entries[1].loss)
    assert entries[0].groups == [{"lr": 0.1}]
    assert entries[1].groups == [{"lr": 0.1 / 3}]


def test_one_line_a_step_of_constant_size(path):
    """O(steps), whatever the model: 40 steps take what 10 steps take, four times, plus the header."""
    _, opt = run_with_ledger(path, steps=10)
    header, *ten = lines(path)
    for _ in range(30):
        opt.step(lambda: float(opt.weights.slots["scale"].tensor))
    _, *forty = lines(path)
    assert len(ten) == 10
    assert len(forty) == 40
    assert max(map(len, forty)) < 150
    assert "groups" not in "".join(forty)
    assert json.loads(header)["parameters"] == opt.weights.numel


def test_the_header_says_what_is_needed_to_make_the_run_again(path):
    run_with_ledger(path, steps=1, method_options={"n": 2})
    header = read_ledger(path).header
    assert header["method"] == {"name": "mezo", "n": 2, "sides": 2}
    assert header["sites"] == sites_hash((n, p) for n, p in base_case().named)
    assert header["versions"]["torch"] == torch.__version__
    assert header["groups"] == [{"lr": 1e-3, "eps": 2.0**-7, "weight_decay": 0.0}]
    assert {"rule", "seed", "noise", "low_precision", "zotune"} <= header.keys()


def test_the_logged_loss_is_written(path):
    _, opt = run_with_ledger(path, steps=3)
    for entry in read_ledger(path).entries:
        assert entry.loss == sum(entry.losses) / 2
    assert read_ledger(path).entries[-1].losses == opt.last.losses


# ----------------------------------------------------------------------------------------------------------------------
# Damage


def test_a_torn_last_line_is_dropped(path):
    check_a_torn_last_line_is_dropped(path)


def test_a_torn_header_is_begun_again(path):
    run_with_ledger(path, steps=2)
    text = path.read_bytes()
    path.write_bytes(text[:20])
    run_with_ledger(path, steps=2)
    assert path.read_bytes() == text


@pytest.mark.parametrize("line", ['{"step": 1}', "[1, 2]", '{"step": 1, "loss": 0.5, "losses": 3}', "7"])
def test_a_line_of_another_shape_is_an_error_that_says_so(path, line):
    """Valid JSON that is no step, in the middle of the file."""
    run_with_ledger(path, steps=3)
    whole = lines(path)
    path.write_text("".join([*whole[:2], line + "\n", *whole[3:]]))
    with pytest.raises(LedgerError, match="another shape"):
        read_ledger(path)


@pytest.mark.parametrize(("at", "line"), [(1, '{"fold": 0}'), (3, '{"fold": 1}'), (3, '{"fold": "two"}')])
def test_a_fold_in_a_wrong_place_is_an_error(path, at, line):
    run_with_ledger(path, steps=3)
    whole = lines(path)
    path.write_text("".join([*whole[:at], line + "\n", *whole[at:]]))
    with pytest.raises(LedgerError, match=f"line {at + 1}: a fold after .* of {at - 1} steps"):
        read_ledger(path)


@pytest.mark.parametrize("damage", [b"{torn", b"\x00\x00\x00", b"\xff\xfe"])
def test_a_damaged_line_in_the_middle_is_an_error(path, damage):
    run_with_ledger(path, steps=4)
    kept = path.read_bytes().splitlines(keepends=True)
    kept[2] = damage + b"\n"
    path.write_bytes(b"".join(kept))
    with pytest.raises(LedgerError, match=r"line 3 is damaged .*only the last line may be"):
        read_ledger(path)


def test_a_missing_line_is_an_error(path):
    run_with_ledger(path, steps=4)
    kept = lines(path)
    path.write_text("".join(kept[:2] + kept[3:]))
    with pytest.raises(LedgerError, match="line 3: expected step 1, got 2"):
        read_ledger(path)


@pytest.mark.parametrize(
    "content", ["", '{"step": 0, "loss": 1, "losses": [1]}\n', '{"ledger": 99, "groups": []}\n', "hello\n"]
)
def test_something_else_than_a_ledger(path, content):
    path.write_text(content)
    with pytest.raises(LedgerError, match="header of format 1"):
        read_ledger(path)


def test_no_such_file(path):
    with pytest.raises(LedgerError, match="No ledger at"):
        read_ledger(path)


# ----------------------------------------------------------------------------------------------------------------------
# The wrong ledger


def _doubled(case):
    return [
        (name, nn.Parameter(torch.cat([p.detach(), p.detach()]) if p.ndim else p.detach())) for name, p in case.named
    ]


def _renamed(case):
    return [(name.replace("head", "tail"), p) for name, p in case.named]


def _recast(case):
    return [(name, nn.Parameter(p.detach().bfloat16())) for name, p in case.named]


@pytest.mark.parametrize("other", [_doubled, _renamed, _recast, lambda case: case.named[1:]])
def test_the_wrong_model(path, other):
    """Shapes, names, dtypes and the set of trained tensors all count."""
    run_with_ledger(path, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(LedgerError, match=r"its sites is .* here it is"):
            optimizer_for(other(base_case()), read_ledger(path))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"seed": 6}, "seed"),
        ({"method_options": {"n": 2}}, "method"),
        ({"noise": "gaussian"}, "noise"),
        ({"low_precision": "plain"}, "low_precision"),
    ],
)
def test_going_on_with_another_run_is_refused_before_anything_is_written(path, settings, key):
    run_with_ledger(path, steps=2)
    text = path.read_bytes()
    case = base_case()
    opt = make(case, "in_place", lr=1e-3, **settings)
    replay_steps(opt, 2)
    opt.ledger = Ledger(path)
    before = snapshot(case)
    with pytest.raises(LedgerError, match=f"its {key} is"):
        opt.step(case.closure)
    assert path.read_bytes() == text
    assert_same_bits(before, snapshot(case))


def test_a_ledger_that_is_opened_again_knows_the_last_hyperparameters(path):
    """lr is halved in step 1 and is the header's again in step 2, which another process takes: the line must say so."""

    def take(opt, closure, lrs):
        for lr in lrs:
            opt.param_groups[0]["lr"] = lr
            opt.step(closure)
        opt.ledger.close()

    whole, opt = run_with_ledger(path, steps=0)
    take(opt, whole.closure, [1e-3, 5e-4])
    again = make(whole, "in_place", lr=1e-3, ledger=path)
    again.load_state_dict(opt.state_dict())
    take(again, whole.closure, [1e-3, 1e-3])
    assert [entry.groups[0]["lr"] for entry in read_ledger(path).entries] == [1e-3, 5e-4, 1e-3, 1e-3]
    assert ["groups" in json.loads(line) for line in lines(path)[1:]] == [False, True, True, False]
    base = base_case()
    replay(optimizer_for(base.named, read_ledger(path)), read_ledger(path).entries)
    assert_same_bits(snapshot(whole), snapshot(base))


def replay_steps(opt, steps):
    """Put the optimizer at a step without moving anything."""
    opt.param_groups[0]["zo_step"] = steps


def test_another_base_model(path):
    case = base_case()
    opt = make(case, "in_place", lr=1e-3, ledger=Ledger(path, base={"model": "tiny"}))
    opt.step(case.closure)
    assert read_ledger(path).header["base"] == {"model": "tiny"}
    optimizer_for(base_case().named, read_ledger(path))
    with pytest.raises(LedgerError, match="its base is"):
        optimizer_for(base_case().named, read_ledger(path), base={"model": "huge"})


def test_a_ledger_that_stands_elsewhere(path):
    run_with_ledger(path, steps=3)
    case = base_case()
    with pytest.raises(LedgerError, match="holds 3 steps, but the optimizer stands at step 0"):
        make(case, "in_place", lr=1e-3, ledger=path).step(case.closure)
    opt = make(case, "in_place", lr=1e-3, ledger=path.with_name("new.jsonl"))
    replay_steps(opt, 3)
    with pytest.raises(LedgerError, match="begins at step 0"):
        opt.step(case.closure)


@pytest.mark.parametrize(("change", "message"), [(1, "holds 1 losses more"), (-1, "more losses than the ledger holds")])
def test_other_numbers_of_losses_than_the_method_asks_for(path, change, message):
    run_with_ledger(path, steps=1)
    (entry,) = read_ledger(path).entries
    losses = [*entry.losses, 1.0] if change > 0 else entry.losses[:-1]
    path.write_text(lines(path)[0] + json.dumps({"step": 0, "loss": 1.0, "losses": losses}) + "\n")
    with pytest.raises(LedgerError, match=message):
        replay(optimizer_for(base_case().named, read_ledger(path)), read_ledger(path).entries)


# ----------------------------------------------------------------------------------------------------------------------
# Losses that are not finite


def _flaky(case, bad_at):
    calls = []

    def closure():
        calls.append(None)
        return math.nan if len(calls) in bad_at else case.closure()

    return closure


def test_refused_steps_are_recorded_and_replayed(path):
    torch.manual_seed(0)
    case = CASES["mlp"](torch.float32)
    opt = make(case, "in_place", lr=1e-3, ledger=path)
    closure = _flaky(case, {4, 5, 9})  # call 1 is the survey
    with pytest.warns(UserWarning, match="was refused"):
        steps(opt, closure, 6)
    assert opt.refused == 2
    entries = read_ledger(path).entries
    assert [all(map(math.isfinite, e.losses)) for e in entries] == [True, False, True, False, True, True]
    base = base_case()
    rebuilt = optimizer_for(base.named, read_ledger(path))
    with pytest.warns(UserWarning, match="was refused"):
        replay(rebuilt, entries)
    assert_same_bits(snapshot(case), snapshot(base))
    assert rebuilt.refused == 2


def test_a_run_that_was_stopped_for_nonfinite_losses_can_go_on(path):
    """The last refused step is in the ledger, so the optimizer stands behind it; a replay is not stopped by it."""
    torch.manual_seed(0)
    case = CASES["mlp"](torch.float32)
    opt = make(case, "in_place", lr=1e-3, ledger=path)
    opt.step(case.closure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ClosureError, match="not been a finite number"):
            steps(opt, lambda: math.inf, PATIENCE)
        assert opt.step_number == PATIENCE + 1
        opt.step(case.closure)
        assert len(read_ledger(path).entries) == PATIENCE + 2
        base = base_case()
        replay(optimizer_for(base.named, read_ledger(path)), read_ledger(path).entries)
    assert_same_bits(snapshot(case), snapshot(base))


# ----------------------------------------------------------------------------------------------------------------------
# A full disk


@pytest.mark.parametrize("short", [True, False], ids=["short write", "error"])
@pytest.mark.parametrize("room", [0, 1, 30])
def test_a_full_disk_loses_nothing(path, short, room):
    check_a_full_disk_loses_nothing(path, room, short)


@pytest.mark.parametrize("rule", ["sgd", "adam"])
def test_a_step_that_broke_off_while_weights_moved_is_the_last(path, rule, monkeypatch):
    """Ctrl-C in a notebook: some tensors have moved. No more steps, no state, and a ledger that holds the whole step."""
    whole, _ = run_with_ledger(path, steps=3, rule=rule)
    path.unlink()
    case, opt = run_with_ledger(path, steps=2, rule=rule)
    saved = opt.state_dict()
    with monkeypatch.context() as patch:
        patch.setattr(opt.weights, "update_all", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step(case.closure)
    for tried in (lambda: opt.step(case.closure), lambda: opt.query(case.closure), opt.fold, opt.state_dict):
        with pytest.raises(StateError, match="Step 2 broke off while it moved the weights"):
            tried()
    assert opt.step_number == 2
    base = base_case()
    replay(optimizer_for(base.named, read_ledger(path)), read_ledger(path).entries)
    assert_same_bits(snapshot(whole), snapshot(base))
    opt.load_state_dict(saved)
    with pytest.raises(LedgerError, match="holds 3 steps, but the optimizer stands at step 2"):
        opt.step(case.closure)


def test_a_fold_that_broke_off_is_the_last_thing(path, monkeypatch):
    case, opt = run_with_ledger(path, steps=2, method="lozo", fold_every=5)
    with monkeypatch.context() as patch:
        patch.setattr(opt.folding, "fold", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.fold()
    with pytest.raises(StateError, match="The fold after 2 steps broke off"):
        opt.step(case.closure)


def test_a_line_that_was_cut_off_is_taken_back(path, monkeypatch):
    """Ctrl-C while it is written: nothing has moved. The step counts as cut off, the file holds whole steps."""
    case, opt = run_with_ledger(path, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(json, "dumps", interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step(case.closure)
    assert len(read_ledger(path).entries) == 2
    with pytest.raises(StateError):
        opt.step(case.closure)


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_step_is_written_before_it_moves_the_weights(path, monkeypatch):
    """A process killed in between: the replay takes the step."""
    whole, _ = run_with_ledger(path, steps=3)
    path.unlink()

    class Killed(Exception):
        pass

    case, opt = run_with_ledger(path, steps=2)

    def killed(estimate):
        raise Killed

    monkeypatch.setattr(opt, "_move", killed)
    with pytest.raises(Killed):
        opt.step(case.closure)
    base = base_case()
    replay(optimizer_for(base.named, read_ledger(path)), read_ledger(path).entries)
    assert_same_bits(snapshot(whole), snapshot(base))


def test_the_end_of_a_run(path):
    case, opt = run_with_ledger(path, steps=2)
    opt.ledger.end(opt.describe, 2, weights_hash(case.named))
    assert read_ledger(path).weights == weights_hash(case.named)
    opt.step(case.closure)  # a longer run after all
    assert read_ledger(path).weights is None
    assert len(read_ledger(path).entries) == 3
    opt.ledger.sync()
    opt.ledger.close()
    opt.ledger.end(opt.describe, 3, weights_hash(case.named))  # by a process that had no step left to take
    opt.ledger.close()
    assert read_ledger(path).weights == weights_hash(case.named)
    with pytest.raises(LedgerError, match="holds 3 steps, but the optimizer stands at step 2"):
        opt.ledger.end(opt.describe, 2, weights_hash(case.named))


# ----------------------------------------------------------------------------------------------------------------------
# Contract 6: resume


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("engine", ["in_place", "layerwise"])
def test_resume_from_any_step(tmp_path, dtype, engine):
    check_resume_from_any_step(tmp_path / "snapshot.pt", dtype, engine)


def test_resume_by_replay_equals_resume_by_snapshot(path):
    """Both ways to stand at step 3 lead to the same bits and the same ledger."""
    whole, _ = run_with_ledger(path, steps=6, dtype=torch.bfloat16)
    text = path.read_bytes()
    path.write_text("".join(lines(path)[:4]))
    case = base_case(dtype=torch.bfloat16)
    opt = make(case, "in_place", lr=1e-3, ledger=path)
    replay(opt, read_ledger(path).entries)
    while opt.step_number < 6:
        opt.step(case.closure)
    assert path.read_bytes() == text
    assert_same_bits(snapshot(whole), snapshot(case))


# ----------------------------------------------------------------------------------------------------------------------
# Hashes


def test_hashes_tell_models_apart():
    a = [("x", torch.zeros(2, 3)), ("y", torch.zeros(3))]
    assert sites_hash(a) == sites_hash(a[::-1])
    assert weights_hash(a) == weights_hash(a[::-1])
    others = [
        [("x", torch.zeros(3, 2)), ("y", torch.zeros(3))],
        [("x", torch.zeros(2, 3)), ("z", torch.zeros(3))],
        [("x", torch.zeros(2, 3)), ("y", torch.zeros(3).bfloat16())],
        a[:1],
    ]
    assert len({sites_hash(n) for n in (a, *others)}) == 5
    assert len({weights_hash(n) for n in (a, *others, [("x", -torch.zeros(2, 3)), ("y", torch.zeros(3))])}) == 6
    assert weights_hash([("s", torch.tensor(1.0).bfloat16())]) != weights_hash([("s", torch.tensor(2.0).bfloat16())])
