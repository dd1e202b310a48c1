"""Dense moves that the next query writes: every loss and every bit of a run that writes them at once."""

import copy
from itertools import permutations

import pytest
import torch
from tests.checks.engines import make, steps
from tests.support.models import CASES, assert_same_bits, snapshot
from torch import nn

from zotune.core.direction import Noise
from zotune.core.ledger import read_ledger
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.core.weights import Weights
from zotune.engines import CHOICES
from zotune.kernels.dispatch import backend_for, using
from zotune.kernels.reference import ReferenceBackend
from zotune.optim.optimizer import ZO
from zotune.optim.replaying import optimizer_for, replay

SETTINGS = [
    {"method": "mezo"},
    {"method": "mezo", "method_options": {"n": 3}},
    {"method": "mezo", "noise": "rademacher"},
    {"method": "mezo", "noise": "gaussian"},  # not of the table: nothing is late
    {"method": "kerzoo"},
    {"method": "es"},
    {"method": "fzoo"},  # asks for the loss at the current weights, too
    {"method": "ldsd"},  # a stored mean beside the noise
    {"method": "conservative"},
    {"method": "blockwise"},  # moves some tensors only
]
settings_ = pytest.mark.parametrize("settings", SETTINGS, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def begin(name, dtype, engine, fold_every, **settings):
    torch.manual_seed(0)
    case = CASES[name](dtype)
    return case, make(case, engine, lr=1e-2, fold_every=fold_every, **settings)


def both(name, dtype, engine, count, **settings):
    """The optimizers and cases of a run that writes at once and of one that writes late; their losses are the same."""
    runs = [begin(name, dtype, engine, every, **settings) for every in (0, 4)]
    losses = [[float(opt.step(case.closure)) for _ in range(count)] for case, opt in runs]
    assert losses[0] == losses[1]
    return runs


def late(opt):
    return [slot.site.name for slot in opt.weights if slot.late]


# ----------------------------------------------------------------------------------------------------------------------
# The same run


@pytest.mark.parametrize("engine", CHOICES)
@pytest.mark.parametrize("name", CASES)
@dtypes
def test_every_bit_on_every_engine_and_model(name, dtype, engine):
    (case, opt), (lagging, other) = both(name, dtype, engine, 3)
    assert late(other), "nothing waited, so nothing was tested"
    assert not late(opt)
    other.fold()
    assert_same_bits(snapshot(case), snapshot(lagging))


@settings_
@pytest.mark.parametrize("engine", ["in_place", "auto"])
def test_every_bit_with_every_kind_of_move(settings, engine):
    (case, _), (lagging, other) = both("mlp", torch.bfloat16, engine, 6, **settings)
    other.fold()
    assert_same_bits(snapshot(case), snapshot(lagging))


@dtypes
def test_every_bit_with_pure_torch(dtype):
    with using(ReferenceBackend()):
        (case, _), (lagging, other) = both("llama", dtype, "auto", 3)
        other.fold()
    assert_same_bits(snapshot(case), snapshot(lagging))


def test_groups_with_their_own_eps_and_lr():
    """Their points are not one direction on all tensors, so that the query writes first what is late."""
    found = []
    for every in (0, 4):
        torch.manual_seed(0)
        case = CASES["mlp"](torch.float32)
        groups = [{"params": case.named[:2]}, {"params": case.named[2:], "lr": 2e-3, "eps": 0.02}]
        opt = ZO(groups, lr=1e-3, eps=1e-2, fold_every=every)
        steps(opt, case.closure, 5)
        opt.fold()
        found.append(snapshot(case))
    assert_same_bits(*found)


# ----------------------------------------------------------------------------------------------------------------------
# What lags, and for how long


@pytest.mark.parametrize("engine", ["layerwise", "batched", "auto"])
@dtypes
def test_tensors_lag_one_step_behind_and_not_in_every_fourth(dtype, engine):
    case, opt = begin("llama", dtype, engine, 0)
    lagging, other = begin("llama", dtype, engine, 4)
    for step in range(1, 9):
        before = snapshot(case)
        opt.step(case.closure)
        other.step(lagging.closure)
        assert_same_bits(snapshot(lagging), before if step % 4 else snapshot(case))
        assert len(late(other)) == (len(opt.weights.slots) if step % 4 else 0)


class Counting(ReferenceBackend):
    """Writes down which functions are called from outside."""

    def __init__(self):
        self.calls = []

    def update(self, *args):
        self.calls.append("update")
        super().update(*args)

    def update_many(self, additions):
        self.calls.append("update_many")
        super().update_many(additions)

    def update_and_perturb(self, *args):
        before = self.calls
        self.calls = []
        super().update_and_perturb(*args)
        self.calls = [*before, "update_and_perturb"]


@pytest.mark.parametrize("engine", ["layerwise", "batched"])
def test_the_query_writes_in_its_own_pass(engine):
    """Once the model is known there is no pass for the update alone. The rows of an embedding are moved in a copy."""
    with using(Counting()):
        case, opt = begin("llama", torch.float32, engine, 100)
        steps(opt, case.closure, 3)
        backend = backend_for(torch.device("cpu"))
        backend.calls.clear()
        opt.query(case.closure)
    copies = backend.calls.count("update")
    assert sorted(backend.calls) == ["update"] * copies + ["update_and_perturb"] * len(opt.weights.slots)
    assert 1 <= copies <= 2  # for each sign, or for both
    assert not late(opt)


@pytest.fixture
def pieces(monkeypatch):
    """Output layers of 67 rows are read 12 rows at a time."""
    for place in ("forms.MIN_NUMEL", "swapping.MIN_NUMEL", "batched_ahead.IN_CACHE"):
        monkeypatch.setattr(f"zotune.engines.{place}", 200)


@pytest.mark.parametrize("few", [16, 0.01], ids=["each point alone", "ahead of time"])
@pytest.mark.parametrize("engine", ["in_place", "layerwise", "batched"])
@dtypes
def test_tensors_that_are_read_in_pieces(dtype, engine, few, pieces, monkeypatch):
    """Each piece gets the update as it is read; the rows of the embedding, which is the same tensor, before that."""
    monkeypatch.setattr("zotune.engines.batched_ahead.FEW", few)
    (case, _), (lagging, other) = both("llama", dtype, engine, 3)
    other.fold()
    assert_same_bits(snapshot(case), snapshot(lagging))


@pytest.mark.parametrize("engine", ["layerwise", "batched"])
def test_pieces_are_written_in_the_pass_that_reads_them(engine, pieces):
    with using(Counting()):
        case, opt = begin("llama", torch.bfloat16, engine, 100)
        steps(opt, case.closure, 3)
        backend = backend_for(torch.device("cpu"))
        backend.calls.clear()
        opt.query(case.closure)
    shapes = {slot.site.name: slot.site.shape for slot in opt.weights}
    in_pieces = [
        s for name, s in shapes.items() if 67 in s or (engine == "layerwise" and len(s) == 2 and s[0] * s[1] >= 200)
    ]
    pieces_of_all = sum(-(-rows // (200 // width)) for rows, width in in_pieces)
    assert backend.calls.count("update_and_perturb") == pieces_of_all + len(shapes) - len(in_pieces)
    assert "update_many" not in backend.calls
    assert not late(opt)


class Failing(ReferenceBackend):
    """Fails when it has written so many pieces."""

    left = -1

    def update_and_perturb(self, addition, *args):
        if addition.start:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        super().update_and_perturb(addition, *args)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("engine", ["layerwise", "batched"])
@dtypes
def test_a_query_that_ends_between_two_pieces(dtype, engine, count, pieces):
    """Neither half an update is left nor one that is written twice."""
    found = []
    for backend in (ReferenceBackend(), Failing()):
        with using(backend):
            case, opt = begin("llama", dtype, engine, 100)
            steps(opt, case.closure, 2)
            backend.left = count
            if isinstance(backend, Failing):
                with pytest.raises(KeyboardInterrupt):
                    opt.query(case.closure)
                assert not any(slot.reached for slot in opt.weights)
                assert late(opt) != list(opt.weights.slots)
            opt.fold()
            found.append(snapshot(case))
    assert_same_bits(*found)


@dtypes
def test_parts_in_any_order(dtype):
    """Rows, runs from the front, runs from elsewhere, the whole: each is read as if the update had been written."""

    def read(weights, slot, point, part):
        if part == "pair":
            outs = tuple(torch.empty(2, *slot.site.shape, dtype=dtype).unbind())
            weights.perturb_many(slot, slot.site, (point, -point), outs)
            return torch.stack(outs)
        out = torch.empty(part.numel, dtype=dtype)
        weights.perturb(slot, part, point, out)
        return out

    torch.manual_seed(0)
    stored = torch.randn(30, 7).to(dtype)
    move, point = 0.01 * Noise(stream(0, "move")), 0.1 * Noise(stream(0, "point"))
    site = Site("w", (30, 7))
    parts = {
        "rows": site.take(torch.tensor([3, 29, 0])),
        "first": site.part(0, 50),
        "next": site.part(50, 33),
        "rest": site.part(83, 127),
        "behind": site.part(100, 20),
        "whole": site,
        "pair": "pair",
    }
    for order in [
        *permutations(["rows", "first", "next", "behind"]),
        ["first", "next", "rest", "rows"],
        ["whole", "rows"],
        ["first", "pair"],
        ["pair", "first"],
    ]:
        results = []
        for when in (False, True):
            weights = Weights([("w", stored.clone())])
            slot = weights.slots["w"]
            weights.update_all([(slot, None, move)], late=when)
            made = [read(weights, slot, point, slot.site if name == "whole" else parts[name]) for name in order]
            weights.settle()
            assert not slot.late
            assert not slot.reached
            results.append([*made, slot.tensor, *([] if slot.carried is None else [slot.carried])])
        assert all(map(torch.equal, *results)), order


@dtypes
def test_autograd_is_told_when_the_query_writes(dtype):
    """A weight that was saved for a backward pass and moved since must not pass as unchanged."""
    case, opt = begin("llama", dtype, "batched", 100)
    steps(opt, case.closure, 3)
    before = [tensor._version for _, tensor in case.named]
    opt.query(case.closure)
    assert all(tensor._version > old for (_, tensor), old in zip(case.named, before, strict=True))


def test_a_module_that_is_left_out_waits_until_it_runs_again():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    both_run = [True]
    x = torch.randn(3, 4)

    def closure():
        hidden = first(x)
        return (second(hidden) if both_run[0] else hidden).square().mean()

    model = nn.ModuleList([first, second])
    start = copy.deepcopy(model.state_dict())
    found = []
    for every in (0, 100):
        model.load_state_dict(start)
        opt = ZO(model.named_parameters(), lr=1e-2, eps=1e-2, engine="layerwise", fold_every=every)
        for step in range(6):
            both_run[0] = step not in (3, 4)
            opt.step(closure)
        opt.fold()
        found.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not torch.equal(found[0]["1.weight"], start["1.weight"])


def test_what_reads_the_weights_between_steps():
    """`folded` shows what counts, and so does a method's `ctx.weight`; neither changes the run."""
    case, opt = begin("mlp", torch.bfloat16, "auto", 0)
    lagging, other = begin("mlp", torch.bfloat16, "auto", 100)
    for _ in range(4):
        opt.step(case.closure)
        other.step(lagging.closure)
        with other.folded():
            assert_same_bits(snapshot(case), snapshot(lagging))
        opt.step(case.closure)
        other.step(lagging.closure)
        assert late(other)
        for slot in other.weights:
            ours, theirs = other.folding.weight(slot.site), opt.folding.weight(opt.weights.slots[slot.site.name].site)
            assert torch.equal(ours, theirs)


def test_a_closure_that_raises_loses_nothing():
    """Half of the model is visited, then memory runs out: what was not read is still late, and the query can be asked again."""
    case, opt = begin("llama", torch.float32, "layerwise", 0)
    lagging, other = begin("llama", torch.float32, "layerwise", 100)
    steps(opt, case.closure, 3)
    steps(other, lagging.closure, 3)
    linear = [m for m in lagging.module.modules() if type(m) is nn.Linear]
    hook = linear[len(linear) // 2].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        other.step(lagging.closure)
    hook.remove()
    assert 0 < len(late(other)) < len(other.weights.slots)
    steps(opt, case.closure, 2)
    steps(other, lagging.closure, 2)
    other.fold()
    assert_same_bits(snapshot(case), snapshot(lagging))


# ----------------------------------------------------------------------------------------------------------------------
# Saved, resumed, replayed


@pytest.mark.parametrize("stop", [1, 4, 5])
@pytest.mark.parametrize("engine", ["in_place", "auto"])
@dtypes
def test_resume(tmp_path, dtype, engine, stop):
    """The model's state is copied before the optimizer's is asked for: the pair belongs together all the same."""
    whole, opt = begin("llama", dtype, engine, 4)
    steps(opt, whole.closure, stop)
    state = {"weights": {name: p.detach().clone() for name, p in whole.named}, "opt": opt.state_dict()}
    torch.save(state, tmp_path / "state.pt")
    waited = late(opt)
    assert bool(waited) == (stop % 4 != 0)
    steps(opt, whole.closure, 9 - stop)
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    again, resumed = begin("llama", dtype, engine, 4)
    steps(resumed, again.closure, 1)  # what is late here belongs to weights that are about to be replaced
    resumed.load_state_dict(kept["opt"])
    for name, p in again.named:
        p.data.copy_(kept["weights"][name])
    assert late(resumed) == waited
    steps(resumed, again.closure, 9 - stop)
    opt.fold()
    resumed.fold()
    assert_same_bits(snapshot(whole), snapshot(again))


@dtypes
def test_replay(tmp_path, dtype):
    path = tmp_path / "ledger.jsonl"
    case, opt = begin("mlp", dtype, "auto", 4, ledger=path)
    steps(opt, case.closure, 6)
    opt.fold()
    torch.manual_seed(0)
    base, ledger = CASES["mlp"](dtype), read_ledger(path)
    again = optimizer_for(base.named, ledger)
    replay(again, ledger.entries)
    again.fold()
    assert_same_bits(snapshot(case), snapshot(base))
    eager, plain = begin("mlp", dtype, "auto", 0)
    steps(plain, eager.closure, 6)
    assert_same_bits(snapshot(eager), snapshot(base))


def test_a_large_batch_is_written_layer_by_layer(monkeypatch):
    """Above the limit of "auto" the first of the two queries writes."""
    monkeypatch.setattr("zotune.engines.batched_size.DENSE_TOKENS", 1)
    found = []
    for every in (0, 100):
        torch.manual_seed(0)
        case = CASES["llama"](torch.float32)
        opt = make(case, "auto", lr=1e-2, fold_every=every)
        found.append([float(opt.step(case.closure)) for _ in range(4)])
        assert "one point at a time" in opt.engine.reason
    assert found[0] == found[1]
