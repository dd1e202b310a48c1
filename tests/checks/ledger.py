"""Claims about ledgers that mutations must break."""

import errno

import pytest
import torch

from tests.checks.engines import make
from tests.support.models import CASES, assert_same_bits, snapshot
from zotune.core.ledger import read_ledger, weights_hash
from zotune.optim.replaying import optimizer_for, replay


def run_with_ledger(path, name="mlp", dtype=torch.float32, steps=5, closure=None, **settings):
    """A short run that writes a ledger. The case is made from seed 0, so the base weights can be made again."""
    torch.manual_seed(0)
    case = CASES[name](dtype)
    opt = make(case, settings.pop("engine", "in_place"), lr=1e-3, ledger=path, **settings)
    for _ in range(steps):
        opt.step(closure or case.closure)
    assert opt.refused == 0, "the run blew up, so it shows nothing"
    return case, opt


def base_case(name="mlp", dtype=torch.float32):
    torch.manual_seed(0)
    return CASES[name](dtype)


def check_replay_rebuilds_the_weights(path, dtype=torch.float32, **settings):
    """M6, contract 5: base weights and the ledger, without a model, give the same bits."""
    case, opt = run_with_ledger(path, dtype=dtype, **settings)
    base = base_case(dtype=dtype)
    rebuilt = optimizer_for(base.named, read_ledger(path))
    replay(rebuilt, read_ledger(path).entries)
    assert_same_bits(snapshot(case), snapshot(base))
    assert weights_hash(case.named) == weights_hash(base.named)
    assert rebuilt.step_number == opt.step_number
    return case, base


def check_a_torn_last_line_is_dropped(path):
    """A process killed while it wrote step 4: the run goes on from step 4, and ends with the bits of a whole run."""
    whole, _ = run_with_ledger(path, steps=6)
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    for cut in (1, len(lines[5]) // 2, len(lines[5]) - 1):
        path.write_bytes(b"".join(lines[:5]) + lines[5][:cut])
        found = read_ledger(path)
        assert len(found.entries) == 4
        assert found.torn
        case = base_case()
        opt = make(case, "in_place", lr=1e-3, ledger=path)
        replay(opt, found.entries)
        while opt.step_number < 6:
            opt.step(case.closure)
        opt.ledger.close()
        assert path.read_bytes() == text, "the ledger of the continued run is not that of the whole run"
        assert_same_bits(snapshot(whole), snapshot(case))


class FullDisk:
    """A raw file that takes `room` more bytes, then raises or writes short as a file system does."""

    def __init__(self, file, room, short):
        self.file, self.room, self.short = file, room, short

    def write(self, data):
        if len(data) <= self.room:
            self.room -= len(data)
            return self.file.write(data)
        written = self.file.write(data[: self.room])
        self.room = 0
        if self.short:
            return written
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)


def check_a_full_disk_loses_nothing(path, room=30, short=True):
    """The failing step moves nothing; what was acknowledged is there; with room again, the run ends as a whole run does."""
    whole, whole_opt = run_with_ledger(path, steps=6)
    whole_opt.ledger.close()
    text = path.read_bytes()
    path.unlink()
    case, opt = run_with_ledger(path, steps=3)
    three = path.read_bytes()
    opt.ledger._file = FullDisk(opt.ledger._file, room, short)
    before = snapshot(case)
    with pytest.raises(OSError, match=r"No space|disk is full"):
        opt.step(case.closure)
    assert_same_bits(before, snapshot(case))
    assert opt.step_number == 3
    assert path.read_bytes() == three
    assert len(read_ledger(path).entries) == 3
    while opt.step_number < 6:
        opt.step(case.closure)
    opt.ledger.close()
    assert path.read_bytes() == text
    assert_same_bits(snapshot(whole), snapshot(case))


def check_resume_from_any_step(path, dtype, engine):
    """Model and optimizer through torch.save and torch.load(weights_only=True), at each step of five; with a schedule."""

    def fresh():
        torch.manual_seed(0)
        case = CASES["dropout_mlp"](dtype)
        opt = make(case, engine, lr=1e-3, method_options={"n": 2})
        return case, opt, torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)

    def advance(case, opt, schedule, until):
        while opt.step_number < until:
            opt.step(case.closure)
            schedule.step()

    whole = fresh()
    advance(*whole, 5)
    assert whole[1].refused == 0
    for stop in range(6):
        first = fresh()
        advance(*first, stop)
        torch.save([first[0].module.state_dict(), first[1].state_dict(), first[2].state_dict()], path)
        resumed = fresh()
        states = torch.load(path, weights_only=True)
        for what, state in zip((resumed[0].module, *resumed[1:]), states, strict=True):
            what.load_state_dict(state)
        assert resumed[1].step_number == stop
        advance(*resumed, 5)
        assert_same_bits(snapshot(whole[0]), snapshot(resumed[0]))
        assert stop == 5 or resumed[1].last.losses == whole[1].last.losses
        carried = [[slot.carried for slot in opt.weights] for opt in (whole[1], resumed[1])]
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(*carried, strict=True))
