"""Moves that wait as factors: the same run as one that folds at once, and bit for bit itself after replay and resume."""

import copy
import math
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.checks.engines import make, steps
from tests.checks.mezo import SEED, twin_model
from tests.support.models import CASES, assert_same_bits, snapshot

from zotune.core.direction import Combination, Noise
from zotune.core.factors import Factors
from zotune.core.grids import grid_bits
from zotune.core.ledger import read_ledger
from zotune.core.low_rank import LowRank, normal_matrix
from zotune.core.noise import stream
from zotune.core.pending import MAX_COLUMNS, Pending, low_rank_parts, moves_of
from zotune.core.site import Site
from zotune.core.weights import Weights
from zotune.engines import ENGINES
from zotune.errors import ClosureError, ConfigError, LedgerError, StateError
from zotune.optim.folding import Folding
from zotune.optim.optimizer import ZO
from zotune.optim.replaying import optimizer_for, replay

LOZO = {"method": "lozo", "method_options": {"rank": 2, "interval": 6}}
METHODS = [
    LOZO,
    {"method": "lozo", "method_options": {"rank": 2, "interval": 6, "momentum": 0.9}},
    {"method": "lozo", "method_options": {"rank": 1, "interval": 6}, "noise": "gaussian"},
    {"method": "subzero", "method_options": {"rank": 2, "interval": 6}},
    {"method": "subzero", "method_options": {"rank": 2, "interval": 6, "n": 3, "sides": 1, "reshape": "always"}},
    {"method": "pgap", "method_options": {"rank": 2, "h": 2, "k": 6, "horizon": 20}},
    {"method": "kerzoo", "method_options": {"source": "lozo", "source_options": {"rank": 2, "interval": 6}}},
]
methods = pytest.mark.parametrize("settings", METHODS, ids=str)
TOLD = {"lr": 0.02, "eps": 1e-2, "seed": SEED}


def run(settings, count, fold_every, groups=False):
    """(the optimizer, named tensors, losses) of a run on the fp64 twin model."""
    named, loss = twin_model()
    params = [{"params": named[:2]}, {"params": named[2:], "lr": 0.01, "eps": 0.02}] if groups else named
    opt = ZO(params, fold_every=fold_every, engine="in_place", **{**TOLD, **settings})
    losses = [float(opt.step(lambda: loss(dict(named)))) for _ in range(count)]
    return opt, named, losses


def matrices(opt):
    return [slot for slot in opt.weights if slot.tensor.dim() == 2]


# ----------------------------------------------------------------------------------------------------------------------
# The same run


@methods
@pytest.mark.parametrize("groups", [False, True])
def test_a_folded_run_is_the_eager_one(settings, groups):
    """In fp64: sums on grids of 23 bits differ from it by about 2**-20 of a move each; losses by what that moves them."""
    eager, expected, losses = run(settings, 14, 0, groups)
    opt, named, found = run(settings, 14, 4, groups)
    assert opt.folding.pending.names == [slot.site.name for slot in matrices(opt)]
    opt.fold()
    start = dict(twin_model()[0])
    for (name, ours), (_, theirs) in zip(named, expected, strict=True):
        moved = float((theirs - start[name]).detach().norm())
        assert moved > 1e-3, "nothing moved, so nothing was compared"
        assert float((ours - theirs).detach().norm()) < 2e-5 * moved, name
    assert found == pytest.approx(losses, rel=1e-5)
    assert eager.forwards == opt.forwards


def test_only_the_matrices_wait_and_only_between_folds():
    named, loss = twin_model()
    opt = ZO(named, fold_every=3, engine="in_place", **TOLD, **LOZO)
    for step in range(1, 8):
        before = {name: p.detach().clone() for name, p in named}
        opt.step(lambda: loss(dict(named)))
        for name, p in named:
            assert torch.equal(p, before[name]) == (p.dim() == 2 and step % 3 != 0), f"{name} after {step} steps"
        assert bool(opt.folding.pending) == (step % 3 != 0)


@methods
def test_a_new_interval_folds_first(settings):
    """Moves that share no factor with what is pending: V changes at step 6, so the steps before it are folded then."""
    named, loss = twin_model()
    opt = ZO(named, fold_every=1000, engine="in_place", **{**TOLD, **settings})
    start = {slot.site.name: slot.tensor.detach().clone() for slot in matrices(opt)}
    for step in range(8):
        opt.step(lambda: loss(dict(named)))
        lags = all(torch.equal(slot.tensor, start[slot.site.name]) for slot in matrices(opt))
        assert lags == (step < 6), f"step {step}"


