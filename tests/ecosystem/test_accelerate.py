"""accelerate prepares, wraps, saves and loads `zotune.ZO` as any optimizer; its traps are known."""

import importlib.util
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tests.support.models import assert_same_bits, bits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from zotune.optim.optimizer import ZO

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"


@pytest.fixture(autouse=True)
def _accelerate_forgets():
    """accelerate keeps its settings in singletons."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch._dynamo.reset()


class Run:
    """A model, its optimizer, its batches, a schedule: plain or prepared."""

    def __init__(self, prepared=None, dtype=torch.float32, **settings):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 3)).to(dtype)
        x = torch.randn(24, 6).to(dtype)
        y = torch.randint(0, 3, (24,))
        loader = DataLoader(TensorDataset(x, y), batch_size=4)
        self.zo = ZO(model.named_parameters(), **{"lr": 0.05, "eps": 0.01, **settings})
        schedule = torch.optim.lr_scheduler.LambdaLR(self.zo, lambda k: 1 / (1 + k))
        parts = (model, self.zo, loader, schedule)
        self.model, self.optimizer, self.loader, self.schedule = prepared.prepare(*parts) if prepared else parts

    def loss(self, batch):
        return nn.functional.cross_entropy(self.model(batch[0]).float(), batch[1])

    def epoch(self):
        for batch in self.loader:
            self.optimizer.step(lambda batch=batch: self.loss(batch))
            self.schedule.step()
            self.optimizer.zero_grad()  # harmless: there is nothing to zero
        return self

    def weights(self):
        return {name: bits(slot.tensor) for name, slot in self.zo.weights.slots.items()}


def test_a_prepared_loop_takes_the_steps_of_a_plain_one():
    """Same bits, same learning rates; no gradient is made, and the wrapper's train and eval find nothing to do."""
    plain, prepared = Run().epoch(), Run(Accelerator(cpu=True))
    prepared.optimizer.train()
    prepared.epoch()
    prepared.optimizer.eval()
    assert_same_bits(plain.weights(), prepared.weights())
    assert prepared.zo.param_groups[0]["lr"] == plain.zo.param_groups[0]["lr"] == pytest.approx(0.05 / 7)
    assert all(slot.tensor.grad is None for slot in prepared.zo.weights)


def test_the_wrapper_returns_no_loss_and_the_optimizer_has_it():
    run = Run(Accelerator(cpu=True))
    batch = next(iter(run.loader))
    assert run.optimizer.step(lambda: run.loss(batch)) is None
    assert float(run.zo.last.estimate.loss) == pytest.approx(float(run.loss(batch).detach()), rel=0.3)
    asked = run.zo.query(lambda: run.loss(batch))  # or: ask first, then step through the wrapper
    run.optimizer.step()
    assert float(run.zo.last.estimate.loss) == float(asked)


STATES = [
    (torch.float32, {}),
    (torch.bfloat16, {}),
    (torch.float32, {"rule": "adam"}),
    (torch.bfloat16, {"method": "ldsd", "method_options": {"lr_mu": 0.01}}),
    (torch.float32, {"method": "lozo", "method_options": {"rank": 2, "interval": 4, "momentum": 0.9}}),
]


@pytest.mark.filterwarnings("ignore::UserWarning")  # lozo and ldsd say what small models make of their options
@pytest.mark.parametrize(("dtype", "settings"), STATES, ids=lambda part: str(part))
def test_save_state_and_load_state_resume_to_the_same_bits(tmp_path, dtype, settings):
    """Weights, the bits carried beside them, learned means, moments, counters, schedule."""
    whole = Run(Accelerator(cpu=True), dtype, **settings).epoch()
    accelerator = Accelerator(cpu=True)
    saved = Run(accelerator, dtype, **settings).epoch()
    accelerator.save_state(str(tmp_path / "state"))
    whole.epoch()
    saved.epoch()  # further than where it was saved: all of that must be undone
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    resumed = Run(accelerator, dtype, **settings)
    accelerator.load_state(str(tmp_path / "state"))
    resumed.epoch()
    assert_same_bits(whole.weights(), resumed.weights())
    assert resumed.zo.forwards == whole.zo.forwards
    assert resumed.zo.step_number == whole.zo.step_number == 12


def test_accumulation_belongs_into_the_closure():
    """`accumulate` skips steps, so a closure of one micro-batch would drop the others. One closure of all is the batch."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    skipping = Run(accelerator)
    for batch in skipping.loader:
        with accelerator.accumulate(skipping.model):
            skipping.optimizer.step(lambda batch=batch: skipping.loss(batch))
    assert skipping.zo.step_number == 3  # of 6 batches
    whole, parts = Run(low_precision="plain"), Run(low_precision="plain")
    whole.model.eval(), parts.model.eval()  # dropout draws other masks for other shapes
    batch = next(iter(whole.loader))
    halves = [[part[:2] for part in batch], [part[2:] for part in batch]]
    whole.optimizer.step(lambda: whole.loss(batch))
    parts.optimizer.step(lambda: sum(parts.loss(half) for half in halves) / 2)
    assert parts.zo.last.losses == pytest.approx(whole.zo.last.losses, abs=1e-6)  # a sum of 4 in another order, fp32


def test_bf16_autocast_sees_the_perturbation():
    """fp32 weights, forwards under the autocast that `prepare` puts around the model: no stale cast answers."""
    run = Run(Accelerator(cpu=True, mixed_precision="bf16"))
    before = run.weights()
    run.epoch()
    assert len(set(run.zo.last.losses)) == 2
    assert all(not torch.equal(before[name], after) for name, after in run.weights().items())
    assert {slot.tensor.dtype for slot in run.zo.weights} == {torch.float32}


def test_a_model_that_prepare_compiles():
    """Same names, same noise, same bits (the backend runs the captured graph as it is)."""
    plain = Run(Accelerator(cpu=True)).epoch()
    AcceleratorState._reset_state(reset_partial_state=True)
    compiled = Run(Accelerator(cpu=True, dynamo_backend="eager"))
    assert any(name.startswith("_orig_mod.") for name, _ in compiled.model.named_parameters())
    assert_same_bits(plain.weights(), compiled.epoch().weights())


def test_the_example_learns():
    """From chance to 0.7 and more in a tenth of its steps; 0.7 is 18 standard errors of 2048 examples above chance."""
    spec = importlib.util.spec_from_file_location("accelerate_loop", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    first, last = example.main(steps=120)
    assert first < 0.6
    assert last > 0.7
