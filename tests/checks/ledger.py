"""Claims about ledgers that mutations must break."""

import torch

from tests.checks.engines import make
from tests.support.models import CASES, assert_same_bits, snapshot
from zotune.core.ledger import read_ledger, weights_hash
from zotune.replay import optimizer_for, replay


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
