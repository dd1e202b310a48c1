"""The linear probe: its features against one prompt at a time, its fit against the optimum's conditions."""

import pytest
import torch

from zotune.baselines import linear_probe
from zotune.baselines.probe import Classifier, features
from zotune.errors import ConfigError, DataError, ModelError
from zotune.tasks.encoding import Encoded
from zotune.tasks.scoring import OptionScorer
from zotune.tuning import make_mode

from .conftest import questions

TRAIN, HELDOUT = questions(80, 0), questions(40, 1)


def test_it_finds_what_the_states_say(make_llama):
    scorer = OptionScorer(make_llama())
    before = [p.detach().clone() for p in scorer.model.parameters()]
    probe = linear_probe(scorer, TRAIN, HELDOUT, batch_size=16)
    assert probe.evaluation.accuracy > 0.9  # the last token of the prompt is the label, and the states hold it
    assert probe.evaluation.scores.shape == (40, 2)
    torch.testing.assert_close(probe.evaluation.scores.exp().sum(1), torch.ones(40, dtype=torch.float64))  # fp64 sums
    assert probe.forwards == 5
    assert probe.penalty == min(probe.tried, key=probe.tried.get)
    assert all(torch.equal(a, b) for a, b in zip(before, scorer.model.parameters(), strict=True))
    again = linear_probe(scorer, TRAIN, HELDOUT, batch_size=16)
    assert torch.equal(again.evaluation.scores, probe.evaluation.scores)


def test_features_are_the_states_at_the_ends_of_prompts(make_llama):
    model = make_llama()
    found = features(OptionScorer(model), TRAIN[:9], 4)
    assert found.dtype == torch.float64
    with torch.no_grad():
        for row, example in zip(found, TRAIN, strict=False):
            states = model.model(input_ids=torch.tensor([example.prompt_ids])).last_hidden_state
            # fp32 sums in another batch shape; states are of size 1
            torch.testing.assert_close(row.float(), states[0, -1], rtol=0, atol=1e-5)


def test_features_of_masked_models_are_at_the_mask():
    from transformers import RobertaConfig, RobertaForMaskedLM

    from zotune.masked import MaskedScorer

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=64, pad_token_id=1, **small)).eval()
    examples = [Encoded([0, *e.prompt_ids, 4, 2], e.option_ids, e.label) for e in TRAIN]
    scorer = MaskedScorer(model, mask_id=4, pad_id=1)
    with torch.no_grad():
        states = model.roberta(input_ids=torch.tensor([examples[0].prompt_ids])).last_hidden_state[0, -2]
    # fp32 sums in another batch shape
    torch.testing.assert_close(features(scorer, examples[:5], 5)[0].float(), states, rtol=0, atol=1e-5)
    assert linear_probe(scorer, examples, examples[:20]).evaluation.accuracy > 0.5


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("penalty", [1e-3, 1.0])
def test_the_fit_is_the_optimum(classes, penalty):
    generator = torch.Generator().manual_seed(0)
    states = 5 + 3 * torch.randn(200, 7, generator=generator, dtype=torch.float64)
    states[:, 3] = 2.0  # a constant feature: nothing to divide by
    labels = torch.randint(classes, (200,), generator=generator)
    fitted = Classifier.fit(states, labels, classes, penalty)
    inputs = (states - states.mean(0)) / states.std(0, correction=0).clamp(min=1e-300)
    inputs[:, 3] = 0
    wrong = fitted(states).softmax(1) - torch.nn.functional.one_hot(labels, classes)
    # the slope of a convex function: L-BFGS stops where its largest entry is below 1e-9, or no step is longer than 1e-14
    assert float((wrong.T @ inputs / 200 + penalty * fitted.weight).abs().max()) < 1e-7
    assert float(wrong.mean(0).abs().max()) < 1e-7


def test_a_larger_penalty_is_chosen_for_noise(make_llama):
    """Labels that the states do not hold: the loss on rows held back prefers weights near zero."""
    generator = torch.Generator().manual_seed(0)
    noisy = [Encoded(e.prompt_ids, e.option_ids, int(torch.randint(2, (), generator=generator))) for e in TRAIN]
    probe = linear_probe(OptionScorer(make_llama()), noisy, HELDOUT)
    assert probe.penalty == 1.0
    assert probe.tried[1.0] < 1.0 < probe.tried[1e-4]


def test_refusals(make_llama):
    scorer = OptionScorer(make_llama())
    other = Encoded([3, 4], ([5], [6]), 0)
    with pytest.raises(DataError, match="differ from row to row"):
        linear_probe(scorer, [*TRAIN, other], HELDOUT)
    with pytest.raises(DataError, match="class 1 has no row"):
        linear_probe(scorer, [e for e in TRAIN if e.label == 0], HELDOUT)
    with pytest.raises(DataError, match="is empty"):
        linear_probe(scorer, TRAIN, [])
    with pytest.raises(DataError, match="leave none"):
        linear_probe(scorer, [next(e for e in TRAIN if e.label == label) for label in (0, 1)], HELDOUT)
    with pytest.raises(ConfigError, match="dev_share"):
        linear_probe(scorer, TRAIN, HELDOUT, dev_share=1.5)
    with pytest.raises(ModelError, match="probe it untouched"):
        linear_probe(OptionScorer(make_mode("prompt").attach(make_llama(), 0)), TRAIN, HELDOUT)
