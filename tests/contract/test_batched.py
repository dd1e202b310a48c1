"""The batched engine answers as the in-place engine does, for every family of models and every kind of point."""

import math

import pytest
import torch
from tests.support.language_models import MODELS, make
from tests.support.models import bits
from torch.nn.modules.module import register_module_forward_pre_hook

from zotune.core.direction import HERE, Noise, Scaled, Stored
from zotune.core.factors import Factors, Sheet
from zotune.core.low_rank import LowRank
from zotune.core.noise import stream
from zotune.core.weights import Weights
from zotune.engines.batched import Auto, Batched
from zotune.engines.batched_layers import CopiedConv1D, CopiedLinear
from zotune.engines.batched_modules import Wave
from zotune.engines.batched_sheets import FreshFactors, FreshProducts
from zotune.engines.batched_size import copies_for
from zotune.engines.in_place import InPlace
from zotune.engines.layerwise import Layerwise
from zotune.optim.optimizer import ZO

EPS = 2.0**-6
models = pytest.mark.parametrize("name", MODELS)


def noise(number, factors=None):
    z = Noise(stream(0, "z", number))
    return z if factors is None else Scaled(z, factors)


def low_rank(weights, number, rank=2, shared=True):
    """Low-rank on matrices, noise on the rest; the right factors are the same objects for all numbers if `shared`."""
    factors = {}
    for slot in weights:
        if slot.tensor.dim() == 2:
            m, n = slot.tensor.shape
            draws = torch.Generator().manual_seed(number)
            left = torch.randn(m, rank, generator=draws)
            right = torch.randn(n, rank, generator=draws)
            factors[slot.site.name] = Factors.of(left, right)
            if shared:
                key = slot.site.name
                kept = _RIGHT.setdefault((id(weights), key, rank), factors[key].right)
                factors[key] = Factors(factors[key].left, kept)
    return LowRank(factors) + Scaled(noise(number), dict.fromkeys(factors, 0.0))


def on_sheets(weights, number, rank=2, turned=False, fresh="left", own=False, reshaped=False):
    """As a method makes them that draws all matrices at once; the kept factors are the same objects for all numbers."""
    slots = [slot for slot in weights if slot.tensor.dim() == 2]
    draws = torch.Generator().manual_seed(number)
    rows, shapes, kept, sizes = [], [], [], []
    for slot in slots:
        m, n = slot.tensor.shape if fresh == "left" else slot.tensor.shape[::-1]
        if reshaped and n % 2 == 0:
            m, n = 2 * m, n // 2
        sizes.append(max(m, 20) * rank)  # it may take up more room than it needs
        rows.append(torch.randn(sizes[-1], generator=draws))
        shapes.append((rank, m) if turned else (m, rank))
        key = (id(weights), slot.site.name, rank, fresh, reshaped, number if own else None)
        kept.append(_RIGHT.setdefault(key, torch.randn(n, rank, generator=draws)))
    names = tuple(slot.site.name for slot in slots)
    ceilings = torch.full((len(names),), 8.0, dtype=torch.float64)
    sheet = Sheet(
        names, torch.cat(rows), tuple(sizes), tuple(shapes), turned, tuple(kept), (fresh,) * len(names), ceilings
    )
    return LowRank.on([sheet]) + Scaled(noise(number), dict.fromkeys(names, 0.0))


def several_on_what_waits(weights, **settings):
    """Three pairs around moves that wait; one direction stands in its point twice."""
    waits, *new = [on_sheets(weights, k, **settings) for k in range(4)]
    return [0.1 * waits + p for z in new for p in (EPS * z, -EPS * z)] + [0.1 * waits + EPS * new[0] + 2 * EPS * new[0]]


_RIGHT: dict = {}


@pytest.fixture(autouse=True)
def _forget():
    _RIGHT.clear()


@pytest.fixture(autouse=True)
def thin_products(monkeypatch):
    """However many rows there are, of few numbers: how low-rank points are evaluated is chosen by the tests."""
    monkeypatch.setattr("zotune.engines.batched_layers.MATRIX", math.inf)


@pytest.fixture
def matrices(monkeypatch, thin_products):
    """Low-rank points as a matrix for each copy."""
    monkeypatch.setattr("zotune.engines.batched_layers.MATRIX", 0)


def pair(z):
    return [EPS * z, -EPS * z]


