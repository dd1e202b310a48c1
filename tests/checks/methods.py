"""Claims about every method that mutations must break."""

import copy
import math
import warnings
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor, nn

from tests.checks.engines import fabric, generators
from tests.support.models import CASES, Case, assert_same_bits, snapshot
from zotune.core.direction import Direction
from zotune.core.ledger import read_ledger
from zotune.optim.replaying import optimizer_for, replay


def fresh(name, dtype):
    """A case that is the same each time."""
    torch.manual_seed(0)
    return CASES[name](dtype)


def advance(opt, closure, until):
    """Steps up to a number."""
    while opt.step_number < until:
        opt.step(closure)


def check_standing_still(variant, dtype, engine):
    """lr 0: bits of weights, modules, generators as before; also the sign of zero (contracts 1, 3 and 8)."""
    case = fresh("llama", dtype)
    with torch.no_grad():
        case.named[0][1].view(-1)[:4] = -0.0
    opt = variant.optimizer(case, engine, lr=0.0)
    before, frame, state = snapshot(case), fabric(case), generators()
    advance(opt, case.closure, 4)
    assert opt.refused == 0
    assert_same_bits(before, snapshot(case))
    assert frame == fabric(case)
    assert state == generators(), "a global generator moved"
    assert all(tensor.grad is None for _, tensor in case.named)


def check_engines_agree(variant):
    """fp64, 5 steps: engines multiply in another order, a few 2**-53 per loss, amplified by 1/eps = 128 a step."""
    ends = []
    for engine in ("in_place", "layerwise"):
        case = fresh("llama", torch.float64)
        opt = variant.optimizer(case, engine)
        advance(opt, case.closure, 5)
        ends.append((case, opt.last.losses))
    assert len(ends[0][1]) == len(ends[1][1])
    for (name, one), (_, other) in zip(ends[0][0].named, ends[1][0].named, strict=True):
        assert float((one - other).detach().abs().max()) < 1e-9, name
    assert max(abs(a - b) for a, b in zip(*(e[1] for e in ends), strict=True)) < 1e-9


def check_replay(variant, path, name, dtype, engine="layerwise", steps=7):
    """Contract 5: base weights and the ledger, without a model, give the same bits."""
    case = fresh(name, dtype)
    start = snapshot(case)
    opt = variant.optimizer(case, engine, ledger=path)
    advance(opt, case.closure, steps)
    assert opt.refused == 0, "the run blew up, so it shows nothing"
    base = fresh(name, dtype)
    ledger = read_ledger(path)
    rebuilt = optimizer_for(base.named, ledger)
    replay(rebuilt, ledger.entries)
    assert any(not torch.equal(start[key], bits) for key, bits in snapshot(case).items()), "nothing moved"
    assert_same_bits(snapshot(case), snapshot(base))
    assert rebuilt.forwards == opt.forwards


def check_resume(variant, path, dtype, steps=7, fold_every=0):
    """Contract 6: through torch.save and torch.load(weights_only=True), at each step, inside a refresh period too.

    With `fold_every`, moves are waiting in most of the states.
    """
    name = "dropout_mlp"

    def begin():
        case = fresh(name, dtype)
        return case, variant.optimizer(case, fold_every=fold_every)

    whole, opt = begin()
    states = []
    for step in range(steps):
        torch.save({"model": whole.module.state_dict(), "opt": opt.state_dict()}, path.with_suffix(f".{step}"))
        states.append(path.with_suffix(f".{step}"))
        opt.step(whole.closure)
    assert opt.refused == 0
    opt.fold()
    for stop, file in enumerate(states):
        case, resumed = begin()
        state = torch.load(file, weights_only=True)
        case.module.load_state_dict(state["model"])
        resumed.load_state_dict(state["opt"])
        assert resumed.step_number == stop
        advance(resumed, case.closure, steps)
        assert resumed.last.losses == opt.last.losses, f"resumed at {stop}, the losses are others"
        resumed.fold()
        assert_same_bits(snapshot(whole), snapshot(case))


def check_saving_changes_nothing(variant):
    """A run whose state is taken after each step goes on as one whose state is never taken; states are copies."""
    plain, saved = fresh("mlp", torch.float32), fresh("mlp", torch.float32)
    one, other = variant.optimizer(plain), variant.optimizer(saved)
    advance(one, plain.closure, 6)
    for step in range(1, 7):
        advance(other, saved.closure, step)
        copy.deepcopy(other.state_dict())
    assert_same_bits(snapshot(plain), snapshot(saved))


def check_order_of_tensors(variant):
    """Noise is keyed by names. fp64: the sum over tensors inside a method may round in another order."""
    ends = []
    for turn in (1, -1):
        case = fresh("llama", torch.float64)
        opt = variant.optimizer(Case(case.named[::turn], case.closure, case.module))
        advance(opt, case.closure, 4)
        ends.append(dict(case.named))
    for name, tensor in ends[0].items():
        assert float((tensor - ends[1][name]).detach().abs().max()) < 1e-9, name


