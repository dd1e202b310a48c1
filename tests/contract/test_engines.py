"""Contracts 2, 3, 8, 9 for every engine, on every shape of model, in every precision."""

import copy
import weakref

import pytest
import torch
from tests.checks.engines import (
    EPS,
    check_autocast_does_not_answer_from_stale_casts,
    check_engines_agree,
    check_exception_leaves_no_trace,
    check_no_drift,
    check_probe_equals_update,
    check_queries_share_dropout_masks,
    fabric,
    losses,
    make,
    steps,
)
from tests.support.memory import peak_bytes
from tests.support.models import CASES, DTYPES, Case, assert_same_bits, snapshot
from torch import nn
from torch.nn import functional as F

from zotune.core.direction import HERE, Combination, Noise, Scaled
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.engines import ENGINES
from zotune.engines.forms import embedding_rows, form_for, linear_chunks
from zotune.engines.in_place import InPlace
from zotune.engines.layerwise import Layerwise
from zotune.errors import ClosureError, ConfigError, EngineError, ParameterError
from zotune.kernels import row_numbers
from zotune.optim.optimizer import ZO

engines = pytest.mark.parametrize("engine", ENGINES)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
models = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def small_pieces(monkeypatch):
    """Cut Linear layers of 32 numbers and more into pieces of 32, as is done with those of millions."""
    monkeypatch.setattr("zotune.engines.forms.MIN_NUMEL", 32)
    monkeypatch.setattr("zotune.engines.swapping.MIN_NUMEL", 32)


# ----------------------------------------------------------------------------------------------------------------------
# Contract 2


@models
@engines
@dtypes
def test_probe_equals_update(name, engine, dtype):
    check_probe_equals_update(name, engine, dtype)


# ----------------------------------------------------------------------------------------------------------------------
# Contracts 3 and 8


@models
@engines
@dtypes
def test_no_drift(name, engine, dtype):
    check_no_drift(name, engine, dtype, count=100 if name in ("mlp", "bare") else 5)


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("name", ["mlp", "attention", "shared"])
@engines
def test_an_exception_in_the_closure_leaves_no_trace(name, engine, at):
    """Calls 1 to 8 are the survey, the leak query, the comparison and both sides of the pair."""
    check_exception_leaves_no_trace(name, engine, torch.bfloat16 if at % 2 else torch.float32, at)


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora"])
@engines
def test_an_exception_in_a_language_model_leaves_no_trace(name, engine):
    for at in (1, 2, 5, 6):
        check_exception_leaves_no_trace(name, engine, torch.bfloat16, at)


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
@engines
def test_an_exception_deep_inside_the_forward_leaves_no_trace(engine, kind):
    """Raised while the modules around are swapped: by a submodule, at each of its first calls."""
    for at in range(1, 13):
        case, calls = CASES["shared"](torch.float32), []

        def fail(module, args, at=at, calls=calls):
            calls.append(None)
            if len(calls) == at:
                raise kind

        case.module.block.register_forward_pre_hook(fail)
        before, made_of = snapshot(case), fabric(case)
        opt = make(case, engine)
        with pytest.raises(kind):
            steps(opt, case.closure, 20)
        assert_same_bits(before, snapshot(case))
        assert fabric(case) == made_of


@engines
def test_training_moves_all_tensors_and_builds_no_graph(engine):
    case = CASES["llama"](torch.float32)
    before = snapshot(case)
    opt, graphs = make(case, engine, lr=1e-3), []

    def closure():
        loss = case.closure()
        graphs.append(loss.grad_fn)
        return loss

    loss = opt.step(closure)
    assert set(graphs) == {None}
    assert loss.grad_fn is None
    assert all(t.grad is None and t.is_leaf and t.requires_grad for _, t in case.named)
    assert all(not torch.equal(before[n], after) for n, after in snapshot(case).items())


@engines
@pytest.mark.parametrize("training", [True, False])
def test_mode_stays(engine, training):
    case = CASES["gpt2"](torch.float32)
    case.module.train(training)
    make(case, engine).step(case.closure)
    assert all(module.training is training for module in case.module.modules())


