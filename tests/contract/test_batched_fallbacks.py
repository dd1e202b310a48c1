"""Where several copies cannot share a forward, the batched engine answers layer by layer and says why."""

import pytest
import torch
from tests.contract.test_batched import POINTS, Calls, answers, noise, pair
from tests.support.language_models import VOCABULARY, make
from tests.support.models import CASES, Case, of_module
from torch import nn
from torch.nn import functional as F

from zotune.core.weights import Weights
from zotune.engines.batched import Auto, Batched
from zotune.engines.in_place import InPlace
from zotune.errors import EngineError
from zotune.optim.optimizer import ZO


def check(named, closure, why, points="three pairs", engine=Batched, waves=2):
    """Right losses, and the reason."""
    weights = Weights(named)
    made, asked = POINTS[points](weights), engine(weights)
    with torch.no_grad():
        given = [asked.losses(made, closure, 5).tolist() for _ in range(waves)]
        expected = InPlace(weights).losses(made, closure, 5).tolist()
    assert given[-1] == pytest.approx(expected, rel=1e-9)
    assert given[0] == given[-1]
    assert why in asked.reason, asked.reason
    return asked


class Cached(nn.Module):
    """Reads a prompt, then goes on with the cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        first = self.model(input_ids=ids[:, :4], use_cache=True)
        return self.model(input_ids=ids[:, 4:], past_key_values=first.past_key_values).logits


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.inner(x))


class Experts(nn.Module):
    """Each row goes to one of two experts: the number of rows depends on the data."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(6, 2), nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, x):
        chosen, out = self.router(x).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            out[chosen == number] = expert(x[chosen == number])
        return out


class Mixing(nn.Module):
    """Takes the mean over the batch: copies would see each other."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        hidden = torch.tanh(self.inner(x))
        return self.outer(hidden - 2 * hidden.mean(0, keepdim=True))


class Counting(nn.Module):
    """Refuses more than four rows."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x):
        if x.shape[0] > 4:
            raise MemoryError("too many rows")
        return torch.tanh(self.inner(x))


def simple(module, rows=4):
    torch.manual_seed(0)
    x = torch.randn(rows, 6, dtype=torch.float64)
    case = of_module(module(), lambda m: m(x), torch.float64)
    return case.named, case.closure


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("dropout_mlp", "it holds trained tensors itself"),
        ("weight_giver", "_Holder is called without a batch"),
        ("attention", "tensors are read outside their module"),
        ("lstm", "it returns a tensor of shape (1, 2, 5)"),
        ("leaky", "tensors are read outside their module"),
        ("penalty", "tensors are read outside their module"),
        ("bare", "tensors are read outside their module"),
        ("gpt2", "it draws random numbers (dropout)"),
    ],
)
def test_models_that_cannot(name, why):
    torch.manual_seed(0)
    case = CASES[name](torch.float64)
    check(case.named, case.closure, why)


@pytest.mark.parametrize(
    ("module", "why"), [(Experts, "rows"), (Counting, "with several copies it raises MemoryError (too many rows)")]
)
def test_modules_that_cannot(module, why):
    check(*simple(module), why)


def test_statistics_of_the_batch():
    named, closure = simple(Norm)
    weights = Weights(named)
    engine = Batched(weights)
    answers(engine, pair(noise(0)), closure)
    assert "it keeps statistics of its batches" in engine.reason


def test_a_module_that_mixes_rows_is_found_by_comparing():
    """By name it is an error; "auto" goes back to layer by layer."""
    check(*simple(Mixing), "not batched: The batched forward gives the loss", engine=Auto)
    named, closure = simple(Mixing)
    with pytest.raises(EngineError, match="The batched forward gives the loss"):
        ZO(named, engine="batched").step(closure)


def test_losses_that_jump_are_not_compared():
    """An objective that is no smooth function of the weights says so; the structure is still checked."""
    _, named, closure = make("llama")
    engine, called = Batched(Weights(named)), []
    engine.compares = False
    answers(engine, pair(noise(0)), lambda: called.append(None) or float(closure() > 4), 1)
    assert len(called) == 2 + 4
    # a survey, a look for leaks, a look whether hooks run, a look for the body; two copies in one of the calls
    assert engine.check_forwards == 4 + 2
    assert "2 points in one forward" in engine.reason


def test_a_key_value_cache():
    model, _, _ = make("llama")
    whole, ids = Cached(model), torch.randint(2, VOCABULARY, (3, 9))
    check(list(whole.named_parameters()), lambda: whole(ids).square().mean(), "LlamaModel: it is called more than once")
    trained = list(model.named_parameters())
    check(
        trained,
        lambda: model(input_ids=ids, use_cache=True).logits.square().mean(),
        "it is asked for its key-value cache",
    )


def test_a_body_that_is_called_twice():
    model, named, _ = make("llama")
    ids = torch.randint(2, VOCABULARY, (4, 5))

    def closure():
        return sum(model(input_ids=part).logits.square().mean() for part in ids.chunk(2))

    check(named, closure, "LlamaModel: it is called more than once")


def test_a_second_call_that_was_not_there_before():
    """Calls that a recording does not fit are answered layer by layer, at the right point."""
    model, named, closure = make("llama")
    ids = torch.randint(2, VOCABULARY, (2, 5))
    weights = Weights(named)
    engine = Batched(weights)
    answers(engine, pair(noise(0)), closure)

    def twice():
        return closure() + model(input_ids=ids).logits.square().mean()

    assert answers(engine, pair(noise(0)), twice, 1) == pytest.approx(
        answers(InPlace(weights), pair(noise(0)), twice, 1)
    )
    assert "not batched: the closure calls the body twice" in engine.reason
    answers(engine, pair(noise(0)), closure, 1)
    assert "2 points in one forward" in engine.reason