def two_tensors(factor=1.0):
    """fp64: the loss is a function of a and factor * b."""
    torch.manual_seed(1)
    a, b = torch.randn(6, 5, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    a, b = nn.Parameter(a), nn.Parameter(b / factor)
    x, y = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    return Case([("a.weight", a), ("b.weight", b)], lambda: (torch.tanh(x @ a.T) @ (factor * b).T - y).square().mean())


def check_eps_of_groups(variant):
    """A group with 4 eps moves as if its tensor were written in units of 4: exact, for 4 is a power of two."""
    scaled, plain = two_tensors(), two_tensors(4.0)
    eps = 2.0**-7
    groups = Case([{"params": scaled.named[:1]}, {"params": scaled.named[1:], "eps": 4 * eps}], scaled.closure)
    one, other = variant.optimizer(groups, eps=eps), variant.optimizer(plain, eps=eps)
    for _ in range(5):
        one.step(scaled.closure)
        other.step(plain.closure)
        assert one.last.losses == other.last.losses
    assert torch.equal(scaled.named[0][1], plain.named[0][1])
    assert torch.equal(scaled.named[1][1], 4 * plain.named[1][1])


def check_forwards(variant):
    """Contract 7: the closure runs as often as declared, counted from outside, and the optimizer counts the same."""
    case = fresh("llama", torch.float32)
    opt = variant.optimizer(case)
    calls = []

    def closure():
        calls.append(1)
        return case.closure()

    steps = variant.period * 2
    advance(opt, closure, steps)
    declared = opt.method.forwards_for([slot.site for slot in opt.weights]) * steps
    assert opt.forwards == round(declared, 9)
    assert len(calls) == opt.forwards + opt.engine.check_forwards


def held(thing, seen, depth=0):
    """Tensors reachable from a method, by storage; recipes of noise hold none."""
    if id(thing) in seen or depth > 8:
        return {}
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        return {thing.untyped_storage().data_ptr(): thing.untyped_storage().nbytes()}
    inner = []
    if isinstance(thing, dict):
        inner = list(thing.values())
    elif isinstance(thing, list | tuple | set):
        inner = list(thing)
    elif hasattr(thing, "__dict__"):
        inner = list(vars(thing).values())
    elif is_dataclass(thing) or isinstance(thing, Direction):
        inner = [getattr(thing, f.name) for f in fields(thing)]
    found = {}
    for part in inner:
        found |= held(part, seen, depth + 1)
    return found


def check_extra_memory(variant):
    """What a method and a rule keep between steps is what they declare; 64 bytes of small change per tensor are allowed."""
    case = fresh("llama", torch.float32)
    opt = variant.optimizer(case)
    sites = [slot.site for slot in opt.weights]
    advance(opt, case.closure, 5)
    opt.last = None
    kept = sum(held(opt.method, set()).values())
    declared = opt.method.extra_bytes(sites)
    assert abs(kept - declared) <= 64 * len(sites), f"method keeps {kept} bytes, declares {declared}"
    of_rule = sum(held(opt.rule, set()).values())
    of_rule += sum(t.nbytes for s in opt.state.values() for k, t in s.items() if k not in ("step", "carried"))
    declared = opt.rule.extra_bytes(sites)
    assert abs(of_rule - declared) <= 64 * len(sites), f"rule keeps {of_rule} bytes, declares {declared}"


def check_nonfinite(variant, path, bad):
    """Contract 10: a step without a finite loss leaves weights and memory alone, and replays."""
    case = fresh("mlp", torch.float32)
    opt = variant.optimizer(case, ledger=path)
    advance(opt, case.closure, 2)
    before, counts = snapshot(case), opt.refused
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step(lambda: torch.tensor(bad))
    assert opt.refused == counts + 1
    assert_same_bits(before, snapshot(case))
    advance(opt, case.closure, 6)
    assert opt.refused == 1
    base, ledger = fresh("mlp", torch.float32), read_ledger(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replay(optimizer_for(base.named, ledger), ledger.entries)
    assert_same_bits(snapshot(case), snapshot(base))


def check_equal_shapes_share_nothing(variant):
    """Two 48x48 tensors, a loss that sees both alike: the moves must not be alike.

    A shared stream gives correlation 1. Independent ones have |r| of order 1/sqrt(degrees of freedom); the fewest here are
    those of a rank-2 core, 4, whose moves still differ by their bases: below 0.5.
    """
    torch.manual_seed(2)
    named = [(f"layers.{i}.weight", nn.Parameter(torch.zeros(48, 48, dtype=torch.float64))) for i in (0, 1)]
    opt = variant.optimizer(Case(named, None), eps=1e-3)
    target = torch.randn(48, 48, dtype=torch.float64)
    advance(opt, lambda: sum((p - target).square().mean() for _, p in named), 2)
    one, other = (p.detach().flatten() for _, p in named)
    if float(one.norm()) * float(other.norm()) > 0:
        cosine = float(one @ other / (one.norm() * other.norm()))
        assert abs(cosine) < 0.5, f"cosine {cosine}"
    moved = float(one.norm()) + float(other.norm())
    assert math.isfinite(moved)
    assert moved > 0