@pytest.mark.parametrize("interval", [1, 2])
def test_short_intervals_fold_in_each(interval):
    settings = {"method": "lozo", "method_options": {"rank": 2, "interval": interval}}
    _, expected, _ = run(settings, 7, 0)
    opt, named, _ = run(settings, 7, 50)
    opt.fold()
    for (_, ours), (_, theirs) in zip(named, expected, strict=True):
        # grids of 23 bits: about 2**-20 of moves below 1
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
def test_parts_of_the_weights_that_count(turned, dtype, pending):
    """Methods may read a tensor a part at a time; the parts of a transposed one are no runs of memory."""
    values = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = Weights([("w", torch.nn.Parameter(values.t().contiguous().t() if turned else values))])
    weights.slots["w"].carried = torch.arange(30, dtype=torch.int16).view(5, 6) if dtype == torch.bfloat16 else None
    folding, site = Folding(weights, 10, low_rank=True), weights.slots["w"].site
    if pending:
        low_rank = LowRank({"w": Factors.of(torch.randn(5, 2), torch.randn(6, 2))})
        folding.pending.absorb(moves_of(1.0 * low_rank, [site])[0])
    whole = folding.weight(site)
    assert whole.shape == (30,)
    assert torch.allclose(whole, values.float().reshape(-1), rtol=0.02, atol=0.0) is not pending  # carried: half a unit
    pieces = [folding.weight(site.part(start, count)) for start, count in ((0, 7), (7, 20), (27, 3))]
    assert torch.equal(torch.cat(pieces), whole)


def test_queries_and_methods_see_the_weights_that_count():
    """What is asked is pending + point, and `ctx.weight` has it too."""
    opt, named, _ = run(LOZO, 3, 100)
    asked, losses = [], opt.engine.losses
    opt.engine.losses = lambda points, *rest: asked.append(points) or losses(points, *rest)
    seen, estimate = {}, opt.method.estimate

    def looks(ctx):
        seen.update({site.name: ctx.weight(site) for site in ctx.sites})
        return estimate(ctx)

    opt.method.estimate = looks
    pending = opt.folding.pending.direction()
    opt.query(lambda: float(sum(p.detach().square().sum() for _, p in named)))
    with opt.folded():
        folded = {name: p.detach().clone() for name, p in named}
    for name, p in named:
        site = Site(name, tuple(p.shape))
        assert torch.equal(seen[name].view_as(p), folded[name])
        plus, minus = (point.realise(site, torch.float64) for point in asked[0])
        assert torch.allclose((plus + minus) / 2, pending.realise(site, torch.float64), rtol=0, atol=1e-15)
        assert float((plus - minus).norm()) > 1e-3
        if p.dim() == 2:
            assert len(asked[0][0].leaves(site)) == 2, "engines get two low-rank terms"
            (_, waiting), (_, fresh) = asked[0][0].leaves(site)
            assert waiting.factors[name].kept is fresh.factors[name].kept, "with one factor in common"