def some_sites(weights):
    """Factors that leave every other tensor alone."""
    return {name: float(k % 2) for k, name in enumerate(weights.slots)}


POINTS = {
    "pair": lambda w: pair(noise(0)),
    "three pairs": lambda w: [p for k in range(3) for p in pair(noise(k))],
    "one-sided with here": lambda w: [HERE, EPS * noise(0), EPS * noise(1)],
    "an odd number": lambda w: [EPS * noise(k) for k in range(5)],
    "per group": lambda w: pair(noise(0, {name: 1.0 + k for k, name in enumerate(w.slots)})),
    "some sites": lambda w: pair(noise(0, some_sites(w))),
    "a site moved by one point only": lambda w: [EPS * noise(0, some_sites(w)), EPS * noise(1)],
    "low-rank on some sites, beside dense": lambda w: [
        EPS * Scaled(low_rank(w, 0, shared=False), some_sites(w)),
        EPS * noise(1),
    ],
    "stored": lambda w: [EPS * noise(0), EPS * Stored({s.site.name: torch.ones_like(s.tensor) for s in w})],
    "low-rank pair": lambda w: pair(low_rank(w, 0)),
    "low-rank pairs, shared right": lambda w: [p for k in range(3) for p in pair(low_rank(w, k))],
    "low-rank pairs, own factors": lambda w: [p for k in range(3) for p in pair(low_rank(w, k, shared=False))],
    "low-rank on what waits": lambda w: [
        0.1 * low_rank(w, 9) + 0.02 * low_rank(w, 8, rank=1, shared=False) + p for p in pair(low_rank(w, 0))
    ],
    "low-rank, one point": lambda w: [EPS * low_rank(w, 0)],
    "low-rank and here": lambda w: [HERE, EPS * low_rank(w, 0), EPS * low_rank(w, 1)],
    "low-rank beside dense": lambda w: [EPS * low_rank(w, 0), EPS * noise(0)],
    "on sheets, pair": lambda w: pair(on_sheets(w, 0)),
    "on sheets, turned": lambda w: pair(on_sheets(w, 0, turned=True)),
    "on sheets, the right factor": lambda w: pair(on_sheets(w, 0, fresh="right")),
    "on sheets, on what waits": several_on_what_waits,
    "on sheets, turned, on what waits": lambda w: several_on_what_waits(w, turned=True),
    "on sheets, beside noise on the same matrices": lambda w: pair(on_sheets(w, 0) + noise(5)),
    "on sheets, own kept factors": lambda w: [EPS * on_sheets(w, k, own=True) for k in range(3)],
    "on sheets, in another shape": lambda w: pair(on_sheets(w, 0, reshaped=True)),
    "on sheets and here": lambda w: [HERE, EPS * on_sheets(w, 0), EPS * on_sheets(w, 1)],
    "on sheets, some with own factors": lambda w: [EPS * on_sheets(w, 0), EPS * low_rank(w, 1, shared=False)],
    "on sheets, tensors as coefficients": lambda w: [torch.tensor(EPS) * on_sheets(w, 0), -EPS * on_sheets(w, 0)],
    "the same low-rank direction twice": lambda w: [
        EPS * one + 2 * EPS * one for one in (low_rank(w, 0), low_rank(w, 1))
    ],
    "tensors as coefficients": lambda w: [torch.tensor(EPS) * low_rank(w, 0), torch.tensor(-EPS) * low_rank(w, 0)],
}


class Calls:
    """Counts calls of modules by the name of their class, from outside of any engine."""

    def __enter__(self):
        self.counts = {}
        self.hook = register_module_forward_pre_hook(self._count)
        return self

    def __exit__(self, *_):
        self.hook.remove()

    def _count(self, module, args):
        self.counts[type(module).__name__] = self.counts.get(type(module).__name__, 0) + 1


def answers(engine, points, closure, waves=2):
    with torch.no_grad():
        for _ in range(waves):  # the first wave looks at the model and compares
            losses = engine.losses(points, closure, 0)
    return losses.tolist()


# ----------------------------------------------------------------------------------------------------------------------
# The same losses


