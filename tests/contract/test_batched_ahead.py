"""Output layers behind the body that are multiplied for all points at once: the losses are those of each point alone."""

import pytest
import torch
from tests.support.language_models import make
from torch.nn import functional as F

from zotune.core.direction import HERE, Noise
from zotune.core.factors import Factors
from zotune.core.low_rank import LowRank
from zotune.core.noise import stream
from zotune.core.weights import Weights
from zotune.engines.batched import Batched
from zotune.engines.batched_ahead import AheadOfTime
from zotune.engines.in_place import InPlace

EPS = 2.0**-6


@pytest.fixture(autouse=True)
def _pieces(monkeypatch):
    """Tiny output layers go ahead too, and in pieces: of 67 rows 12 at a time."""
    for place in ("forms.MIN_NUMEL", "swapping.MIN_NUMEL"):
        monkeypatch.setattr(f"zotune.engines.{place}", 200)
    monkeypatch.setattr("zotune.engines.batched_ahead.IN_CACHE", 200)
    monkeypatch.setattr("zotune.engines.batched_ahead.FEW", 0.01)


@pytest.fixture
def spied(monkeypatch):
    """Layers that were multiplied ahead: how many points, how many rows of each."""
    made = []
    right = AheadOfTime._outputs

    def outputs(self, layer, slot, inputs, points):
        made.append(tuple(inputs.shape[:2]))
        return right(self, layer, slot, inputs, points)

    monkeypatch.setattr(AheadOfTime, "_outputs", outputs)
    return made


def z(number):
    return Noise(stream(0, "z", number))


def low_rank(weights, number):
    """Low-rank on all matrices, the output layer too."""
    draws = torch.Generator().manual_seed(number)
    matrices = [slot.site for slot in weights if slot.tensor.dim() == 2]
    return LowRank(
        {
            site.name: Factors.of(*(torch.randn(size, 2, generator=draws, dtype=torch.float64) for size in site.shape))
            for site in matrices
        }
    )


POINTS = {
    "pair": lambda w: [EPS * z(0), -EPS * z(0)],
    "five": lambda w: [EPS * z(k) for k in range(5)],
    "one-sided with here": lambda w: [EPS * z(0), HERE, EPS * z(1)],
    "low-rank pair": lambda w: [EPS * low_rank(w, 0), -EPS * low_rank(w, 0)],
    "low-rank, three": lambda w: [EPS * low_rank(w, k) for k in range(3)],
    "low-rank beside dense": lambda w: [EPS * low_rank(w, 0), EPS * z(0)],
}


def heads(model, ids):
    """Ways from the body's answer to the output layer, by name."""
    vocabulary = model.config.vocab_size
    labels = ids[:, 1:].reshape(-1)
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    wanted[0, 2] = wanted[1, 5] = wanted[2, 0] = True

    def of(choose):
        return lambda: F.cross_entropy(
            model.lm_head(choose(model.model(input_ids=ids).last_hidden_state)).reshape(-1, vocabulary), labels[:3]
        )

    return {
        "a copy of the last token": of(lambda hidden: hidden[:, -1].contiguous()),
        "a view of the last token": of(lambda hidden: hidden[:, -1:]),
        "chosen positions": of(lambda hidden: hidden[wanted]),
        "one position twice": of(lambda hidden: hidden[0, [3, 3, 1]]),
        "all": lambda: model(input_ids=ids, labels=ids).loss,
        "some by logits_to_keep": lambda: model(input_ids=ids, logits_to_keep=2).logits.square().mean(),
    }


def asked(name="llama", dtype=torch.float64):
    model, named, _ = make(name, dtype)
    ids = torch.randint(0, model.config.vocab_size, (3, 6), generator=torch.Generator().manual_seed(1))
    return Weights(named), model, ids


def losses(engine, points, closure, waves=3):
    with torch.no_grad():
        return [engine.losses(points, closure, 0).tolist() for _ in range(waves)][-1]


def the_same(weights, points, closure):
    """fp64: sums of another order, a few hundred 2**-53."""
    engine = Batched(weights)
    made = losses(engine, points, closure)
    assert "in one forward" in engine.reason
    assert made == pytest.approx(losses(InPlace(weights), points, closure, waves=1), rel=1e-12)
    assert len(set(made)) == len(points)


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("head", ["a copy of the last token", "chosen positions", "all"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])  # the output layer is the embedding, and is its own
def test_every_kind_of_point(name, head, points, spied):
    weights, model, ids = asked(name)
    made = POINTS[points](weights)
    the_same(weights, made, heads(model, ids)[head])
    # A wave of one forward for all points, twice or more: the first compares, and puts one point beside one far away. Points
    # that do not move it go alone.
    assert (len(spied) > 1) is ("here" not in points)
    assert {copies for copies, _ in spied} <= {2, len(made)}