# ----------------------------------------------------------------------------------------------------------------------
# Contract 3: nothing moves with lr 0, and nothing stays moved


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lr_zero_changes_no_bit(dtype):
    case = CASES["mlp"](dtype)
    opt = make(case, "layerwise", lr=0.0, fold_every=3, **LOZO)
    before = snapshot(case)
    steps(opt, case.closure, 5)
    assert not opt.folding.pending
    opt.fold()
    assert_same_bits(before, snapshot(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settled", [False, True])
def test_folded_shows_the_weights_and_puts_all_bits_back(dtype, settled):
    """Also after an exception, and whether there were carried bits before or not; the run goes on as if it had not been."""
    ends = []
    for looks in (False, True):
        torch.manual_seed(0)
        case = CASES["mlp"](dtype)
        opt = make(case, "in_place", lr=1e-3, fold_every=4, **LOZO)
        steps(opt, case.closure, 6 if settled else 2)
        if looks:
            carried = {name: slot.carried is None for name, slot in opt.weights.slots.items()}
            before = snapshot(case)
            with opt.folded():
                inside = snapshot(case)
                assert not opt.folding.pending
            assert_same_bits(before, snapshot(case))
            assert {name: slot.carried is None for name, slot in opt.weights.slots.items()} == carried
            with pytest.raises(ZeroDivisionError), opt.folded():
                assert 1 / 0
            assert_same_bits(before, snapshot(case))
            with opt.folded():
                assert_same_bits(inside, snapshot(case))
        steps(opt, case.closure, 3)
        opt.fold()
        ends.append(snapshot(case))
    assert_same_bits(*ends)


@pytest.mark.parametrize("low_precision", ["carry", "stochastic"])
def test_folded_is_what_a_fold_writes(low_precision):
    """With the same random bits, where there are any."""
    torch.manual_seed(0)
    case = CASES["mlp"](torch.bfloat16)
    opt = make(case, "in_place", lr=1e-3, fold_every=10, low_precision=low_precision, **LOZO)
    steps(opt, case.closure, 3)
    with opt.folded():
        inside = snapshot(case)
    opt.fold()
    assert_same_bits(inside, snapshot(case))
    with opt.folded():  # nothing is pending
        assert_same_bits(inside, snapshot(case))


def test_a_step_inside_folded_is_refused():
    opt, named, _ = run(LOZO, 2, 10)
    with pytest.raises(ClosureError, match=r"inside folded\(\) would be lost"), opt.folded():
        opt.step(lambda: float(named[0][1].sum()))


# ----------------------------------------------------------------------------------------------------------------------
# Contracts 5 and 6: replay and resume, bit for bit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [METHODS[0], METHODS[1], METHODS[3], {**LOZO, "low_precision": "stochastic"}], ids=str
)
def test_replay_rebuilds_the_weights(tmp_path, dtype, settings):
    path = tmp_path / "ledger.jsonl"
    torch.manual_seed(0)
    case = CASES["mlp"](dtype)
    opt = make(case, "layerwise", lr=1e-3, ledger=path, fold_every=4, **settings)
    steps(opt, case.closure, 10)
    torch.manual_seed(0)
    base, ledger = CASES["mlp"](dtype), read_ledger(path)
    again = optimizer_for(base.named, ledger)
    assert again.folding.every == 4
    replay(again, ledger.entries)
    assert_same_bits(snapshot(case), snapshot(base))  # the stored weights lag alike
    opt.fold()
    again.fold()
    assert_same_bits(snapshot(case), snapshot(base))
    other = CASES["mlp"](dtype)
    with pytest.raises(LedgerError, match="fold_every"):
        make(other, "in_place", lr=1e-3, ledger=path, **settings).step(other.closure)


ONE_V = {"method": "lozo", "method_options": {"rank": 2, "interval": 20}}  # a new V would fold by itself


def folded_by_hand(path, dtype, stop=None):
    """Ten steps with folds after 4 and 8, and two more asked for, after 2 and 7. `stop`: the state after so many steps."""
    torch.manual_seed(0)
    case = CASES["mlp"](dtype)
    opt = make(case, "in_place", lr=1e-3, ledger=path, fold_every=4, **ONE_V)
    state = None
    for step in range(1, 11):
        opt.step(case.closure)
        if step == stop:
            state = copy.deepcopy(opt.state_dict()), {name: p.detach().clone() for name, p in case.named}
        if step in (2, 7):
            opt.fold()
    return case, opt, state


def rebuilt(path, dtype, entries=None):
    torch.manual_seed(0)
    base, ledger = CASES["mlp"](dtype), read_ledger(path)
    again = optimizer_for(base.named, ledger)
    replay(again, ledger.entries if entries is None else entries)
    return with_carried(base, again)


def with_carried(case, opt):
    """Bits of the tensors, and of what is carried beside them."""
    carried = {f"{name} carried": s.carried for name, s in opt.weights.slots.items() if s.carried is not None}
    return {**snapshot(case), **{name: bits.clone() for name, bits in carried.items()}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_replay_folds_where_the_run_was_folded_by_hand(tmp_path, dtype):
    """A fold elsewhere rounds elsewhere, which shows that it matters; of bf16 in the carried bits."""
    path = tmp_path / "ledger.jsonl"
    case, opt, _ = folded_by_hand(path, dtype)
    entries = read_ledger(path).entries
    assert [entry.step for entry in entries if entry.folded] == [1, 6]
    found = rebuilt(path, dtype)
    assert_same_bits(with_carried(case, opt), found)
    other = rebuilt(path, dtype, [replace(entry, folded=False) for entry in entries])
    assert any(not torch.equal(found[name], other[name]) for name in found)
    opt.fold()  # after 10 steps, two of them pending
    assert read_ledger(path).entries[-1].folded
    assert_same_bits(with_carried(case, opt), rebuilt(path, dtype))


def test_a_fold_is_in_the_ledger_before_it_is_made(tmp_path, monkeypatch):
    """As steps are: killed in between, the run is what its ledger says. And a run that had ended has not, after a fold."""
    path = tmp_path / "ledger.jsonl"
    torch.manual_seed(0)
    case = CASES["mlp"](torch.float32)
    opt = make(case, "in_place", lr=1e-3, ledger=path, fold_every=4, **LOZO)
    steps(opt, case.closure, 2)
    opt.ledger.end(opt.describe, 2, "a hash")
    assert read_ledger(path).weights == "a hash"
    monkeypatch.setattr(opt.folding, "fold", lambda *where: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        opt.fold()
    assert [entry.folded for entry in read_ledger(path).entries] == [False, True]
    assert read_ledger(path).weights is None
    monkeypatch.undo()
    with pytest.raises(StateError, match="The fold after 2 steps broke off"):
        opt.fold()  # for all it knows, some tensors were folded
    with torch.no_grad():
        opt.folding.fold(opt.seed, opt.step_number)  # nothing was, here
    assert_same_bits(with_carried(case, opt), rebuilt(path, torch.float32))


def test_folds_that_write_nothing_are_not_in_the_ledger(tmp_path):
    """Nothing pending after a fold that was due, and dense moves, which are late without another bit."""
    path = tmp_path / "ledger.jsonl"
    for settings in (LOZO, {"method": "mezo"}):
        torch.manual_seed(0)
        case = CASES["mlp"](torch.float32)
        opt = make(case, "layerwise", lr=1e-3, ledger=path, fold_every=4, **settings)
        opt.fold()
        steps(opt, case.closure, 4)
        opt.fold()
        if settings != LOZO:
            opt.step(case.closure)
            opt.fold()
        opt.ledger.close()
        assert 'fold":' not in path.read_text().partition("\n")[2]
        path.unlink()


@pytest.mark.parametrize("stop", [6, 7])
def test_a_state_older_than_a_fold_in_the_ledger(tmp_path, stop):
    """Killed after the fold, before the next state was saved: replay makes the fold; steps that lack it are refused."""
    path = tmp_path / "ledger.jsonl"
    whole, first, (state, weights) = folded_by_hand(path, torch.bfloat16, stop)
    text = path.read_text().splitlines(keepends=True)
    upto = next(number for number, line in enumerate(text) if '"fold": 7' in line)
    for replays in (True, False)[: stop - 5]:
        path.write_text("".join(text[: upto + 1]))
        torch.manual_seed(0)
        case = CASES["mlp"](torch.bfloat16)
        for name, p in case.named:
            p.data.copy_(weights[name])
        opt = make(case, "in_place", lr=1e-3, ledger=path, fold_every=4, **ONE_V)
        opt.load_state_dict(state)
        assert opt.folding.pending
        if not replays:
            with pytest.raises(LedgerError, match=r"folded after step 7; this optimizer's state is older.*Replay"):
                opt.step(case.closure)
            continue
        replay(opt, read_ledger(path).entries)
        assert not opt.folding.pending
        steps(opt, case.closure, 3)
        opt.ledger.close()
        assert path.read_text() == "".join(text)
        assert_same_bits(with_carried(whole, first), with_carried(case, opt))


@methods
@pytest.mark.parametrize("stop", [1, 5, 6, 8])
def test_resume_in_the_middle_of_a_period(tmp_path, settings, stop):
    """Folds after 4 and 8 steps, new factors in step 6."""
    check_resume(tmp_path, settings, stop, torch.float32, "in_place")


def check_resume(tmp_path, settings, stop, dtype, engine):
    """Model and optimizer state, saved with moves pending, and continued by others."""

    def begin():
        torch.manual_seed(0)
        case = CASES["mlp"](dtype)
        return case, make(case, engine, lr=1e-3, fold_every=4, **settings)

    whole, opt = begin()
    steps(opt, whole.closure, stop)
    state = {"opt": opt.state_dict(), "weights": {name: p.detach().clone() for name, p in whole.named}}
    torch.save(state, tmp_path / "state.pt")
    waited = bool(opt.folding.pending)
    steps(opt, whole.closure, 11 - stop)
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    again, resumed = begin()
    for name, p in again.named:
        p.data.copy_(kept["weights"][name])
    resumed.load_state_dict(kept["opt"])
    assert bool(resumed.folding.pending) == waited == (stop % 4 != 0)
    steps(resumed, again.closure, 11 - stop)
    assert_same_bits(snapshot(whole), snapshot(again))
    opt.fold()
    resumed.fold()
    assert_same_bits(snapshot(whole), snapshot(again))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_on_every_engine(tmp_path, engine, dtype):
    """Engines that multiply what factors have in common only once must find the same in common after loading."""
    check_resume(tmp_path, LOZO, 3, dtype, engine)


@methods
def test_after_loading_the_methods_own_tensors_are_shared_again(settings):
    opt = run(settings, 2, 100)[0]
    named, loss = twin_model()
    other = ZO(named, fold_every=100, engine="in_place", **{**TOLD, **settings})
    other.load_state_dict(opt.state_dict())
    asked, losses = [], other.engine.losses
    other.engine.losses = lambda points, *rest: asked.extend(points) or losses(points, *rest)
    other.query(lambda: loss(dict(named)))
    for slot in matrices(other):
        for point in asked:
            kept = [leaf.factors[slot.site.name].kept for _, leaf in point.leaves(slot.site)]
            assert all(each is kept[0] for each in kept)


def test_a_saved_state_does_not_move_with_the_run():
    opt, named, _ = run(LOZO, 2, 10)
    state = opt.state_dict()
    (piece,) = state["param_groups"][0]["zo_pending"]
    before = piece["values"].clone()
    opt.step(lambda: float(named[0][1].sum()))
    assert torch.equal(piece["values"], before)
    other = run(LOZO, 0, 10)[0]
    other.load_state_dict(state)
    piece["values"].zero_()
    assert float(other.folding.pending.direction().realise(matrices(other)[0].site).norm()) > 0


def test_a_state_with_pending_moves_needs_a_run_that_folds():
    state = run(LOZO, 2, 10)[0].state_dict()
    with pytest.raises(ConfigError, match="fold_every of the run that was saved"):
        run(LOZO, 0, 0)[0].load_state_dict(state)
    run(LOZO, 0, 0)[0].load_state_dict(run(LOZO, 10, 10)[0].state_dict())  # nothing is pending in it
    old = run(LOZO, 2, 0)[0].state_dict()
    del old["param_groups"][0]["zo_pending"]  # as of a run before there was such a thing
    run(LOZO, 0, 0)[0].load_state_dict(old)


def test_refused_steps_move_nothing_and_folds_keep_their_place():
    named, loss = twin_model()
    opt = ZO(named, fold_every=3, engine="in_place", **TOLD, **LOZO)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1, 10):
            waiting = opt.folding.pending.state_dict()
            opt.step(lambda bad=step % 2 == 0: math.nan if bad else loss(dict(named)))
            if step % 2 == 0 and step % 3:
                assert opt.folding.pending.state_dict() == waiting
            assert bool(opt.folding.pending) == (step % 3 != 0 and step != 4)  # step 3 folds, step 4 is refused
    assert opt.refused == 4


# ----------------------------------------------------------------------------------------------------------------------
# What cannot wait


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "forward_grad", "method_options": {"source": "lozo"}}, "differentiates at the stored weights"),
        ({**LOZO, "rule": "sign"}, "rule 'sign' are not multiples of the estimate.*use rule sgd"),
        ({**LOZO, "rule": "momentum"}, "rule 'momentum' are not multiples"),
        ({**LOZO, "rule": "adam"}, "rule 'adam' are not multiples"),
        ({**LOZO, "weight_decay": 0.1}, "weight decay moves every number by itself"),
        ({**LOZO, "fold_every": -1}, "fold_every must be at least 0 steps.*got -1"),
    ],
    ids=str,
)
def test_what_cannot_wait_is_refused_before_any_work(settings, message):
    with pytest.raises(ConfigError, match=message):
        ZO(twin_model()[0], **{"fold_every": 5, **settings})


