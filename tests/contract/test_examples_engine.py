"""Losses of examples along their own directions: one forward for all gives what single forwards give."""

import pytest
import torch
from tests.checks import grzo as checks
from tests.checks.grzo import answers, of_examples, pair
from tests.contract.test_batched import Calls
from tests.support.language_models import MODELS
from tests.support.models import bits
from torch import nn

from zotune.core.direction import HERE, Noise
from zotune.core.noise import stream
from zotune.core.weights import Weights
from zotune.engines import batched_example_layers as layers
from zotune.engines.batched import Auto, Batched
from zotune.engines.in_place import InPlace
from zotune.engines.layerwise import Layerwise
from zotune.engines.recorded import Recorded
from zotune.errors import ClosureError, EngineError, LedgerError
from zotune.optim.optimizer import ZO

Z = checks.direction()


def sequence(*modules, examples=5, width=6):
    model = nn.Sequential(*modules).double()
    x = torch.randn(examples, width, dtype=torch.float64)
    return model, list(model.named_parameters()), lambda: model(x).square().mean(1)


@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_single_examples(name):
    engine = checks.check_batched_answers_are_those_of_single_examples(name)
    assert "2 points in one forward" in engine.reason, engine.reason


@pytest.mark.parametrize("name", ["llama", "opt", "mlp"])
def test_several_rows_of_an_example(name):
    checks.check_batched_answers_are_those_of_single_examples(name, group=2)


def test_groups_with_their_own_eps_and_sites_that_stay():
    for name in ("llama", "gpt2"):
        checks.check_batched_answers_are_those_of_single_examples(
            name, factors=lambda names: {n: float(k % 3) for k, n in enumerate(names)}
        )