@engines
def test_negative_zeros_survive(engine):
    """Adding 0 * z to -0.0 gives 0.0: equal as numbers, but other bits."""
    case = CASES["bare"](torch.float32)
    case.named[1][1].data.fill_(-0.0)
    opt = make(case, engine)
    for _ in range(3):
        opt.step(case.closure)
    assert bool(torch.signbit(case.named[1][1]).all())


# ----------------------------------------------------------------------------------------------------------------------
# Layerwise answers as in place does


@models
@dtypes
def test_engines_give_the_same_losses(name, dtype):
    check_engines_agree(name, dtype)


@pytest.mark.parametrize("name", ["llama", "shared", "weight_giver", "lora"])
@dtypes
def test_pieces_give_the_losses_of_the_whole(name, dtype, small_pieces):
    """A product in pieces may be summed in another order: 16 ulp of the weights' dtype."""
    torch.manual_seed(0)
    pieces, opt = losses(CASES[name](dtype), "layerwise")
    torch.manual_seed(0)
    whole, _ = losses(CASES[name](dtype), "in_place")
    assert any(form is linear_chunks for _, _, form in opt.engine._forms)
    assert pieces == pytest.approx(whole, rel=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", ["llama", "lora"])
def test_pieces_leave_no_trace(name, small_pieces):
    check_no_drift(name, "layerwise", torch.bfloat16, count=3)
    check_exception_leaves_no_trace(name, "layerwise", torch.bfloat16, at=6)


@pytest.mark.parametrize(("rows", "limit"), [(10, 8), (10, 24), (10, 25), (10, 1000), (1, 3)])
def test_linear_chunks_multiply_by_exactly_the_perturbed_weight(rows, limit):
    """With the identity as input the output is the transposed weight: no sum, so no tolerance."""
    site = Site("head.weight", (rows, 8))
    module, z = nn.Linear(8, rows), Noise(stream(0, "t"))
    perturbed = z.realise(site)
    asked = []

    def part_of(part, shape):
        asked.append(part.count)
        return z.realise(part).view(shape)

    out = linear_chunks(module, site, part_of, limit, torch.eye(8).view(2, 4, 8))
    assert out.shape == (2, 4, rows)
    assert torch.equal(out.view(8, rows), F.linear(torch.eye(8), perturbed, module.bias))
    assert sum(asked) == site.count
    assert max(asked) <= max(limit, 8)


def test_embedding_rows_perturbs_only_the_rows_that_occur():
    site = Site("embed.weight", (50, 6))
    z, asked = Noise(stream(0, "t")), []
    ids = torch.tensor([[3, 49, 3], [0, 3, 7]])

    def part_of(part, shape):
        asked.append(part.rows.tolist())
        return z.realise(part).view(shape)

    out = embedding_rows(nn.Embedding(50, 6), site, part_of, 0, ids)
    assert torch.equal(out, z.realise(site)[ids])
    assert asked == [[0, 3, 7, 49]]


def test_forms_are_for_exact_types_and_untouched_forwards(small_pieces):
    class Special(nn.Linear):
        pass

    def form(module):
        return form_for(module, Site("x", tuple(module.weight.shape)))

    assert form(nn.Linear(16, 16)) is linear_chunks
    assert form(nn.Embedding(16, 16)) is embedding_rows
    assert form(Special(16, 16)) is None
    assert form(nn.Embedding(16, 16, max_norm=1.0)) is None
    patched = nn.Linear(16, 16)
    patched.forward = lambda x: x
    assert form(patched) is None
    turned = nn.Linear(16, 16)
    turned.weight = nn.Parameter(torch.randn(16, 16).t())
    assert form(turned) is None


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_an_embedding_of_nothing(shape):
    model = nn.Embedding(5, 3)
    opt = ZO(model.named_parameters(), lr=0.0)
    opt.step(lambda: model(torch.zeros(shape, dtype=torch.long)).sum() + model(torch.tensor([1])).square().sum())
    assert len(set(opt.last.losses)) == 2


def test_modules_called_with_keywords(small_pieces):
    """nn.Linear and nn.Embedding name their argument `input`; replaced forwards must take it by that name."""

    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 8), nn.Linear(8, 16)

        def forward(self, ids):
            return self.head(input=self.embed(input=ids))

    model, ids = Keywords(), torch.tensor([[1, 2]])
    case = Case(list(model.named_parameters()), lambda: model(ids).square().mean(), model)
    _, opt = losses(case, "layerwise")
    assert len(opt.engine._forms) == 2
    assert opt.engine.direct == set()