def test_a_schedule_that_begins_to_decay_is_refused_before_any_forward():
    opt, _, _ = run(LOZO, 1, 5)
    opt.param_groups[0]["weight_decay"] = 0.1
    with pytest.raises(ConfigError, match="set weight_decay to 0"):
        opt.step(lambda: pytest.fail("a loss was asked for"))


# ----------------------------------------------------------------------------------------------------------------------
# Sums of factors

SITES = [Site("tall", (7, 4)), Site("wide", (3, 9)), Site("bias", (7,))]
SHAPES = {"tall": ((7, 2), (4, 2)), "wide": ((3, 2), (9, 2))}


def factors_of(number, name, fresh="left"):
    """Factors of which the other side is the same for each number."""
    left, right = (normal_matrix(stream(4), Site(name, ()), side, shape, "normal").float() for side, shape in zip("lr", SHAPES[name], strict=True))  # fmt: skip  # noqa: E501
    new = normal_matrix(stream(number), Site(name, ()), "new", SHAPES[name][0 if fresh == "left" else 1]).float()
    return replace(Factors.of(new, right) if fresh == "left" else Factors.of(left, new), fresh=fresh)


coefficients = st.lists(
    st.tuples(st.floats(-1, 1).filter(lambda x: x == 0 or abs(x) > 1e-3), st.integers(-40, 20)), min_size=1, max_size=12
)