def test_inputs_that_change_from_point_to_point():
    """A point that asks something else gets its own answer, not another point's."""
    model, named, _ = make("llama")
    batches = [torch.randint(2, VOCABULARY, (3, 7)) for _ in range(2)]
    weights = Weights(named)
    engine, turn = Batched(weights), [0]

    def changing():
        turn[0] += 1
        return model(input_ids=batches[turn[0] % 2]).logits.square().mean()

    answers(engine, pair(noise(0)), lambda: model(input_ids=batches[0]).logits.square().mean())
    turn[0] = 0
    given = answers(engine, pair(noise(0)), changing, 1)
    turn[0] = -1  # the other engine looks first
    assert given == pytest.approx(answers(InPlace(weights), pair(noise(0)), changing, 1), rel=1e-12)
    assert "the body gets other inputs from point to point" in engine.reason


def test_inputs_that_are_written_over_between_points():
    """The same tensor with other numbers in it is another input."""
    model, named, _ = make("llama")
    ids = torch.randint(2, VOCABULARY, (3, 7))
    weights = Weights(named)
    engine = Batched(weights)

    def steady():
        return model(input_ids=ids).logits.square().mean()

    def writing():
        loss = steady()
        ids[0, 0] = (ids[0, 0] + 1) % VOCABULARY
        return loss

    answers(engine, pair(noise(0)), steady)
    other = InPlace(weights)
    answers(other, pair(noise(0)), steady, 1)  # looks
    kept = ids.clone()
    given = answers(engine, pair(noise(0)), writing, 1)
    ids.copy_(kept)
    assert given == pytest.approx(answers(other, pair(noise(0)), writing, 1), rel=1e-12)


def test_copies_are_made_anew_in_each_closure():
    """Equal inputs that are other tensors each time are served all the same."""
    model, named, _ = make("llama")
    ids = torch.randint(2, VOCABULARY, (3, 7))
    weights = Weights(named)
    engine = Batched(weights)
    answers(engine, pair(noise(0)), lambda: model(input_ids=ids.clone()).logits.square().mean())
    assert "2 points in one forward" in engine.reason


def test_a_closure_that_builds_a_graph():
    _, named, closure = make("llama")
    weights = Weights(named)
    engine = Batched(weights)
    answers(engine, pair(noise(0)), closure)
    with_graph = torch.enable_grad()(closure)
    expected = answers(InPlace(weights), pair(noise(0)), with_graph, 1)
    # fp64, sums in another order
    assert answers(engine, pair(noise(0)), with_graph, 1) == pytest.approx(expected, rel=1e-12)
    assert "the closure builds a graph" in engine.reason


def test_hooks_of_other_people_see_one_copy():
    model, named, closure = make("llama")
    weights, rows = Weights(named), []
    engine = Batched(weights)
    answers(engine, pair(noise(0)), closure)
    hook = model.model.layers[0].mlp.register_forward_hook(lambda m, args, out: rows.append(out.shape[0]))
    answers(engine, pair(noise(0)), closure, 1)
    assert rows == [3, 3]
    assert "hooks are registered on LlamaMLP" in engine.reason
    hook.remove()
    answers(engine, pair(noise(0)), closure, 1)
    assert "2 points in one forward" in engine.reason


def test_other_modes_are_looked_at():
    """Dropout that comes on: one copy at a time while it is."""
    model, named, closure = make("gpt2")
    weights = Weights(named)
    engine = Batched(weights)
    for training, why in (
        (False, "2 points in one forward"),
        (True, "it draws random numbers"),
        (False, "2 points in one"),
    ):
        model.train(training)
        with torch.no_grad():
            given = engine.losses(pair(noise(0)), closure, 5).tolist()
            expected = InPlace(weights).losses(pair(noise(0)), closure, 5).tolist()
        assert given == pytest.approx(expected, rel=1e-9)
        assert why in engine.reason


def test_modules_trained_in_front_of_the_body_are_not_shared():
    """Its inputs would differ between the points."""
    model, _, _ = make("llama")

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.prompt, self.model = nn.Linear(16, 16).double(), model

        def forward(self, ids):
            return self.model(inputs_embeds=self.prompt(self.model.get_input_embeddings()(ids).detach())).logits

    whole, ids = Prompted(), torch.randint(2, VOCABULARY, (3, 7))
    check(
        list(whole.named_parameters()), lambda: whole(ids).square().mean(), "LlamaModel: trained modules run before it"
    )


def test_packed_rows_stay_packed():
    """transformers reads position numbers that start again as several sequences in a row, unless there is a cache."""
    model, named, _ = make("llama")
    ids = torch.randint(2, VOCABULARY, (2, 6))
    places = torch.tensor([[0, 1, 2, 0, 1, 2]] * 2)
    for cache in (None, False):

        def closure(cache=cache):
            return model(input_ids=ids, position_ids=places, use_cache=cache).logits.square().mean()

        check(named, closure, "6 points in one forward")


def test_a_body_behind_a_frozen_part():
    """Only the part that is trained is shared; what is frozen in front of it runs once per point."""
    torch.manual_seed(0)
    front, back = nn.Linear(6, 6).double(), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    with Calls() as calls:
        check(list(back.named_parameters()), lambda: F.relu(back(front(x))).square().sum(), "6 points in one forward")
    assert calls.counts["Sequential"] > 0


def test_parts_of_the_loss_that_are_trained_too():
    """A trained head that is called with something of its own besides."""
    model, named, closure = make("llama_untied")
    x = torch.randn(2, 16, dtype=torch.float64)
    case = Case(named, lambda: closure() + model.lm_head(x).square().mean(), model)
    check(case.named, case.closure, "6 points in one forward")