@pytest.mark.parametrize(("dtype", "units"), [(torch.float32, 32), (torch.bfloat16, 32)])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_low_precision(name, dtype, units):
    """Sums of another order, and u rounded by itself: 32 units of the precision cover a forward of a few layers."""
    _, named, closure = of_examples(name, dtype)
    made = answers(Batched(Weights(named)), pair(Z), closure)
    expected = answers(InPlace(Weights(named)), pair(Z), closure)
    assert torch.allclose(made, expected, rtol=units * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("kind", [Batched, Auto])
def test_one_forward_of_the_body_and_nothing_is_left(kind):
    model, named, closure = of_examples("llama")
    before = {name: bits(p) for name, p in named}
    engine = kind(Weights(named))
    answers(engine, pair(Z), closure)
    with Calls() as calls:
        answers(engine, pair(Z), closure)
    assert calls.counts["LlamaDecoderLayer"] == 2, "one each of two layers"
    assert calls.counts["LlamaForCausalLM"] == 2, "one each of two points"
    assert all(torch.equal(bits(p), before[name]) for name, p in named)
    assert not any("forward" in vars(module) for module in model.modules())


def test_layerwise_answers_as_in_place():
    _, named, closure = of_examples("mlp")
    points = [HERE, *pair(Z)]
    one, other = Layerwise(Weights(named)), InPlace(Weights(named))
    made = answers(one, points, closure)
    # fp64, w + eps z made in another order
    assert torch.allclose(made, answers(other, points, closure), rtol=1e-13, atol=0)
    assert torch.equal(made[0], closure().detach())


def test_a_model_that_draws_random_numbers_runs_once_a_point():
    """Dropout keeps the body from being shared; all examples see the masks of their rows."""
    _, named, closure = sequence(nn.Linear(6, 9), nn.Dropout(0.5), nn.RMSNorm(9), nn.Linear(9, 3))
    engine = Batched(Weights(named))
    made = answers(engine, pair(Z), closure, waves=2)
    assert "one forward a point" in engine.reason
    assert torch.allclose(made, answers(InPlace(Weights(named)), pair(Z), closure), rtol=1e-12, atol=0)


def test_batches_and_modes_may_change_between_waves():
    model, named, _ = sequence(nn.Linear(6, 9), nn.Dropout(0.5), nn.LayerNorm(9), nn.Linear(9, 3))
    engine = Batched(Weights(named))
    for examples, training in [(5, False), (3, False), (3, True), (4, False)]:
        x = torch.randn(examples, 6, dtype=torch.float64)
        model.train(training)
        closure = lambda x=x: model(x).square().mean(1)  # noqa: E731
        made = answers(engine, pair(Z), closure)
        assert torch.allclose(made, answers(InPlace(Weights(named)), pair(Z), closure), rtol=1e-12, atol=0)


def test_rows_that_belong_to_nobody_are_refused():
    """A closure that picks positions out of the batch gives the output layer rows that no longer tell their example."""
    model, named, _ = of_examples("llama_untied")
    ids = torch.randint(2, 60, (4, 7))

    def closure():
        hidden = model.model(input_ids=ids).last_hidden_state[:, 1:4].reshape(12, -1)
        return model.lm_head(hidden).square().view(4, -1).mean(1)

    with pytest.raises(EngineError, match=r"Linear gets an input of shape \(12, 16\)"):
        answers(Batched(Weights(named)), pair(Z), closure)


def test_tensors_that_are_read_elsewhere_are_refused():
    model, named, closure = sequence(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    weight = model[0].weight
    with pytest.raises(EngineError, match=r"0\.weight"):
        answers(Batched(Weights(named)), pair(Z), lambda: closure() + weight.square().sum())


def test_modules_that_were_not_there_are_refused():
    model, named, closure = sequence(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    late = nn.Linear(2, 2).double()
    engine = Batched(Weights([*named, *((f"late.{n}", p) for n, p in late.named_parameters())]))
    engine.direct = set()
    with pytest.raises(EngineError, match="read outside their module"):  # nobody calls the module that holds them
        answers(engine, pair(Z), closure)
    with torch.no_grad():
        path = iter([late, late, late, late, nn.Identity(), nn.Identity()])
        x = torch.randn(5, 6, dtype=torch.float64)
        assert next(path)(model(x)).shape == (5, 2)


def test_a_wrong_forward_is_noticed(monkeypatch):
    """The first answers are compared with those of single examples."""
    right = layers.ExampleWave.signs_of
    monkeypatch.setattr(layers.ExampleWave, "signs_of", lambda self, *args: right(self, *args).abs())
    _, named, closure = of_examples("llama")
    with pytest.raises(EngineError, match="The batched forward gives the loss"):
        answers(Batched(Weights(named)), pair(Z), closure)


def test_points_of_several_directions_are_refused():
    _, named, closure = of_examples("mlp")
    other = Noise(stream(0, "other"))
    with pytest.raises(EngineError, match="multiples of one PerExample"):
        answers(Batched(Weights(named)), [0.1 * Z + 0.1 * other, -0.1 * Z], closure)
    with pytest.raises(EngineError, match="the same PerExample"):
        answers(Batched(Weights(named)), [0.1 * Z, 0.1 * checks.direction(1)], closure)


def test_closures_of_one_number_are_refused():
    _, named, closure = of_examples("mlp")
    with pytest.raises(ClosureError, match="one loss per example"):
        answers(Batched(Weights(named)), pair(Z), lambda: closure().mean())


def test_a_ledgers_line_is_divided_by_the_points():
    recorded = Recorded([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0)
    assert recorded.example_losses([HERE, HERE], None, 0).tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    recorded.close()
    with pytest.raises(LedgerError, match="3 losses"):
        Recorded([1.0, 2.0, 3.0], 4).example_losses([HERE, HERE], None, 0)


def test_runs_of_both_engines_agree():
    """fp64, 3 steps: another order of sums, a few hundred 2**-53 per loss, amplified by 1/eps; weights on a coarse grid."""
    ends = []
    for engine in ("batched", "in_place"):
        _, named, closure = of_examples("llama")
        opt = ZO(named, "grzo", lr=1e-5, eps=2.0**-7, seed=3, engine=engine)
        for _ in range(3):
            opt.step(closure)
        ends.append((dict(named), opt.last.losses))
    assert all(float((p - ends[1][0][n]).detach().abs().max()) < 1e-9 for n, p in ends[0][0].items())
    assert max(abs(a - b) for a, b in zip(ends[0][1], ends[1][1], strict=True)) < 1e-9