def test_sparse_tensors_in_the_forward():
    """They have no memory of their own to compare addresses with."""
    model, graph = nn.Linear(4, 4), torch.eye(4).to_sparse()
    x = torch.randn(4, 4)
    case = Case(list(model.named_parameters()), lambda: torch.sparse.mm(graph, model(x)).square().mean(), model)
    assert losses(case, "layerwise", lr=0.0)[0] == losses(case, "in_place", lr=0.0)[0]


def test_tensors_that_lie_in_one_storage():
    """As an LSTM's on CUDA: a leak of one must not hide the leak of the other."""
    both = torch.randn(2, 6)

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(both[0]), nn.Parameter(both[1])

    model = Pair()
    x = torch.randn(6)
    case = Case(list(model.named_parameters()), lambda: (model.a * x + model.b.tanh()).square().sum(), model)
    _, opt = losses(case, "layerwise")
    assert opt.engine.direct == {"a", "b"}


# ----------------------------------------------------------------------------------------------------------------------
# Leaks: what hooks do not reach is found and perturbed in place


LEAKS = {
    "attention": {"attention.out_proj.weight", "attention.out_proj.bias"},
    "bare": {"a", "b"},
    "leaky": {"2.weight"},
    "penalty": {"2.weight"},
}


@pytest.mark.parametrize("name", LEAKS)
def test_tensors_read_outside_their_module_are_found(name):
    _, opt = losses(CASES[name](torch.float32), "layerwise")
    assert opt.engine.direct == LEAKS[name]
    assert f"{len(LEAKS[name])} are read outside their module" in opt.engine.reason


@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("name", LEAKS)
def test_leaks_are_found_after_an_interrupted_look_too(name, at):
    check_exception_leaves_no_trace(name, "layerwise", torch.float32, at)


@pytest.mark.parametrize("name", ["mlp", "weight_giver", "shared", "lstm", "weight_norm", "llama", "gpt2", "lora"])
def test_models_that_hooks_reach_are_never_written(name):
    """Not even inside a query. torch counts writes to a tensor (`_version`); looking at that is no read."""
    case = CASES[name](torch.float32)
    opt, written = make(case, "layerwise"), []
    opt.step(case.closure)
    before = [tensor._version for _, tensor in case.named]
    opt.step(lambda: written.append([tensor._version for _, tensor in case.named]) or case.closure())
    assert opt.engine.direct == set()
    assert len(written) == 2
    assert all(versions == before for versions in written)


def test_a_fast_path_that_appears_in_eval_mode():
    """nn.TransformerEncoderLayer in eval mode reads its submodules' weights in one fused call: look again then."""

    def case():
        torch.manual_seed(2)
        model, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 5, 8)
        return Case(list(model.named_parameters()), lambda: model(x).square().mean(), model)

    asked = {}
    for engine in ENGINES:
        made = case()
        opt, asked[engine] = make(made, engine), []
        for training in (True, True, False, False, True):
            made.module.train(training)
            opt.step(made.closure)
            asked[engine] += opt.last.losses
    assert asked["layerwise"] == pytest.approx(asked["in_place"], rel=1e-6)
    assert len(set(asked["layerwise"])) == len(asked["layerwise"])


def test_a_closure_that_changes_the_mode_itself():
    """Another mode inside the closure than between steps is no reason to look again at each step."""
    case = CASES["dropout_mlp"](torch.float32)

    def closure():
        case.module.eval()
        loss = case.closure()
        case.module.train()
        return loss

    opt = make(case, "layerwise")
    opt.step(closure)
    checks = opt.engine.check_forwards
    steps(opt, closure, 3)
    assert opt.engine.check_forwards == checks
    assert case.module.training
    steps(opt, case.closure, 2)  # a mode that was not looked at: once more
    assert checks < opt.engine.check_forwards <= 2 * checks + 2


