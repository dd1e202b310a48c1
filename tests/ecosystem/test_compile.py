"""Compiled models: the compiled code runs, is not compiled again at each step, and takes the steps of the plain model.

The backend "counting" runs the captured graph as it is, so that compiled and plain losses have the same bits.
"""

import pytest
import torch
from tests.support.models import CASES, assert_same_bits, bits
from torch import nn

from zotune import replay
from zotune.core.ledger import read_ledger
from zotune.engines import ENGINES
from zotune.kernels.dispatch import using
from zotune.kernels.reference import ReferenceBackend
from zotune.optim.optimizer import ZO

ALL = sorted({"auto", *ENGINES})
WAYS = {
    "torch.compile(model)": lambda model, backend: torch.compile(model, backend=backend),
    "model.compile()": lambda model, backend: model.compile(backend=backend) or model,
    "regions": lambda model, backend: [part.compile(backend=backend) for part in model.parts] and model,
}
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:torch"),  # dynamo warns of what it met on the way
    pytest.mark.filterwarnings("error:Using .torch.compile:UserWarning"),  # of hooks that would stay: they do not
]


class Part(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return x + self.outer(torch.tanh(self.inner(x)))


class Net(nn.Module):
    """Regions that are called one after the other, or only the first; names of its own, code that is not torch's."""

    def __init__(self):
        super().__init__()
        self.embed, self.parts, self.head = nn.Embedding(400, 6), nn.ModuleList([Part(), Part()]), nn.Linear(6, 400)
        self.depth = 2

    def forward(self, ids):
        hidden = self.embed(ids)
        for part in self.parts[: self.depth]:
            hidden = part(hidden)
        return self.head(hidden)


class Counting:
    """A backend of torch.compile: how many graphs were made, how often one ran."""

    def __init__(self):
        self.graphs = self.runs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1

        def run(*arguments):
            self.runs += 1
            return graph(*arguments)

        return run


@pytest.fixture(autouse=True)
def _no_compiled_code_from_elsewhere():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def made(engine, way=None, backend=None, trained="", **settings):
    """(model as called, closure, optimizer of the tensors with `trained` in their name)"""
    torch.manual_seed(0)
    model, ids = Net(), torch.randint(0, 400, (3, 5))
    called = model if way is None else WAYS[way](model, backend)
    named = [(name, tensor) for name, tensor in called.named_parameters() if trained in name]
    opt = ZO(named, lr=0.1, eps=0.01, engine=engine, **settings)
    return called, lambda: called(ids).float().square().mean(), opt


def weights(opt):
    return {name: bits(slot.tensor) for name, slot in opt.weights.slots.items()}


@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("way", WAYS)
def test_compiled_steps_are_plain_steps_and_nothing_is_compiled_again(engine, way):
    """Counted: after the first step no graph is made, and every query runs compiled code."""
    _, closure, plain = made("in_place")  # the batched engine's forwards of more rows round otherwise
    counting = Counting()
    _, compiled_closure, compiled = made(engine, way, counting)
    schedule = torch.optim.lr_scheduler.LambdaLR(compiled, lambda k: 1 / (1 + k))
    parts = 2 if way == "regions" else 1
    for step in range(4):
        plain.param_groups[0]["lr"] = compiled.param_groups[0]["lr"]
        plain.step(closure)
        runs = counting.runs
        compiled.step(compiled_closure)
        schedule.step()
        if step == 0:
            graphs = counting.graphs
            continue
        assert counting.runs - runs == 2 * parts
    assert counting.graphs == graphs == 1 or (way == "regions" and graphs <= 2)
    assert compiled.last.losses == plain.last.losses
    assert_same_bits(weights(plain), weights(compiled))


@pytest.mark.parametrize("engine", ALL)
@pytest.mark.parametrize("when", ["cold", "warm", "scores"])
def test_a_compiled_closure(engine, when):
    """Nothing shows from outside that a function is compiled; hooks find out when they are compiled with it (and may leave
    a break in its graph), or are not called: dynamo does not ask again whether there are hooks. Scores are not compared
    with the other engine's losses."""
    trained = "" if when == "cold" else "parts"  # the forward of an embedding is replaced, which dynamo does notice
    _, closure, plain = made("in_place", trained=trained)  # the batched engine's forwards of more rows round otherwise
    counting = Counting()
    _, other, opt = made(engine, trained=trained, smooth=when != "scores")
    compiled = torch.compile(other, backend=counting)
    if when != "cold":
        with torch.no_grad():
            compiled()
    for step in range(3):
        plain.step(closure)
        runs = counting.runs
        opt.step(compiled)
        if step == 0:
            graphs = counting.graphs
            continue
        assert counting.runs - runs >= 2
    assert counting.graphs == graphs
    assert_same_bits(weights(plain), weights(opt))


@pytest.mark.parametrize("engine", ALL)
def test_a_compiled_training_step_does_not_compile_the_noise(engine):
    """dynamo would make other integers of it; the model inside is compiled all the same, if it was asked for."""
    _, closure, plain = made("in_place")  # the batched engine's forwards of more rows round otherwise
    counting = Counting()
    _, other, opt = made(engine, "model.compile()", counting)
    step = torch.compile(lambda: opt.step(other), backend=Counting())
    for _ in range(3):
        plain.step(closure)
        step()
        assert opt.last.losses == plain.last.losses
    assert opt.step_number == 3
    assert counting.runs >= 4
    assert_same_bits(weights(plain), weights(opt))


def test_compiled_later_and_other_paths_later():
    """What is compiled, or met for the first time, after the first step: same bits, and compiled code runs in the end."""
    model, closure, plain = made("layerwise")
    counting = Counting()
    other, same, opt = made("layerwise")
    model.depth = other.depth = 1
    for step in range(6):
        if step == 2:
            WAYS["regions"](other, counting)
        if step == 4:
            model.depth = other.depth = 2
        plain.step(closure)
        runs = counting.runs
        opt.step(same)
    assert counting.runs - runs == 4  # two queries, two regions
    assert "compiled" in opt.engine.reason
    assert_same_bits(weights(plain), weights(opt))


@pytest.mark.parametrize("engine", ALL)
def test_no_hook_stays_behind(engine):
    """Then torch would warn at every call of a compiled model, for the life of the process."""
    _, closure, opt = made(engine)
    opt.step(closure)
    where = torch.nn.modules.module
    assert not any(
        (where._global_forward_pre_hooks, where._global_forward_hooks, where._global_forward_hooks_always_called)
    )


def test_looking_at_a_model_does_not_switch_its_compilation_off():
    """The audit works under a dispatch mode, in which dynamo gives code up for good: for every model that shares it."""
    counting = Counting()
    called, closure, opt = made("in_place", "torch.compile(model)", counting)
    opt.step(closure)
    assert counting.runs == 2
    with torch.no_grad():
        called(torch.zeros(3, 5, dtype=torch.int64))
    assert counting.runs == 3


def test_what_a_compiled_model_reads_is_seen():
    """Then a closure that reads no trained tensor is refused, compiled or not."""
    _, closure, opt = made("auto", "model.compile()", Counting())
    opt.step(closure)
    assert opt.engine._unread == set()
    assert "compiled" in opt.engine.reason


@pytest.mark.parametrize("engine", ALL)
def test_slopes_of_compiled_models(engine):
    _, closure, plain = made(engine, method="forward_grad")
    _, compiled_closure, compiled = made(engine, "model.compile()", Counting(), method="forward_grad")
    for _ in range(2):
        plain.step(closure)
        compiled.step(compiled_closure)
    # one product more or less is fused by the dual numbers of the two paths: 1e-5 is 80 units of fp32
    assert compiled.last.losses == pytest.approx(plain.last.losses, rel=1e-5)


def test_a_ledger_of_a_compiled_run_replays_on_the_plain_model(tmp_path):
    """`_orig_mod.` is in no name: same sites, same noise, same header."""
    path = tmp_path / "ledger.jsonl"
    called, closure, opt = made("auto", "torch.compile(model)", Counting(), ledger=path)
    assert all(name.startswith("_orig_mod.") for name, _ in called.named_parameters())
    for _ in range(3):
        opt.step(closure)
    _, _, plain = made("auto")
    assert plain.describe()["sites"] == opt.describe()["sites"]
    replay(plain, read_ledger(path).entries)
    assert_same_bits(weights(plain), weights(opt))


@pytest.mark.parametrize("way", ["model", "closure"])
def test_a_language_model(way):
    """Tied weights, rotary positions, an embedding done by rows. Graphs made functional round the same on a CPU, to 1e-5
    of the loss. Noise in pure torch and numpy: that is what dynamo can follow, and gets wrong."""
    case = CASES["llama"](torch.float32)
    plain = ZO(case.named, lr=1e-2, eps=1e-2, engine="in_place")
    losses = [float(plain.step(case.closure)) for _ in range(3)]
    torch.manual_seed(0)
    same = CASES["llama"](torch.float32)
    closure = same.closure if way == "model" else torch.compile(same.closure, backend="eager")
    if way == "model":
        same.module.compile(backend="aot_eager")
    opt = ZO(same.named, lr=1e-2, eps=1e-2)
    with using(ReferenceBackend()):
        asked = [float(opt.step(closure))]
        with torch._dynamo.config.patch(error_on_recompile=True):
            asked += [float(opt.step(closure)) for _ in range(2)]
    assert asked == pytest.approx(losses, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
