"""Models and closures that change their ways, mix their rows, or differentiate: the default engine agrees with in place.

Each was a wrong loss, lost weights or a bare error once. fp64, so equality is to 1e-12: another order of sums.
"""

import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from zotune.errors import ClosureError, ConfigError, EngineError, ParameterError
from zotune.optim.optimizer import ZO

WIDTH = 16
ENGINES = ["layerwise", "batched", "auto"]


def layers():
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh())


class Net(nn.Module):
    def __init__(self, *extra):
        super().__init__()
        self.body, self.head = nn.Sequential(layers(), *extra), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.body(x))


def data(step, rows=4):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, WIDTH, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (rows,), generator=generator)


def plain(model, step):
    x, y = data(step)
    return lambda: F.cross_entropy(model(x), y)


def losses(build, closure_at, engine, steps=3, seed=0):
    """Of each step at lr 0, and the optimizer."""
    torch.manual_seed(seed)
    model = build().double()
    opt = ZO(model.named_parameters(), lr=0.0, eps=1e-3, engine=engine)
    found = []
    for step in range(steps):
        opt.step(closure_at(model, step))
        found += opt.last.losses
    return found, opt


def assert_as_in_place(build, closure_at, engine="auto", steps=3, seed=0):
    expected, _ = losses(build, closure_at, "in_place", steps, seed)
    found, opt = losses(build, closure_at, engine, steps, seed)
    assert found == pytest.approx(expected, rel=1e-12, abs=0.0)  # fp64, sums in another order
    return opt


# ----------------------------------------------------------------------------------------------------------------------
# Rows that mix


@pytest.mark.parametrize("seed", range(6))
def test_statistics_of_the_batch_are_not_shared_by_copies(seed):
    def build():
        return Net(nn.BatchNorm1d(WIDTH, track_running_stats=False, affine=False))

    assert "not batched" in assert_as_in_place(build, plain, seed=seed).engine.reason


class Gate(nn.Module):
    """Keeps a number of the batch beside its output, as mixtures of experts do with their balance."""

    def __init__(self):
        super().__init__()
        self.router, self.expert = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        p = self.router(x).softmax(-1)
        self.aux = 4 * p.mean(0).square().sum()
        return x + self.expert(x) * p.amax(-1, keepdim=True)


def test_numbers_kept_beside_the_output_are_not_shared_by_copies():
    def closure_at(model, step):
        x, y = data(step)
        return lambda: F.cross_entropy(model(x), y) + 0.01 * model.body[1].aux

    assert "not batched" in assert_as_in_place(lambda: Net(Gate()), closure_at).engine.reason