@pytest.mark.parametrize("points", POINTS)
@models
def test_losses_are_those_of_the_in_place_engine(name, points):
    """fp64: products are summed in another order, and low-rank points are added to the outputs: a few hundred 2**-53."""
    _, named, closure = make(name)
    weights = Weights(named)
    before = {slot.site.name: bits(slot.tensor) for slot in weights}
    made = POINTS[points](weights)
    engine = Batched(weights)
    batched = answers(engine, made, closure)
    assert "in one forward" in engine.reason, engine.reason
    assert len(set(batched)) == len(made)
    assert batched == pytest.approx(answers(InPlace(weights), made, closure, waves=1), rel=1e-12)
    assert all(torch.equal(bits(slot.tensor), before[slot.site.name]) for slot in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "points",
    [
        "pair", "low-rank pair", "low-rank pairs, own factors", "one-sided with here",
        "on sheets, pair", "on sheets, on what waits",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "bert"])
def test_losses_in_low_precision(name, points, dtype):
    """Sums of another order, and in bf16 factors of 8 bits beside weights that are rounded after they are perturbed.

    32 units of the precision cover what a forward of a few layers makes of single roundings.
    """
    _, named, closure = make(name, dtype)
    weights = Weights(named)
    made = POINTS[points](weights)
    assert answers(Batched(weights), made, closure) == pytest.approx(
        answers(InPlace(weights), made, closure, waves=1), rel=32 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("points", [name for name in POINTS if "low-rank" in name or "sheets" in name])
@pytest.mark.parametrize("name", ["llama_untied", "opt", "gpt2", "bert", "lora"])  # with biases, and without
def test_low_rank_points_as_matrices(name, points, matrices, monkeypatch):
    """fp64: the products of a matrix and of its two parts, added up in another order, a few hundred 2**-53."""
    _, named, closure = make(name)
    weights = Weights(named)
    made, filled = POINTS[points](weights), []
    right = CopiedLinear._displaced
    monkeypatch.setattr(CopiedLinear, "_displaced", lambda self, *a: filled.append(1) or right(self, *a))
    engine = Batched(weights)
    assert answers(engine, made, closure) == pytest.approx(answers(InPlace(weights), made, closure, waves=1), rel=1e-12)
    assert "in one forward" in engine.reason, engine.reason
    assert filled or "noise" in points or "dense" in points or "some" in points or "shape" in points


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("points", ["low-rank pair", "low-rank pairs, own factors", "on sheets, on what waits"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_matrices_in_low_precision(name, points, dtype, matrices):
    """As in place, which rounds the same sums once; there from factors of 24 bits, here of the dtype's: 32 units, as above."""
    _, named, closure = make(name, dtype)
    weights = Weights(named)
    made, engine = POINTS[points](weights), Batched(weights)
    assert answers(engine, made, closure) == pytest.approx(
        answers(InPlace(weights), made, closure, waves=1), rel=32 * torch.finfo(dtype).eps
    )
    assert "in one forward" in engine.reason, engine.reason


def test_matrices_of_a_few_sizes_have_scratch_of_their_own():
    """Of more sizes they share room for the largest, so that all scratch is at most a few of the largest matrices."""
    wave = Wave(Weights([]), largest=100)
    made = {n: wave.matrices(torch.zeros(n, 10))[0] for n in range(1, 11)}
    assert [whole.shape for whole in made.values()] == [(2, n, 10) for n in made]
    assert sum(buffer.numel() for buffer in wave.buffers.values()) == 2 * (10 + 20 + 30 + 40 + 100)
    assert len({made[n].data_ptr() for n in (1, 2, 3, 4, 10)}) == 5
    assert len({made[n].data_ptr() for n in (5, 6, 7, 8, 9, 10)}) == 1
    assert wave.matrices(torch.ones(3, 10))[0] is made[3]
    assert wave.matrices(torch.zeros(10, 3))[0].data_ptr() == made[3].data_ptr()


def test_many_rows_are_multiplied_by_matrices_and_few_by_factors(monkeypatch):
    """What 24 x 16 numbers cost against those of an input of 16 and an output of 24 in each row."""
    monkeypatch.setattr("zotune.engines.batched_layers.MATRIX", 3)

    def chosen(kind, rows, matrix):
        layer = kind(None, {}, None, [])
        layer.moves, layer.thin = {"weight"}, True
        return layer._writes(rows, matrix) == layer._displaced

    matrix = torch.zeros(24, 16)
    assert [chosen(CopiedLinear, rows, matrix) for rows in (1, 18, 19)] == [False, False, True]  # 3 * 384 / (16 + 48)
    assert [chosen(CopiedConv1D, rows, matrix.T) for rows in (18, 19)] == [False, True]
    assert not chosen(CopiedLinear, 1000, matrix.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_points_have_the_bits_of_layer_by_layer(dtype):
    """The same products of the same perturbed matrices, copy by copy: no tolerance where the kernels do not see the batch."""
    _, named, closure = make("llama", dtype)
    weights = Weights(named)
    made = POINTS["three pairs"](weights)
    assert answers(Batched(weights), made, closure) == answers(Layerwise(weights), made, closure)


def test_low_rank_in_bf16_is_evaluated_to_the_precision_of_the_factors():
    """Slopes along a low-rank direction: bf16 factors against exact ones, in an fp32 model. 2 units of 2**-8 on each factor."""
    _, named, closure = make("llama", torch.float32)
    weights = Weights(named)
    made = pair(low_rank(weights, 0))
    plus, minus = answers(Batched(weights), made, closure)
    exact = answers(InPlace(weights), made, closure, waves=1)
    assert plus - minus == pytest.approx(exact[0] - exact[1], rel=1e-3)


@pytest.mark.parametrize("name", ["llama", "gpt2", "lora"])
def test_training_moves_the_weights_as_in_place(name):
    """20 steps in fp64: roundings of 1e-16 grow by the learning rate over eps at most."""
    moved = []
    for engine in ("in_place", "batched"):
        _, named, closure = make(name)
        opt = ZO(named, lr=1e-3, eps=1e-2, engine=engine)
        for _ in range(20):
            opt.step(closure)
        moved.append(torch.cat([p.detach().flatten() for _, p in named]))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-9, atol=1e-9)


def test_autocast_around_the_step():
    _, named, closure = make("llama", torch.float32)
    weights = Weights(named)
    for made in (pair(noise(0)), pair(low_rank(weights, 0))):
        with torch.autocast("cpu", torch.bfloat16):
            batched = answers(Batched(weights), made, closure)
            expected = answers(InPlace(weights), made, closure, waves=1)
        assert batched == pytest.approx(expected, rel=32 * 2**-8)  # some 32 roundings to bf16, each by 2**-9, both ways
        assert len(set(batched)) == 2


def test_tensors_that_are_put_elsewhere_are_found():
    """`parameter.data = ...` between two steps: what was known of the old memory is forgotten."""
    for low in (False, True):
        _, named, closure = make("llama", torch.float32)
        weights = Weights(named)
        engine = Batched(weights)
        points = pair(on_sheets(weights, 0)) if low else pair(noise(0))
        answers(engine, points, closure)
        held = []
        for _, parameter in named:
            held.append(parameter.data)
            parameter.data = parameter.data * 1.25
        assert answers(engine, points, closure, waves=1) == pytest.approx(
            answers(InPlace(weights), points, closure, waves=1), rel=1e-5
        )


def test_autocast_and_a_pair_share_a_forward():
    """Products into a given tensor do not cast, so that under autocast they make tensors of their own."""
    _, named, closure = make("llama", torch.float32)
    weights = Weights(named)
    engine = Batched(weights)
    for wide in (pair(noise(0)), pair(on_sheets(weights, 0)), pair(low_rank(weights, 0))):
        with torch.autocast("cpu", torch.bfloat16):
            answers(engine, wide, closure)
            with Calls() as calls:
                answers(engine, wide, closure, waves=1)
        assert calls.counts["LlamaDecoderLayer"] == 2, engine.reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "fresh"), [("llama", "left"), ("gpt2", "right")])
@pytest.mark.parametrize("points", [pair, several_on_what_waits])
def test_factors_on_sheets_are_summed_for_all_matrices_at_once(name, fresh, points, dtype, monkeypatch):
    """However many terms there are: where the fresh factor is the outputs' (GPT-2 stores its matrices the other way round)."""
    _, named, closure = make(name, dtype)
    weights = Weights(named)
    made, widths = [], []
    was, add = FreshFactors.made, FreshProducts.add
    monkeypatch.setattr(FreshFactors, "made", lambda *a: made.append(1) or was(*a))
    monkeypatch.setattr(FreshProducts, "add", lambda self, *a: widths.append(self.into.shape[1]) or add(self, *a))
    engine = Batched(weights)
    chosen = points(on_sheets(weights, 0, fresh=fresh)) if points is pair else points(weights, fresh=fresh)
    answers(engine, chosen, closure)
    made.clear()
    widths.clear()
    answers(engine, chosen, closure, waves=1)
    inside = [c for c in engine.served.copied if isinstance(c, CopiedLinear)]
    assert len(made) == 1
    assert widths == [2] * len(inside)


# ----------------------------------------------------------------------------------------------------------------------
# Forwards


@pytest.mark.parametrize("name", ["llama", "qwen3", "lora"])
def test_a_pair_is_one_call_of_the_body(name):
    _, named, closure = make(name)
    weights = Weights(named)
    engine = Batched(weights)
    answers(engine, pair(noise(0)), closure)
    layer = {"llama": "LlamaDecoderLayer", "lora": "LlamaDecoderLayer", "qwen3": "Qwen3DecoderLayer"}[name]
    for points in (pair(noise(1)), pair(low_rank(weights, 1)), POINTS["three pairs"](weights)):
        with Calls() as calls:
            answers(engine, points, closure, waves=1)
        assert calls.counts[layer] == 2, "two layers, once each"


def test_forwards_that_look_are_counted():
    """Every forward is either a query or a check."""
    for name in ("llama", "mlp"):
        _, named, closure = make(name)
        called = []
        opt = ZO(named, engine="batched")
        for _ in range(3):
            opt.step(lambda closure=closure, called=called: called.append(None) or closure())
        assert len(called) == opt.forwards + opt.engine.check_forwards - 2  # two copies, to learn from, are no call
        assert opt.forwards == 6


def test_batches_of_other_sizes_need_no_second_look(monkeypatch):
    monkeypatch.setattr("zotune.engines.layerwise.LOOKS", frozenset())
    model, named, _ = make("llama")
    weights = Weights(named)
    engine = Batched(weights)
    for rows, positions in ((3, 7), (1, 7), (2, 2), (5, 5), (2, 7), (4, 1)):
        ids = torch.randint(2, 67, (rows, positions))

        def closure(ids=ids):
            return model(input_ids=ids).logits.square().mean()

        for made in (pair(noise(0)), POINTS["three pairs"](weights)):
            assert answers(engine, made, closure, 1) == pytest.approx(
                answers(InPlace(weights), made, closure, 1), rel=1e-12
            )
            assert f"{len(made)} points in one forward" in engine.reason
        if positions > 1:  # else rows of examples and of tokens cannot be told apart
            assert engine.check_forwards == 10


def test_other_arguments_are_looked_at():
    """A mask in some batches, embeddings instead of numbers in others: right each time."""
    model, named, _ = make("llama")
    weights = Weights(named)
    engine, ids = Batched(weights), torch.randint(2, 67, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    kinds = [
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids, "position_ids": ids % 5},
    ]
    kinds.append({"inputs_embeds": torch.randn(3, 7, 16, dtype=torch.float64)})
    for kind in kinds + kinds:

        def closure(kind=kind):
            return model(**kind).logits.square().mean()

        made = pair(noise(0))
        assert answers(engine, made, closure, 1) == pytest.approx(
            answers(InPlace(weights), made, closure, 1), rel=1e-12
        )
        assert "2 points in one forward of LlamaModel" in engine.reason


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


def test_sizes_decide_alone():
    assert copies_for(32, 2, low_rank=False, by_size=True) == 2
    assert copies_for(32, 5, low_rank=False, by_size=True) == 5
    assert copies_for(32, 99, low_rank=False, by_size=True) == 16
    assert copies_for(100, 99, low_rank=True, by_size=True) == 4, "both sides of a pair stay together"
    assert copies_for(128, 8, low_rank=False, by_size=True) == 4
    assert copies_for(1024, 8, low_rank=False, by_size=True) == 2
    assert copies_for(1025, 8, low_rank=False, by_size=True) == 1
    assert copies_for(1024, 8, low_rank=True, by_size=True) == 2
    assert copies_for(1024, 1, low_rank=True, by_size=True) == 1
    assert copies_for(0, 3, low_rank=False, by_size=True) == 3
    assert copies_for(1024, 99, low_rank=False, by_size=False) == 16


@pytest.mark.parametrize("low", [False, True])
def test_auto_goes_by_size_and_gives_the_same_losses(low, monkeypatch):
    monkeypatch.setattr("zotune.engines.batched_size.DENSE_TOKENS", 21)
    monkeypatch.setattr("zotune.engines.batched_size.TOGETHER", 4 * 21)
    model, named, small = make("llama")
    weights = Weights(named)
    large = torch.randint(2, 67, (12, 7))
    engine = Auto(weights)
    points = [p for k in range(3) for p in pair(low_rank(weights, k) if low else noise(k))]
    for closure, counts in (
        (small, (4, 2)),
        (lambda: model(input_ids=large).logits.square().mean(), (2, 2, 2) if low else (1,) * 6),
    ):
        expected = answers(InPlace(weights), points, closure, 1)
        assert answers(engine, points, closure) == pytest.approx(expected, rel=1e-12)  # fp64, sums in another order
        with Calls() as calls:
            answers(engine, points, closure, 1)
        assert calls.counts["LlamaDecoderLayer"] == 2 * len(counts)
    assert (
        "2 points in one forward" in engine.reason
        if low
        else "layer by layer, one point at a time: 84 tokens" in engine.reason
    )


def test_auto_is_the_default_and_says_why():
    _, named, closure = make("llama", torch.float32)
    opt = ZO(named)
    opt.step(closure)
    assert isinstance(opt.engine, Auto)
    assert opt.engine.reason.startswith("2 points in one forward of LlamaModel, 21 tokens each; 20 tensors are reached")


# ----------------------------------------------------------------------------------------------------------------------
# What stays as it was


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "mlp"])
def test_a_resumed_run_has_the_same_bits(name):
    """Looking at the model anew, at any step, leaves the answers alone; also for waves of one point."""
    for method, options in (("mezo", {}), ("lozo", {"rank": 2, "interval": 3}), ("fzoo", {"n": 3})):
        runs = []
        for fresh in (False, True):
            _, named, closure = make(name, torch.float32)
            opt = ZO(named, method, lr=1e-3, engine="batched", method_options=options)
            for _ in range(6):
                opt.step(closure)
                if fresh:
                    opt.engine = Batched(opt.weights)
            runs.append([bits(p) for _, p in named])
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_waves_of_one_low_rank_point_do_not_depend_on_the_look():
    _, named, closure = make("llama", torch.float32)
    weights = Weights(named)
    made = [EPS * low_rank(weights, 0)]
    engine = Batched(weights)
    assert answers(engine, made, closure, 1) == answers(engine, made, closure, 1)