@pytest.mark.parametrize("head", list(heads(asked()[1], torch.zeros(3, 6, dtype=torch.long))))
def test_every_way_to_the_output_layer(head, spied):
    weights, model, ids = asked()
    the_same(weights, POINTS["pair"](weights), heads(model, ids)[head])
    assert spied


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype, spied):
    """Single roundings of the logits: 8 units of the precision."""
    weights, model, ids = asked(dtype=dtype)
    closure = heads(model, ids)["chosen positions"]
    points = POINTS["pair"](weights)
    expected = losses(InPlace(weights), points, lambda: closure().float(), waves=1)
    assert losses(Batched(weights), points, lambda: closure().float()) == pytest.approx(
        expected, rel=8 * torch.finfo(dtype).eps
    )
    assert spied


def test_two_calls_of_the_layer(spied):
    """In each closure, with other rows: both are found at the other points."""
    weights, model, ids = asked()

    def closure():
        hidden = model.model(input_ids=ids).last_hidden_state
        return model.lm_head(hidden[:, 1]).square().mean() + model.lm_head(hidden[:2, 3]).sin().mean()

    the_same(weights, POINTS["pair"](weights), closure)
    assert set(spied) == {(2, 3), (2, 2)}


@pytest.mark.parametrize(
    "way",
    [
        lambda hidden, turn: hidden[:, turn % 2],  # other rows from call to call
        lambda hidden, turn: hidden[:, -1] * (1.0 if turn % 2 else 0.5),  # no rows of the answer, in some calls
        lambda hidden, turn: hidden[: 1 + turn % 2, -1],  # more rows
        lambda hidden, turn: 2 * hidden[:, -1],  # never a row of it
    ],
)
def test_closures_that_do_something_else_for_other_points(way):
    """What was expected is compared with what is asked; a closure that surprises once is not trusted again."""
    weights, model, ids = asked()

    def closure_of():
        turns = iter(range(1000))
        return lambda: model.lm_head(way(model.model(input_ids=ids).last_hidden_state, next(turns))).square().mean()

    points = POINTS["five"](weights)
    engine = Batched(weights)
    engine.compares = False
    looks = closure_of()
    with torch.no_grad():
        engine.losses(points, looks, 0)
        for _ in range(2):
            made = engine.losses(points, closure_of(), 0).tolist()
            expected = losses(_looked(weights, points, looks), points, closure_of(), waves=1)
            assert made == pytest.approx(expected, rel=1e-12)


def _looked(weights, points, closure):
    """An in-place engine whose next calls of the closure are the five of the points."""
    engine = InPlace(weights)
    engine.losses(points, closure, 0)
    return engine


@pytest.mark.parametrize("way", [lambda hidden: 2 * hidden[:, -1], lambda hidden: hidden[:, -1] + 2.0**-30])
def test_what_is_no_row_of_the_answer_goes_alone_from_the_first_wave_on(way, spied):
    weights, model, ids = asked()

    def closure():
        return model.lm_head(way(model.model(input_ids=ids).last_hidden_state)).square().mean()

    points = POINTS["pair"](weights)
    expected = losses(InPlace(weights), points, closure, waves=1)
    engine = Batched(weights)
    engine.compares = False
    for _ in range(3):
        # fp64, sums in another order
        assert losses(engine, points, closure, waves=1) == pytest.approx(expected, rel=1e-12)
    assert not spied


def test_a_surprise_is_the_last_one(spied):
    weights, model, ids = asked()
    turns = iter(range(1000))

    def closure():
        return model.lm_head(model.model(input_ids=ids).last_hidden_state[:, next(turns) % 2]).square().mean()

    engine = Batched(weights)
    engine.compares = False
    losses(engine, POINTS["pair"](weights), closure, waves=6)
    assert len(spied) == 1


def test_logits_that_are_written_to(spied):
    """What one closure does to its logits is not seen by the next."""
    weights, model, ids = asked()

    def closure():
        logits = model.lm_head(model.model(input_ids=ids).last_hidden_state[:, -1])
        return logits.mul_(3.0).add_(1.0).square().mean()

    the_same(weights, POINTS["pair"](weights), closure)
    assert spied


def test_memory_bounds_what_goes_ahead(spied, monkeypatch):
    """Two points times three rows of 67 outputs against 67 x 16 numbers: more than a sixteenth."""
    monkeypatch.setattr("zotune.engines.batched_ahead.FEW", 16)
    weights, model, ids = asked()
    the_same(weights, POINTS["pair"](weights), heads(model, ids)["a copy of the last token"])
    assert not spied


def test_a_layer_with_a_bias_goes_alone(spied):
    weights, model, ids = asked("llama")
    model.lm_head.bias = torch.nn.Parameter(torch.randn(67, dtype=torch.float64))
    weights = Weights(model.named_parameters())
    the_same(weights, POINTS["pair"](weights), heads(model, ids)["a copy of the last token"])
    assert not spied


def test_autocast_goes_alone(spied):
    """Products under autocast have another precision: 2**-8 of bf16, 32 of them as everywhere."""
    weights, model, ids = asked(dtype=torch.float32)
    closure = heads(model, ids)["a copy of the last token"]

    def under():
        with torch.autocast("cpu", torch.bfloat16):
            return closure().float()

    points = POINTS["pair"](weights)
    expected = losses(InPlace(weights), points, under, waves=1)
    assert losses(Batched(weights), points, under) == pytest.approx(expected, rel=2.0**-3)
    assert not spied