@given(coefficients)
def test_sums_are_near_exact_on_their_grids_and_in_any_slice(drawn):
    """Coefficients from 1e-12 to 1e6 in any order: off by half a unit a step (2**-23 of the sum of bounds) and as exact."""
    pending, expected, bound = (
        Pending(),
        {site.name: torch.zeros(site.shape, dtype=torch.float64) for site in SITES[:2]},
        0.0,
    )
    for number, (mantissa, exponent) in enumerate(drawn):
        c = math.ldexp(mantissa, exponent)
        bound += abs(c)
        factors = {"tall": factors_of(number, "tall"), "wide": factors_of(number, "wide", "right")}
        for site in SITES[:2]:
            expected[site.name] += c * factors[site.name].left.double() @ factors[site.name].right.double().T
        moves, names = moves_of(c * LowRank(factors), SITES)
        assert names == {"tall", "wide"}
        assert pending.fits(moves)
        pending.absorb(moves)
    assert bool(pending) == (bound > 0)
    if not pending:
        return
    for site in SITES[:2]:
        whole = pending.direction().realise(site, torch.float64)
        kept = factors_of(0, site.name, "left" if site.name == "tall" else "right").kept.abs().max()
        # a number is the sum of two products; fresh numbers are below 8, so bounds are 8 |c| at most
        allowed = 2 * float(kept) * len(drawn) * 8 * bound * 2.0**-22
        assert float((whole - expected[site.name]).abs().max()) <= allowed + 1e-30
        ((_, low_rank),) = pending.direction().terms
        made = low_rank.factors[site.name]
        largest = float(made.changing.abs().max())
        assert largest <= made.ceiling
        units = made.changing.double() / (made.ceiling * 2.0 ** (1 - grid_bits(2)))
        assert torch.equal(units, units.round()), "not on the grid"
        part = torch.zeros(5, dtype=torch.float64)
        pending.direction().add_to(part, site.part(11, 5))
        assert torch.equal(part, whole.flatten()[11:16])