class Positions(nn.Module):
    """A bare parameter, and an argument without rows that may happen to be as long as all copies together."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(WIDTH, 3 * WIDTH) / 4)

    def forward(self, x, mask):
        q, k, v = (x @ self.qkv).chunk(3, -1)
        return x + (q @ k.transpose(-1, -2) / 4 + mask).softmax(-1) @ v


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix, self.last = Positions(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        length = x.shape[1]
        mask = torch.full((length, length), -torch.inf, dtype=x.dtype).triu(1)
        return torch.tanh(self.last(self.mix(x, mask)))


class Sequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Causal(), nn.Linear(WIDTH, 3)

    def forward(self, x):
        return self.head(self.body(x)[:, -1])


@pytest.mark.parametrize("shapes", [[(3, 7), (3, 6)], [(1, 7), (1, 2)]])
def test_an_argument_that_is_as_long_as_the_copies_is_not_cut_up(shapes):
    def closure_at(model, step):
        rows, length = shapes[step]
        x = torch.randn(rows, length, WIDTH, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        return lambda: F.cross_entropy(model(x), torch.zeros(rows, dtype=torch.long))

    assert_as_in_place(Sequences, closure_at, steps=2)


# ----------------------------------------------------------------------------------------------------------------------
# What begins later


@pytest.fixture
def eighth(monkeypatch):
    """A later look before the 8th query, so that ten steps show it."""
    monkeypatch.setattr("zotune.engines.layerwise.LOOKS", frozenset([8]))


@pytest.mark.parametrize("engine", ENGINES)
def test_when_a_model_is_looked_at_anew(engine):
    torch.manual_seed(0)
    model = Net().double()
    opt = ZO(model.named_parameters(), lr=0.0, eps=1e-3, engine=engine)
    counts = []
    for step in range(513):
        opt.step(plain(model, step % 3))
        counts.append(opt.engine.check_forwards)
    assert [number for number in range(2, 514) if counts[number - 1] > counts[number - 2]] == [64, 512]
    assert (
        counts[63] - counts[62] <= counts[0]
    )  # the loss is asked once first, but what hooks reach is not compared again


def test_dropout_whose_rate_rises_later_is_the_same_for_both_points():
    def closure_at(model, step):
        model.body[1].p = 0.0 if step < 2 else 0.3
        return plain(model, step)

    assert "draws random numbers" in assert_as_in_place(lambda: Net(nn.Dropout(0.0)), closure_at, steps=4).engine.reason


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("eighth")
def test_a_penalty_that_begins_later_is_found_and_said(engine):
    """From the look on it sees the perturbation."""

    def closure_at(model, step):
        x, y = data(step)
        weight = 0.1 if step >= 3 else 0.0
        return lambda: (
            F.cross_entropy(model(x), y) + (weight * sum(p.square().sum() for p in model.parameters()) if weight else 0)
        )

    expected, _ = losses(Net, closure_at, "in_place", steps=10)
    with pytest.warns(UserWarning, match="read outside their modules"):
        found, opt = losses(Net, closure_at, engine, steps=10)
    assert found[-6:] == pytest.approx(expected[-6:], rel=1e-12, abs=0.0)
    assert len(opt.engine.direct) == 6


def late_penalty(model, step):
    x, y = data(step)
    weight = 0.1 if step >= 3 else 0.0
    each = torch.arange(1.0, 5.0, dtype=torch.float64)
    return lambda: (
        F.cross_entropy(model(x), y, reduction="none")
        + (weight * each * sum(p.square().sum() for p in model.parameters()) if weight else 0)
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.usefixtures("eighth")
def test_a_penalty_that_begins_later_is_found_by_slopes(engine):
    def slopes(engine):
        torch.manual_seed(0)
        model = Net().double()
        opt, found = ZO(model.named_parameters(), "forward_grad", lr=0.0, engine=engine), []
        for step in range(10):
            closure = late_penalty(model, step)
            opt.step(lambda: closure().mean())  # noqa: B023
            found.append(opt.last.losses[1])
        return found

    expected = slopes("in_place")
    with pytest.warns(UserWarning, match="read outside their modules"):
        found = slopes(engine)
    assert found[-3:] == pytest.approx(expected[-3:], rel=1e-12, abs=0.0)


@pytest.mark.parametrize("engine", ["batched", "auto"])
@pytest.mark.usefixtures("eighth")
def test_a_penalty_that_begins_later_is_refused_by_rows_of_examples(engine):
    """They cannot perturb in place what differs from example to example."""
    torch.manual_seed(0)
    model = Net().double()
    opt = ZO(model.named_parameters(), "grzo", lr=0.0, engine=engine)
    for step in range(7):
        opt.step(late_penalty(model, step))
    for step in (7, 8):
        with pytest.raises(EngineError, match="6 tensors are read outside their module"):
            opt.step(late_penalty(model, step))


class Sorting(nn.Module):
    """Sorts its rows by length, as recurrent models do."""

    def __init__(self):
        super().__init__()
        self.inside = layers()

    def forward(self, x, lengths):
        order = lengths.argsort(descending=True, stable=True)
        return self.inside(x[order])[order.argsort()]


class Sorted(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = Sorting(), nn.Linear(WIDTH, 3)

    def forward(self, x, lengths):
        return self.head(self.body(x, lengths))


@pytest.mark.usefixtures("eighth")
def test_a_body_that_begins_to_reorder_rows_is_found():
    def closure_at(model, step):
        x, y = data(step)
        lengths = torch.tensor([5, 5, 5, 5] if step == 0 else [3, 7, 5, 2])
        return lambda: F.cross_entropy(model(x, lengths), y)

    expected, _ = losses(Sorted, closure_at, "in_place", steps=10)
    found, opt = losses(Sorted, closure_at, "auto", steps=10)
    assert found[-6:] == pytest.approx(expected[-6:], rel=1e-12, abs=0.0)  # fp64, sums in another order
    assert "not batched" in opt.engine.reason


@pytest.mark.usefixtures("eighth")
def test_a_model_that_stays_as_it_is_stays_batched_and_is_not_warned_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = assert_as_in_place(Net, plain, steps=10)
    assert "2 points in one forward" in opt.engine.reason


# ----------------------------------------------------------------------------------------------------------------------
# Closures that fail with other tensors, or with copies


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_made_of_derivatives(engine):
    def closure_at(model, step):
        x, _ = data(step)

        def closure():
            with torch.enable_grad():
                z = x.clone().requires_grad_()
                (force,) = torch.autograd.grad(model(z).sum(), z)
            return (force - 1).square().mean()

        return closure

    assert "RuntimeError" in assert_as_in_place(Net, closure_at, engine).engine.reason


def test_torch_func_over_the_model():
    def closure_at(model, step):
        x, y = data(step)
        return lambda: F.cross_entropy(torch.func.vmap(model)(x), y)

    assert_as_in_place(Net, closure_at)


class Shifted(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, WIDTH)

    def forward(self, x):
        return x + self.table(torch.tensor([2]))


def test_an_embedding_of_one_index_beside_rows():
    assert "with several copies" in assert_as_in_place(lambda: Net(Shifted()), plain).engine.reason


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("engine", ENGINES)
def test_what_the_closure_raises_once_is_raised(engine, at, error):
    """It is no reason to look for faults in the engine."""
    calls = []

    def closure_at(model, step):
        def closure():
            calls.append(step)
            if len(calls) == at:
                raise error("mine")
            return plain(model, step)()

        return closure

    with pytest.raises(error, match="mine"):
        losses(Net, closure_at, engine, steps=5)


@pytest.mark.parametrize("wrong", [-1, 50])
@pytest.mark.parametrize("engine", ENGINES)
def test_token_ids_that_do_not_exist(engine, wrong):
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.inside, self.head = nn.Embedding(50, WIDTH), layers(), nn.Linear(WIDTH, 3)

        def forward(self, ids):
            return self.head(self.inside(self.table(ids)).mean(1))

    def closure_at(model, step):
        ids = torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(step))
        ids[0, 0] = wrong if step else 3
        return lambda: F.cross_entropy(model(ids), torch.tensor([0, 1, 2, 0]))

    with pytest.raises(IndexError, match=r"token ids must be 0 \.\.\. 49"):
        losses(Words, closure_at, engine, steps=2)


# ----------------------------------------------------------------------------------------------------------------------
# Threads


@pytest.mark.parametrize("engine", ENGINES)
def test_another_thread_may_run_another_model(engine):
    """Its modules come between ours at any moment: 60 steps, in nearly each of which they do."""
    torch.manual_seed(0)
    model, other = Net().double(), Net().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    opt, stop = ZO(model.named_parameters(), lr=0.0, eps=1e-3, engine=engine), threading.Event()

    def run():
        while not stop.is_set():
            other(data(9)[0])

    thread = threading.Thread(target=run)
    thread.start()
    found = []
    try:
        for step in range(60):
            opt.step(plain(model, step % 5))
            found += opt.last.losses
    finally:
        stop.set()
        thread.join()
    assert all(type(parameter) is nn.Parameter for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    torch.manual_seed(0)
    model = Net().double()
    alone = ZO(model.named_parameters(), lr=0.0, eps=1e-3, engine="in_place")
    expected = []
    for step in range(60):
        alone.step(plain(model, step % 5))
        expected += alone.last.losses
    assert found == pytest.approx(expected, rel=1e-12, abs=0.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_closure_spread_over_threads_is_perturbed_in_place(engine):
    def closure_at(model, step):
        x, y = data(step)
        parts = [None, None]

        def part(number):
            with torch.no_grad():
                parts[number] = F.cross_entropy(model(x[number::2]), y[number::2])

        def closure():
            threads = [threading.Thread(target=part, args=(number,)) for number in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return (parts[0] + parts[1]) / 2

        return closure

    assert "several threads" in assert_as_in_place(Net, closure_at, engine).engine.reason


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


@pytest.mark.parametrize(
    ("before", "after"), [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "float16")]
)
def test_a_model_that_is_converted_after_the_optimizer_was_made(before, after):
    """bf16's carried bits beside fp16 numbers moved them at lr 0."""
    model = Net().to(getattr(torch, before))
    opt = ZO(model.named_parameters(), lr=1e-3, eps=1e-2)
    opt.step(lambda: model(data(0)[0].to(model.head.weight.dtype)).float().square().mean())
    model.to(getattr(torch, after))
    with pytest.raises(ParameterError, match=rf"was torch\.{before}.* and is torch\.{after}"):
        opt.step(lambda: model(data(0)[0].to(model.head.weight.dtype)).float().square().mean())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_a_look_at_folded_weights_loses_no_move(dtype, kernels):
    """The move is written, as it would have been by `fold`."""
    from zotune.kernels.dispatch import using
    from zotune.kernels.reference import ReferenceBackend

    def moved(look):
        torch.manual_seed(0)
        layer = nn.Linear(WIDTH, WIDTH).to(getattr(torch, dtype))
        x = torch.randn(4, WIDTH).to(layer.weight.dtype)
        opt = ZO(layer.named_parameters(), lr=0.1, eps=1e-2, fold_every=50)
        opt.step(lambda: layer(x).float().square().mean())
        look(opt)
        return layer.weight.detach().clone()

    def look(opt):
        with opt.folded():
            pass

    with using(ReferenceBackend()) if kernels == "reference" else warnings.catch_warnings():
        assert torch.equal(moved(look), moved(ZO.fold))
        assert not torch.equal(moved(ZO.fold), moved(lambda opt: None))