def test_a_new_path_through_the_model(monkeypatch):
    """Experts that the first batch did not choose: perturbed in place when met, then hooked; always right."""
    monkeypatch.setattr("zotune.engines.layerwise.LOOKS", frozenset())

    def case():
        torch.manual_seed(3)
        model = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        x = torch.randn(4, 6)
        return Case(list(model.named_parameters()), lambda: model[chosen[0]](x).square().mean(), model)

    asked, checks = {}, 0
    for engine in ENGINES:
        chosen = [0]
        made = case()
        opt, asked[engine] = make(made, engine, lr=1e-2), []
        for chosen[0] in (0, 1, 2, 0, 1, 2, 2, 1):
            before = opt.engine.check_forwards
            opt.step(made.closure)
            asked[engine] += opt.last.losses
            checks = opt.engine.check_forwards - before
    assert asked["layerwise"] == asked["in_place"]
    assert checks == 0, "known paths are looked at again and again"


def test_a_frozen_tensor_is_left_alone():
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), torch.randn(4, 6)
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    case = Case(
        [(n, p) for n, p in model.named_parameters() if p.requires_grad], lambda: model(x).square().mean(), model
    )
    losses(case, "layerwise")
    assert torch.equal(model[0].weight, frozen)


# ----------------------------------------------------------------------------------------------------------------------
# What cannot work is refused


@engines
def test_a_closure_that_runs_another_model_is_refused(engine):
    case = CASES["shared"](torch.float32)
    other, x = copy.deepcopy(case.module), torch.randn(4, 6)
    with pytest.raises(ClosureError, match="reads none of the 2 trained tensors"):
        make(case, engine).step(lambda: other(x).square().mean())


@engines
def test_a_flat_loss_is_no_error(engine):
    """Accuracy is a step function: equal losses from a closure that does read the weights."""
    case = CASES["shared"](torch.float32)
    loss = make(case, engine).step(lambda: float(case.closure() > -1))
    assert float(loss) == 1.0


def test_a_closure_that_draws_a_new_batch_each_time_is_refused():
    """Every time, not by luck: 20 runs with other data."""
    for run in range(20):
        model, batches = nn.Linear(4, 1), torch.Generator().manual_seed(run)

        def closure(model=model, batches=batches):
            return model(torch.randn(8, 4, generator=batches)).square().mean()

        with pytest.raises(EngineError, match=r"not a function of the weights.*new batch"):
            ZO(model.named_parameters()).step(closure)


def test_in_place_allows_randomness_that_is_wanted():
    model, noise = nn.Linear(4, 1), torch.Generator().manual_seed(0)
    x = torch.randn(8, 4)
    opt = ZO(model.named_parameters(), engine="in_place")
    opt.step(lambda: model(x).square().mean() + torch.randn((), generator=noise))


def test_engines_that_disagree_are_refused(monkeypatch):
    """A hook that perturbs by half: the comparison must see it."""
    case = CASES["mlp"](torch.float32)
    whole = Layerwise._fill

    def half(self, slot, part, out):
        point, self._point = self._point, 0.5 * self._point
        whole(self, slot, part, out)
        self._point = point

    monkeypatch.setattr(Layerwise, "_fill", half)
    with pytest.raises(EngineError, match=r"Engines disagree.*in_place"):
        make(case, "layerwise").step(case.closure)


def test_parameters_that_share_memory_are_refused():
    """Two Parameters over one tensor are two sites: it would be perturbed twice, and moved twice."""
    both = torch.randn(4, 4)
    with pytest.raises(ParameterError, match="'a' and 'b' share memory"):
        ZO([("a", nn.Parameter(both)), ("b", nn.Parameter(both))])
    with pytest.raises(ParameterError, match="share memory"):
        ZO([("a", nn.Parameter(both[:3])), ("b", nn.Parameter(both[2:]))])
    ZO([("a", nn.Parameter(both[:2])), ("b", nn.Parameter(both[2:]))])


def test_an_engine_that_lacks_what_a_method_needs():
    class Needy:
        name, needs, low_rank = "needy", frozenset({"activations"}), False

    case = CASES["bare"](torch.float32)
    with pytest.raises(ConfigError, match="'needy' needs activations, which engine 'auto' does not offer"):
        ZO(case.named, method=Needy())


