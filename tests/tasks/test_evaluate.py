"""Evaluation in batches, and the prior-corrected baseline."""

import math

import pytest
import torch

from zotune.core.errors import ConfigError, DataError
from zotune.evaluate import Evaluation, evaluate, fit_prior_correction, prior_corrected
from zotune.tasks.scoring import OptionScorer


def test_order_batches_and_progress(make_gpt2, single_token_batch, ragged_batch):
    examples = [*ragged_batch, *single_token_batch]
    scorer = OptionScorer(make_gpt2())
    seen = []
    whole = evaluate(scorer, examples, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (6, 8), (8, 8)]
    for index, example in enumerate(examples):
        alone = evaluate(scorer, [example]).scores[0]
        # fp32 sums in another batch shape, as in test_scoring
        torch.testing.assert_close(whole.scores[index, : len(alone)], alone, rtol=0, atol=3e-5)
    assert whole.scores.shape == (8, 5)
    assert whole.labels.tolist() == [example.label for example in examples]
    by_hand = [int(row.argmax()) == example.label for row, example in zip(whole.scores, examples, strict=True)]
    assert whole.accuracy == sum(by_hand) / 8
    assert whole.standard_error == pytest.approx(math.sqrt(whole.accuracy * (1 - whole.accuracy) / 8), rel=1e-12)
    # the mean loss is the scorer's own loss, but for fp32 rounding
    assert whole.mean_loss == pytest.approx(float(scorer.loss(examples).detach()), abs=3e-5)


def test_modes_and_gradients_are_put_back(make_gpt2, single_token_batch):
    model = make_gpt2().train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    scorer = OptionScorer(model)
    first, second = (evaluate(scorer, single_token_batch).scores for _ in range(2))
    assert torch.equal(first, second), "dropout was on"
    assert [module.training for module in model.modules()] == modes
    assert not first.requires_grad


def test_evaluation_refuses_nothing_to_do(make_gpt2, single_token_batch):
    scorer = OptionScorer(make_gpt2())
    with pytest.raises(DataError, match="no examples"):
        evaluate(scorer, [])
    with pytest.raises(ConfigError, match="batch_size"):
        evaluate(scorer, single_token_batch, batch_size=0)


@pytest.mark.parametrize("options", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_prior_correction_is_the_optimum(options, spread):
    generator = torch.Generator().manual_seed(0)
    scores = spread * torch.randn(400, options, generator=generator)
    scores[:, 0] += 2 * spread  # the model nearly always says option 0
    labels = torch.randint(options, (400,), generator=generator)
    bias = fit_prior_correction(scores, labels)
    assert bias[0] == 0
    # where the slope of a convex loss vanishes: predicted and actual shares agree (to where Newton stops, 1e-12)
    shares = (scores.double() + bias).softmax(1).mean(0)
    torch.testing.assert_close(shares, torch.bincount(labels).double() / 400, rtol=0, atol=1e-10)
    before = Evaluation.of(scores, labels)
    after = prior_corrected(before, bias)
    assert after.mean_loss < before.mean_loss


def test_prior_correction_recovers_a_shift():
    """Labels drawn from softmax(scores): a constant added to one option's scores is what the fit takes away."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2000, 2, generator=generator)
    labels = torch.multinomial(scores.softmax(1), 1, generator=generator).squeeze(1)
    plain = fit_prior_correction(scores, labels)
    shifted = fit_prior_correction(scores + torch.tensor([0.0, 1.7]), labels)
    # the same optimum moved by the constant, which fp32 scores hold to 2e-7
    torch.testing.assert_close(shifted - plain, torch.tensor([0.0, -1.7], dtype=torch.float64), rtol=0, atol=1e-6)
    assert abs(plain[1]) < 0.2  # true value 0; standard error 1 / sqrt(2000 * mean p (1 - p)), about 0.05


def test_prior_correction_refusals():
    scores = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(DataError, match="option 2 is never right"):
        fit_prior_correction(scores, torch.tensor([0, 1] * 5))
    with pytest.raises(DataError, match="finite scores"):
        fit_prior_correction(scores.masked_fill(scores == scores.max(), -torch.inf), torch.tensor([0, 1, 2, 0, 1] * 2))
    with pytest.raises(DataError, match="2 options"):
        prior_corrected(Evaluation.of(scores, torch.zeros(10, dtype=torch.int64)), torch.zeros(2))