def test_a_late_move_outlives_an_error_that_stops_its_writing(monkeypatch):
    layer = nn.Linear(WIDTH, WIDTH)
    opt = ZO(layer.named_parameters(), lr=0.1, fold_every=50)
    opt.step(lambda: layer(torch.ones(2, WIDTH)).square().mean())
    before = layer.weight.detach().clone()
    with monkeypatch.context() as patch:
        patch.setattr("zotune.core.weights.backend_for", lambda device: None)
        with pytest.raises(AttributeError):
            opt.fold()
    opt.fold()
    assert not torch.equal(layer.weight, before)


def test_a_matrix_without_numbers_has_no_rank():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.empty = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.zeros(0, 5))

    model = Odd()
    for method in ("subzero", "lozo"):
        with pytest.raises(ConfigError, match="leave this tensor untrained"):
            ZO(model.named_parameters(), method).step(lambda: model.layer(torch.ones(2, WIDTH)).square().mean())


def test_numbers_that_closures_return():
    layer = nn.Linear(WIDTH, 1)
    opt = ZO(layer.named_parameters())
    opt.step(lambda: layer(torch.ones(1, WIDTH)).detach().numpy().squeeze())  # a 0-d array
    with pytest.raises(ClosureError, match="complex"):
        opt.step(lambda: layer(torch.ones(1, WIDTH)).sum() * 1j)