def test_auto_says_what_it_does_and_why():
    for name, why in (
        ("llama", "2 points in one forward of LlamaModel"),
        ("bare", "not batched: tensors are read outside"),
    ):
        _, opt = losses(CASES[name](torch.float32), "auto")
        assert opt.engine.reason.startswith(why)
        assert "reached by module hooks" in opt.engine.reason


# ----------------------------------------------------------------------------------------------------------------------
# Contract 8: memory. Contract 9: common random numbers. Autocast.


def test_memory_of_a_step():
    """Beyond a forward: layerwise one layer and what makes its noise, in_place one copy of the model.

    16 layers of 1 MiB, activations of 8 KiB. Layerwise takes a scratch of one layer (kept between steps, so counted from
    a fresh engine) and one layer of noise: below 3 layers. The in_place figure shows that the instrument sees copies.
    """
    layer = 512 * 512 * 4
    model, x = nn.Sequential(*[nn.Linear(512, 512) for _ in range(16)]), torch.randn(4, 512)

    def closure():
        return model(x).square().mean()

    extra = {}
    for engine in ENGINES:
        opt = ZO(model.named_parameters(), lr=1e-6, engine=engine)
        opt.step(closure)  # looks at the model, fills the caches of the noise
        if engine == "layerwise":
            opt.engine._scratch._free.clear()
        with torch.no_grad():
            forward = peak_bytes(closure)
        extra[engine] = peak_bytes(lambda opt=opt: opt.step(closure)) - forward
    assert extra["layerwise"] < 3 * layer
    assert 16 * layer < extra["in_place"] < 19 * layer


def test_the_factors_of_the_last_step_are_gone_when_the_next_one_asks():
    """What the last step found may hold a factor of every matrix; it is there until then, for who wants to look."""
    model, alive = nn.Linear(8, 8), []

    def closure():
        alive.append(None if found is None else found() is not None)
        return model(torch.ones(2, 8)).sum()

    opt, found = ZO(model.named_parameters(), "lozo", lr=1e-3, engine="layerwise"), None
    opt.step(closure)
    assert opt.last is not None
    found = weakref.ref(opt.last.estimate.direction)
    opt.step(closure)
    assert set(alive) == {None, False}


def test_memory_of_a_large_head_and_embedding(monkeypatch):
    """M13: a tied matrix of 8 MiB, in pieces of 1 MiB, is never copied whole: below 4 pieces."""
    piece = 1 << 18  # elements
    monkeypatch.setattr("zotune.engines.forms.MIN_NUMEL", piece)
    monkeypatch.setattr("zotune.engines.swapping.MIN_NUMEL", piece)
    embed, head = nn.Embedding(8192, 256), nn.Linear(256, 8192, bias=False)
    head.weight = embed.weight
    model, ids = nn.Sequential(embed, head), torch.randint(0, 8192, (4,))

    def closure():
        return model(ids).square().mean()

    opt = ZO(model.named_parameters(), lr=1e-6)
    opt.step(closure)
    with torch.no_grad():
        forward = peak_bytes(closure)
    assert peak_bytes(lambda: opt.step(closure)) - forward < 4 * 4 * piece


@engines
def test_queries_share_dropout_masks(engine):
    check_queries_share_dropout_masks(engine)


@engines
def test_generators_are_put_back_after_an_exception(engine):
    case = CASES["dropout_mlp"](torch.float32)
    opt, state = make(case, engine), torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        opt.step(lambda: case.closure() / 0 if torch.rand(1) > 2 else 1 / 0)
    assert torch.equal(torch.get_rng_state(), state)


@engines
def test_numpy_and_python_randomness_of_the_closure_is_shared_too(engine):
    import random

    import numpy as np

    case, drawn = CASES["bare"](torch.float32), []
    opt = make(case, engine)
    for _ in range(2):
        opt.step(lambda: drawn.append((np.random.rand(), random.random())) or case.closure())
    assert len(set(drawn)) == 2
    assert drawn[0] != drawn[-1]


