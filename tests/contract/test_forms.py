"""Losses that compute less, under perturbation: the same numbers by every engine, and only what is read is perturbed."""

import pytest
import torch
from tests.support.classification import MODELS, _llama, _seeded, batch_of, usual_loss, usual_scores

from zotune.core.direction import Direction, Noise
from zotune.core.noise import stream
from zotune.core.weights import Weights
from zotune.engines import ENGINES
from zotune.engines.forms import InPieces, form_for, row_products
from zotune.engines.layerwise import Layerwise
from zotune.optim.optimizer import ZO
from zotune.tasks import head
from zotune.tasks.objectives import Classification, LanguageModel, closure_for
from zotune.tasks.scoring import OptionScorer

# fp64 sums in another order, as in test_packed; weights moved by eps 0.05 give losses of the same size
FP64 = 1e-11  # losses of about 5, of hundreds of fp64 products each, in another order and shape


def probes(model, closure, engine, method="mezo"):
    """The losses of three steps that do not move the weights, and the engine."""
    opt = ZO(model.named_parameters(), method, lr=0.0, eps=0.05, engine=engine)
    found = []
    for _ in range(3):
        opt.step(closure)
        found += opt.last.losses
    assert len(set(found)) == len(found), "probes that do not reach the loss compare nothing"
    return found, opt.engine


@pytest.mark.parametrize("method", ["mezo", "lozo"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("shape", ["six words", "long options", "two sentences"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_perturbed_losses_are_those_of_the_usual_way(name, shape, engine, method):
    model = MODELS[name]()
    batch = batch_of(shape)
    scorer = OptionScorer(model)
    assert scorer.arrange(batch).ends is not None
    ours, by = probes(model, closure_for(Classification(scorer), batch, None), engine, method)
    usual, _ = probes(model, lambda: usual_loss(model, batch), "in_place", method)
    assert ours == pytest.approx(usual, abs=FP64, rel=0)
    assert not getattr(by, "direct", ()), "a weight is read behind the engine's back"


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_language_model_losses_are_those_of_the_usual_way(name, engine):
    model = MODELS[name]()
    batch = batch_of("one answer")
    objective = LanguageModel(OptionScorer(model))
    lengths = torch.tensor([len(example.option_ids[0]) for example in batch])
    ours, by = probes(model, closure_for(objective, batch, None), engine)
    usual, _ = probes(model, lambda: -(usual_scores(model, batch)[:, 0] * lengths).sum() / lengths.sum(), "in_place")
    assert ours == pytest.approx(usual, abs=FP64, rel=0)
    assert not getattr(by, "direct", ())


@pytest.mark.parametrize("shape", ["two words", "long options"])
def test_micro_batches_see_the_same_perturbation(shape):
    model, batch = MODELS["llama"](), batch_of(shape)
    objective = Classification(OptionScorer(model))
    whole, _ = probes(model, closure_for(objective, batch, None), "layerwise")
    parts, _ = probes(model, closure_for(objective, batch, 2), "layerwise")
    assert parts == pytest.approx(whole, abs=FP64, rel=0)


class Counting(Direction):
    """A direction that notes which rows of which sites it was asked for."""

    def __init__(self):
        self.inner, self.asked = Noise(stream(0, "test")), []

    def add_to(self, out, site, scale=1.0):
        self.asked.append(site)
        self.inner.add_to(out, site, 0.05 * scale)


@torch.no_grad()
def asked_for(model, closure, name):
    """The parts of one site that a query by the layerwise engine perturbs, after it has looked at the model."""
    point = Counting()
    engine = Layerwise(Weights(model.named_parameters()))
    engine.losses([point], closure, 0)
    point.asked.clear()
    engine.losses([point], closure, 0)
    assert not engine.direct
    assert {site.name for site in point.asked} == set(engine.weights.slots), "something was not perturbed"
    return [site for site in point.asked if site.name == name]


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_options_rows_of_the_head_are_perturbed(tied):
    model, batch = MODELS["llama" if tied else "llama_untied"](), batch_of("six words")
    closure = closure_for(Classification(OptionScorer(model)), batch, None)
    options = {token for example in batch for option in example.option_ids for token in option}
    prompts = {token for example in batch for token in example.prompt_ids}
    assert len(options) < 40, "fewer than the vocabulary's 97"
    rows = [
        site.rows.tolist()
        for site in asked_for(model, closure, "model.embed_tokens.weight" if tied else "lm_head.weight")
    ]
    assert sorted(options) == sorted(rows[-1])
    assert len(rows) == 1 + tied
    if tied:  # the embedding's rows: those of the prompts' tokens, and the padding
        assert set(rows[0]) == prompts | {0}


def test_the_head_is_perturbed_and_used_up_in_pieces(monkeypatch):
    monkeypatch.setattr(head, "PIECE", 1)  # then 256 rows, as of millions of numbers
    model = _seeded(lambda: _llama(vocab_size=600))
    batch = batch_of("one answer")
    scorer = OptionScorer(model)
    closure = closure_for(LanguageModel(scorer), batch, None)
    sites = asked_for(model, closure, "lm_head.weight")
    assert [(site.start // 16, site.count // 16) for site in sites] == [(0, 256), (256, 256), (512, 88)]
    layerwise, _ = probes(model, closure, "layerwise")
    in_place, _ = probes(model, closure, "in_place")
    assert layerwise == in_place, "the same pieces give the same bits"


def test_forms_are_found_by_what_modules_offer():
    scorer = OptionScorer(MODELS["llama"]())
    assert isinstance(scorer.token_scores, InPieces)
    slot = next(iter(Weights([("lm_head.weight", scorer.token_scores.weight)])))
    assert form_for(scorer.token_scores, slot.site) is row_products
    scorer.token_scores.forward = lambda asked: None  # somebody else's, such as a device hook's
    assert form_for(scorer.token_scores, slot.site) is None


@pytest.mark.parametrize("kind", ["normal", "gaussian"])
def test_scratch_has_no_history_where_the_closure_turns_gradients_on(kind):
    """Copying a stored tensor that wants gradients into scratch would begin a graph, which lives as long as the loss."""
    layer = torch.nn.Linear(4, 3)
    seen = []

    def closure():
        with torch.enable_grad():
            answer = layer(torch.ones(1, 4)).square().sum()
            seen.append(layer.weight.grad_fn)
        return answer.detach()

    layer.register_forward_pre_hook(lambda module, args: seen.append(module.weight.grad_fn))
    engine = Layerwise(Weights(list(layer.named_parameters())))
    z = Noise(stream(0, "z"), kind)
    with torch.no_grad():  # as in a step
        engine.losses([1e-2 * z, -1e-2 * z], closure, 0)
    assert seen
    assert all(history is None for history in seen)
