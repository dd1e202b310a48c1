"""Loops that call `optimizer.step(closure)` from inside wrappers of their own, as Lightning documents it.

Lightning is not needed: `Automatic` and `manual` do what its documentation says of automatic and manual optimization (the
closure is training_step, zero_grad, backward, under enable_grad; precision plugins and strategies wrap closure and step).
"""

import copy
import pickle
from functools import partial

import pytest
import torch
from tests.support.models import assert_same_bits, bits
from torch import nn

from zotune.engines import ENGINES
from zotune.errors import ClosureError, ConfigError
from zotune.optim.optimizer import ZO

engines = pytest.mark.parametrize("engine", sorted({"auto", *ENGINES}))


class Module(nn.Module):
    """A LightningModule: what its author writes."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1))

    def training_step(self, batch):
        return self.net(batch).square().mean()

    def backward(self, loss):
        loss.backward()


class ForwardOnly(Module):
    """What makes automatic optimization forward-only."""

    def backward(self, loss):
        """ZO needs the loss alone."""


class Automatic:
    """Automatic optimization: the framework owns the closure."""

    def __init__(self, module, optimizer):
        self.module, self.optimizer, self.logged, self.graphs = module, optimizer, [], []

    def fit(self, batches):
        torch.set_grad_enabled(True)
        for batch in batches:
            self.optimizer_step(partial(self.closure, batch))

    def closure(self, batch):
        with torch.enable_grad():
            loss = self.module.training_step(batch)
            self.optimizer.zero_grad()
            self.module.backward(loss)
            self.logged.append(float(loss.detach()))
            self.graphs.append(loss.requires_grad)
            return loss

    def optimizer_step(self, closure):
        closure = partial(self._wrapped, closure)  # of the precision plugin, which clips gradients behind it
        return self.optimizer.step(closure=closure)

    def _wrapped(self, closure):
        result = closure()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        return result


def made(kind, engine="auto", **settings):
    torch.manual_seed(0)
    module = kind()
    return module, ZO(module.named_parameters(), lr=0.1, eps=0.01, engine=engine, **settings)


def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 5, generator=generator) for _ in range(4)]


def plain(engine):
    module, opt = made(Module, engine)
    for batch in batches():
        opt.step(lambda batch=batch: module.training_step(batch))
    return opt


def weights(opt):
    return {name: bits(slot.tensor) for name, slot in opt.weights.slots.items()}


@engines
def test_automatic_optimization_with_backward_left_empty(engine):
    """Gradients on, zero_grad, clipping, wrapped closures: the steps of a plain loop, and no gradient anywhere.

    Where gradients are on, the batched engine works layer by layer, whose products round otherwise than those of copies.
    """
    module, opt = made(ForwardOnly, engine)
    loop = Automatic(module, opt)
    loop.fit(batches())
    expected = plain("in_place" if engine == "in_place" else "layerwise")
    assert_same_bits(weights(expected), weights(opt))
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.is_grad_enabled()
    assert len(loop.logged) >= opt.forwards  # the engine's looks at the model call the closure too
    if engine == "layerwise":
        assert not any(loop.graphs[-2:])  # gradients are on, but what the model reads wants none


@engines
def test_manual_optimization(engine):
    """`self.optimizers().step(closure)` inside training_step, with gradients on."""
    module, opt = made(Module, engine)
    with torch.enable_grad():
        losses = [opt.step(closure=lambda batch=batch: module.training_step(batch)) for batch in batches()]
    assert_same_bits(weights(plain(engine)), weights(opt))
    assert not any(loss.requires_grad for loss in losses)


@engines
@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad])
def test_a_closure_that_calls_backward_is_refused_with_words(engine, gradients):
    """As LBFGS wants it, or automatic optimization as it is. No gradient stays behind, and nothing has moved."""
    module, opt = made(Module, engine)
    before = weights(opt)

    @gradients()
    def closure():
        loss = module.training_step(batches()[0])
        loss.backward()
        return loss

    with pytest.raises(
        ClosureError, match=r"closure calls backward\(\).*leave out backward\(\).*override its `backward`"
    ):
        opt.step(closure)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert_same_bits(before, weights(opt))


@engines
def test_gradients_from_before_are_no_reason_to_refuse(engine):
    """First-order steps before: ZO neither reads nor writes what they left."""
    module, opt = made(Module, engine)
    module.training_step(batches()[0]).backward()
    kept = [parameter.grad.clone() for parameter in module.parameters()]
    opt.step(lambda: module.training_step(batches()[0]))
    assert all(torch.equal(p.grad, old) for p, old in zip(module.parameters(), kept, strict=True))


def test_other_errors_of_a_closure_are_left_as_they_are():
    _, opt = made(Module)
    with pytest.raises(RuntimeError, match="out of memory") as caught:
        opt.step(lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert not isinstance(caught.value, ClosureError)


def test_a_gradient_scaler_is_refused_with_words():
    """Torch's own words would be "No inf checks were recorded for this optimizer"."""
    module, opt = made(Module)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(()))
    with pytest.raises(
        ConfigError, match=r"gradient scaler \(fp16 mixed precision\) has nothing to scale.*bf16 autocast"
    ):
        scaler.step(opt)
    off = torch.amp.GradScaler("cpu", enabled=False)  # as scripts keep it in place for bf16
    assert opt.query(lambda: module.training_step(batches()[0])) is not None
    off.step(opt)
    assert opt.step_number == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickle.dumps])
def test_copies_of_the_whole_optimizer_are_refused_with_words(copied):
    """torch would keep groups and state and drop the rest: an optimizer that fails at its first step. State dicts go on."""
    _, opt = made(Module)
    with pytest.raises(ConfigError, match=r"cannot be copied or pickled as a whole.*load state_dict\(\) into it"):
        copied(opt)
    copy.deepcopy(opt.state_dict())