@engines
def test_micro_batches_give_the_loss_of_the_large_batch(engine):
    """M8: 1x8 == 2x4 == 4x2 rows inside the closure. fp64: sums in another order differ by a few 2**-53."""
    answers = []
    for parts in (1, 2, 4):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        x = torch.randn(8, 4, dtype=torch.float64)
        opt = ZO(model.named_parameters(), lr=0.1, engine=engine)

        def closure(model=model, x=x, parts=parts):
            return sum(model(piece).square().mean() for piece in x.chunk(parts)) / parts

        for _ in range(3):
            opt.step(closure)
        answers.append(opt.last.losses)
    for other in answers[1:]:
        assert other == pytest.approx(answers[0], rel=1e-12)


@engines
def test_autocast_around_the_step(engine):
    check_autocast_does_not_answer_from_stale_casts(engine)


def test_autocast_inside_and_outside_the_closure_agree():
    def run(outside):
        torch.manual_seed(0)
        case = CASES["shared"](torch.float32)
        opt = make(case, "layerwise", lr=1e-2)
        with torch.autocast("cpu", torch.bfloat16, enabled=outside):
            for _ in range(2):
                opt.step(case.closure if outside else torch.autocast("cpu", torch.bfloat16)(case.closure))
        return opt.last.losses

    assert run(True) == run(False)


# ----------------------------------------------------------------------------------------------------------------------
# Modes and wrappers around the step


@engines
@dtypes
def test_inference_mode_around_some_steps(engine, dtype):
    """Buffers made inside it must not be inference tensors: nothing outside could write to them again."""

    def run(inside):
        row_numbers.local.__dict__.clear()
        torch.manual_seed(0)
        case = CASES["llama"](dtype)
        opt = make(case, engine, lr=1e-3)
        for step in range(3):
            with torch.inference_mode(inside and step != 1):
                opt.step(case.closure)
        return snapshot(case)

    assert_same_bits(run(False), run(True))


@engines
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_model(engine):
    """Perturbations must reach compiled code, and names must not change: the losses are the uncompiled model's.

    The batched engine's products of several copies at once round otherwise in the last bit; a compiled model is perturbed in
    place. 5e-7 is four units of fp32.
    """
    asked = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(8, 4)
        wrapped = torch.compile(model, backend="eager") if compiled else model
        case = Case(list(wrapped.named_parameters()), lambda wrapped=wrapped, x=x: wrapped(x).square().mean(), model)
        asked.append(losses(case, engine)[0])
    assert asked[0] == (pytest.approx(asked[1], rel=5e-7) if engine == "batched" else asked[1])
    assert len(set(asked[0])) == len(asked[0])


@engines
def test_order_and_grouping_of_the_tensors_do_not_matter(engine):
    """M4: named tensors in another order, or in two groups with the same settings, move by the same bits."""
    results = []
    for arrange in (list, lambda named: named[::-1], lambda named: [{"params": named[3:]}, {"params": named[:3]}]):
        torch.manual_seed(0)
        case = CASES["attention"](torch.float32)
        opt = ZO(arrange(case.named), lr=1e-2, eps=EPS, engine=engine)
        for _ in range(3):
            opt.step(case.closure)
        results.append(snapshot(case))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


# ----------------------------------------------------------------------------------------------------------------------
# Points


def test_empty_points_ask_at_the_current_weights():
    """Any empty combination, not only HERE itself: nothing is swapped, and nothing is taken for a leak."""
    case = CASES["shared"](torch.float32)
    opt = make(case, "layerwise")
    with torch.no_grad():
        (here,) = opt.engine.losses([Combination()], case.closure, 0)
        assert float(here) == float(case.closure())
        z = Noise(stream(0, "t"))
        again, moved = opt.engine.losses([-HERE, 0.1 * z], case.closure, 0)
    assert float(again) == float(here) != float(moved)
    assert opt.engine.direct == set()


@engines
def test_a_point_that_touches_some_tensors_only(engine):
    """Blocks: the others keep their stored values, and are not swapped for nothing."""
    case = CASES["mlp"](torch.float32)
    weights = make(case, engine).weights
    made = ENGINES[engine](weights)
    block = Scaled(Noise(stream(0, "t")), {"head.weight": 0.1}, otherwise=0.0)
    with torch.no_grad():
        here, moved = made.losses([HERE, block], case.closure, 0)
        expected = InPlace(weights).losses([HERE, block], case.closure, 0)
    assert float(here) != float(moved)
    assert [float(here), float(moved)] == pytest.approx(expected.tolist(), rel=1e-6)
