"""First-order training: its gradients, its schedule, its cost in forwards, and what it puts back."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from zotune.baselines import FIRST_ORDER, train_first_order
from zotune.baselines.first_order import forward_equivalents
from zotune.errors import ClosureError, ConfigError, DataError, ParameterError
from zotune.evaluation.evaluate import evaluate
from zotune.runs.training import batch_at
from zotune.tasks.encoding import Encoded
from zotune.tasks.scoring import OptionScorer
from zotune.tuning import MODES, make_mode

from .conftest import questions

TRAIN, HELDOUT = questions(64, 0), questions(40, 1)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_it_learns_what_can_be_learned(make_llama, mode):
    model = make_mode(mode).attach(make_llama(), 0)
    scorer = OptionScorer(model)
    before = evaluate(scorer, HELDOUT)
    seen = []
    run = train_first_order(
        scorer, TRAIN, mode=mode, steps=40, lr=1e-2, heldout=HELDOUT, progress=lambda step, loss: seen.append(step)
    )
    assert before.accuracy < 0.8
    assert run.evaluation.accuracy > 0.95  # a token of the prompt is the answer
    assert run.evaluation.mean_loss == pytest.approx(evaluate(scorer, HELDOUT).mean_loss, abs=1e-5)  # the same weights
    assert seen == list(range(1, 41))
    assert run.usage.seconds > 0


def test_it_is_adamw_on_the_scorers_loss_with_a_linear_schedule(make_llama):
    """Against the loop written out, with the batches of zeroth-order runs: the same bits."""
    model, twin = make_llama(), make_llama()
    scorer, other = OptionScorer(model), OptionScorer(twin)
    run = train_first_order(
        scorer, TRAIN, steps=5, batch_size=6, lr=1e-3, weight_decay=0.1, checkpointing=False, seed=3
    )
    norms = [p for name, p in twin.named_parameters() if "norm" in name]
    others = [p for name, p in twin.named_parameters() if "norm" not in name]
    groups = [{"params": others}, {"params": norms, "weight_decay": 0.0}]  # as all zeroth-order rules decay
    optimizer = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * (1 - step / 5)
        loss = other.loss([TRAIN[i] for i in batch_at(step, len(TRAIN), 6, 3)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        assert run.records[step]["loss"] == float(loss.detach())
        assert run.records[step]["lr"] == 1e-3 * (1 - step / 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("mode", ["full", "lora", "head", "norm_bias"])
@pytest.mark.parametrize("options", ["single", "ragged"])
def test_checkpointing_and_micro_batches_change_rounding_alone(make_llama, mode, options):
    rows = TRAIN if options == "single" else [Encoded(e.prompt_ids, ([40, 3], [41]), e.label) for e in TRAIN]
    results, losses = [], []
    for settings in ({"checkpointing": False}, {"checkpointing": True}, {"micro_batch": 3}):
        model = make_mode(mode).attach(make_llama(torch.float64), 0).double()
        run = train_first_order(OptionScorer(model), rows, mode=mode, steps=3, lr=1e-4, **settings)
        results.append(weights(model))
        losses.append([record["loss"] for record in run.records])
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-6)  # losses near 0.7 through norms in fp32
    start = weights(make_mode(mode).attach(make_llama(torch.float64), 0).double())
    for name, plain in results[0].items():
        # Llama's norms and softmax compute in fp32 also here: gradients agree to 1e-6 of their size, AdamW's steps of lr
        # 1e-4 to that, but where a gradient is itself rounding; there each step may differ by 2 lr
        for other in results[1:]:
            assert float((other[name] - plain).abs().max()) <= 6e-4
            assert float((other[name] - plain).norm()) <= 0.02 * float((plain - start[name]).norm()) + 1e-9, name


def test_checkpointing_runs_the_layers_twice(make_llama):
    calls = {}
    for checkpointing in (False, True):
        model = make_llama()
        counted = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, counted=counted: counted.append(1))
        scorer = OptionScorer(model)
        counted.clear()
        train_first_order(scorer, TRAIN, steps=2, checkpointing=checkpointing)
        calls[checkpointing] = len(counted)
    assert calls == {False: 2, True: 4}


@pytest.mark.parametrize(("mode", "checkpointing"), [("full", False), ("full", True), ("lora", False), ("lora", True)])
def test_forward_equivalents_are_those_of_counted_operations(make_llama, mode, checkpointing):
    """torch counts the multiplications of matrices; heads and adapters make small shares."""
    # more layers and a small head, so that the model is nearly all layers, as large ones are
    model = make_mode(mode).attach(make_llama(num_hidden_layers=8, hidden_size=64, intermediate_size=256), 0)
    scorer = OptionScorer(model)
    batch = TRAIN[:8]
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        scorer.loss(batch)
    with FlopCounterMode(display=False) as step:
        train_first_order(scorer, batch, mode=mode, steps=1, checkpointing=checkpointing)
    ratio = step.get_total_flops() / forward.get_total_flops()
    # running a layer again stops short of its last matrix, whose product nothing needs: a quarter of this model's layers
    spared = 0.25 if checkpointing else 0.0
    # torch counts attention's own products at 2.5 times in the backward pass, and the head's few rows do not count
    assert ratio == pytest.approx(forward_equivalents(model, checkpointing) - spared, rel=0.03)
    assert train_first_order(scorer, batch, mode=mode, steps=3, checkpointing=checkpointing).forwards == pytest.approx(
        3 * forward_equivalents(model, checkpointing), rel=1e-12
    )


def test_the_stated_numbers():
    layer = torch.nn.Linear(10, 10, bias=False)
    assert (forward_equivalents(layer, False), forward_equivalents(layer, True)) == (3, 4)
    frozen = torch.nn.Sequential(torch.nn.Linear(100, 99, bias=False), torch.nn.Linear(10, 10, bias=False))
    frozen[0].requires_grad_(False)
    assert forward_equivalents(frozen, False) == 2.01


def test_everything_is_put_back(make_llama):
    model = make_llama(attention_dropout=0.1)
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    scorer = OptionScorer(model)
    torch.rand(3)
    state = torch.get_rng_state()
    run = train_first_order(scorer, TRAIN, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not torch.is_grad_enabled() or scorer.loss(TRAIN[:2]).requires_grad
    torch.manual_seed(99)
    again = make_llama(attention_dropout=0.1)
    assert train_first_order(OptionScorer(again), TRAIN, steps=2).records == run.records  # dropout is by the seed


def test_it_works_where_gradients_are_off(make_llama):
    scorer = OptionScorer(make_llama())
    with torch.no_grad():
        run = train_first_order(scorer, TRAIN, steps=2)
    assert run.records[0]["loss"] != run.records[1]["loss"]


def test_autocast_trains_fp32_weights(make_llama):
    model = make_llama()
    before = weights(model)
    run = train_first_order(OptionScorer(model, autocast=torch.bfloat16), TRAIN, steps=2, lr=1e-3)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    exact = train_first_order(OptionScorer(make_llama()), TRAIN, steps=2, lr=1e-3)
    # bf16 products keep 8 bits of losses near 0.7
    assert run.records[0]["loss"] == pytest.approx(exact.records[0]["loss"], abs=0.03)


def test_default_learning_rates_say_where_they_are_from(make_llama):
    assert set(FIRST_ORDER) == set(MODES)
    run = train_first_order(OptionScorer(make_llama()), TRAIN, steps=1)
    assert (run.lr, "MeZO" in run.lr_source) == (1e-5, True)
    assert train_first_order(OptionScorer(make_llama()), TRAIN, steps=1, lr=0.5).lr_source == "given"


def test_prefix_and_prompt(make_llama):
    model = make_mode("prefix").attach(make_llama(), 0)
    with pytest.raises(ConfigError, match="does not go with a prefix"):
        train_first_order(OptionScorer(model), TRAIN, mode="prefix", steps=1)
    losses = [
        r["loss"] for r in train_first_order(OptionScorer(model), TRAIN, steps=30, lr=1e-1, checkpointing=False).records
    ]
    assert sum(losses[-5:]) < sum(losses[:5])
    model = make_mode("prompt").attach(make_llama(), 0)
    losses = [
        r["loss"] for r in train_first_order(OptionScorer(model), TRAIN, mode="prompt", steps=30, lr=1e-1).records
    ]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_refusals(make_llama):
    scorer = OptionScorer(make_llama())
    with pytest.raises(DataError, match="no examples"):
        train_first_order(scorer, [], steps=1)
    for wrong in ({"steps": 0}, {"batch_size": 0}, {"micro_batch": 0}, {"lr": -1.0}, {"mode": "lorra"}):
        with pytest.raises(ConfigError, match=next(iter(wrong)) if "mode" not in wrong else "no first-order learning"):
            train_first_order(scorer, TRAIN, **{"steps": 1, **wrong})
    with pytest.raises(ParameterError, match="16 bits"):
        train_first_order(OptionScorer(make_llama(torch.bfloat16)), TRAIN, steps=1)
    low = copy.copy(scorer)
    low.autocast = torch.float16
    with pytest.raises(ConfigError, match="scaled loss"):
        train_first_order(low, TRAIN, steps=1)
    with torch.no_grad():
        scorer.model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ClosureError, match="loss is nan at step 0"):
        train_first_order(scorer, TRAIN, steps=1)
    frozen = make_llama().requires_grad_(False)
    with pytest.raises(ParameterError, match="no parameter requires grad"):
        train_first_order(OptionScorer(frozen), TRAIN, steps=1)