def test_moves_that_are_not_low_rank_are_left_to_the_rule():
    plain = LowRank({"tall": factors_of(0, "tall")})
    noise = Noise(stream(1))
    assert moves_of(noise, SITES) == ([], set())
    assert moves_of(plain + noise, SITES) == ([], set()), "noise lies on top of it"
    assert moves_of(Combination(), SITES) == ([], set())
    moves, names = moves_of(2.0 * plain + plain, SITES)
    assert names == {"tall"}
    assert [float(move.coefficients) for move in moves] == [2.0, 1.0]
    assert low_rank_parts(plain, SITES[1]) == []


def test_what_shares_no_factor_does_not_fit_and_many_columns_are_too_many():
    pending = Pending()
    pending.absorb(moves_of(LowRank({"tall": factors_of(0, "tall")}), SITES)[0])
    assert pending.fits(moves_of(LowRank({"wide": factors_of(0, "wide")}), SITES)[0])
    other = moves_of(LowRank({"tall": factors_of(0, "tall", "right")}), SITES)[0]
    assert not pending.fits(other)
    copy = replace(factors_of(7, "tall"))
    assert copy.kept is not factors_of(0, "tall").kept
    assert pending.fits(moves_of(LowRank({"tall": copy}), SITES)[0]), "equal numbers are as good as the same tensor"
    for number in range(1 + MAX_COLUMNS // 2):
        assert pending.is_full() == (2 * (number + 1) > MAX_COLUMNS)
        kept = Factors.of(torch.ones(7, 2), torch.full((4, 2), float(number + 1)))
        pending.absorb(moves_of(LowRank({"tall": kept}), SITES)[0])
    whole = pending.direction().realise(SITES[0], torch.float64)
    expected = LowRank({"tall": factors_of(0, "tall")}).realise(SITES[0], torch.float64) + 2.0 * sum(range(1, 10))
    assert torch.allclose(whole, expected, rtol=0, atol=1e-5)  # fp32 factors: 2**-24 of numbers of about 90