class Interrupted(Exception):
    """What a closure or a module raises."""


@pytest.mark.parametrize("where", ["LlamaModel", "LlamaMLP", "LlamaForCausalLM", "Linear", "closure"])
def test_exceptions_leave_no_trace(where):
    model, named, closure = make("llama", torch.bfloat16)
    weights = Weights(named)
    engine = Batched(weights)
    for made in (pair(noise(0)), pair(low_rank(weights, 0))):
        expected = answers(engine, made, closure)
        before = [bits(p) for _, p in named]
        fabric = [sorted(vars(m)) + [id(p) for p in m._parameters.values()] for m in model.modules()]
        for at in (1, 2, 3, 9):
            seen = []

            def fail(module, args, at=at, seen=seen):
                seen.extend([None] * (type(module).__name__ == where))
                if len(seen) == at:
                    raise Interrupted

            def failing(at=at, seen=seen):
                loss = closure()
                seen.extend([None] * (where == "closure"))
                if len(seen) == at:
                    raise Interrupted
                return loss

            hook = register_module_forward_pre_hook(fail)
            try:
                answers(engine, made, failing, 1)
            except Interrupted:
                pass
            finally:
                hook.remove()
            assert [sorted(vars(m)) + [id(p) for p in m._parameters.values()] for m in model.modules()] == fabric
            assert all(torch.equal(bits(p), b) for (_, p), b in zip(named, before, strict=True))
            assert answers(engine, made, closure, 1) == expected


def test_losses_that_are_not_finite():
    """They come back as they are, in their places."""
    _, named, closure = make("llama")
    weights, calls = Weights(named), []
    engine = Batched(weights)
    answers(engine, pair(noise(0)), closure)

    def sometimes():
        calls.append(None)
        return closure() if len(calls) != 2 else torch.tensor(float("nan"))

    good, bad = answers(engine, pair(noise(0)), sometimes, 1)
    assert good == pytest.approx(answers(engine, pair(noise(0)), closure, 1)[0])
    assert bad != bad
