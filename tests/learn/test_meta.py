"""The meta-gradient is what autograd gives for the written definition; what a budget adds to it; passes without copies."""

import pytest
import torch
from tests.checks.learn import (
    COUNTS,
    EPS,
    LR,
    by_autograd,
    check_average_has_the_same_mean,
    check_budgeted_is_autograd,
    check_corrected_visit,
    check_displaced_comes_back,
    check_learning_is_its_readable_twin,
    check_published_is_autograd,
    check_scale_invariance,
    check_slopes_are_those_of_autograd,
    check_trajectory_is_torch_sgd,
    llama,
    slopes_at,
    small_loss,
    small_model,
    u_of,
)
from torch import nn

from zotune.core.weights import Weights
from zotune.finetuner.networks import from_flat, untrained
from zotune.learn.displaced import displaced
from zotune.learn.meta import Size, Slopes, published
from zotune.learn.passes import graph_mode, has_dropout, run
from zotune.learn.scaling import of_start, unscaled


def test_published_is_autograd_through_the_definition():
    check_published_is_autograd()


def test_budgeted_is_autograd_with_the_normalisation():
    check_budgeted_is_autograd()


def test_budgeted_is_invariant_to_scale_and_published_is_not():
    check_scale_invariance()


def test_averaged_first_order_part_has_the_same_mean_and_less_noise():
    check_average_has_the_same_mean()


def test_published_leaves_out_rho_and_nf():
    """T5: finite differences of sigma agree with rho and nf held fixed, and not if they are computed again."""
    weights, u, networks = small_model()
    _, sigma, rho, nf, moved = by_autograd(weights, u, networks, differentiate_nf=False)
    d = published(sigma, Slopes(rho, slopes_at(moved, u)[0]), lr=LR, nf=nf)

    def loss(s, again):
        size = float((COUNTS.sum() / (COUNTS * s.square()).sum()).sqrt()) if again else nf

        def at(scale):
            return {n: weights[n] + scale * size * s[i] * u[n] for i, n in enumerate(weights)}

        slope = float(small_loss(at(EPS)) - small_loss(at(-EPS))) / (2 * EPS) if again else rho
        return float(small_loss(at(-LR * slope)))

    def differences(again, h=1e-5):
        steps = h * torch.eye(5, dtype=torch.float64)
        return torch.tensor([(loss(sigma + e, again) - loss(sigma - e, again)) / (2 * h) for e in steps]).double()

    # truncation h^2 and rounding 1e-16 / h
    assert torch.allclose(differences(False), d, rtol=1e-5, atol=1e-8)
    assert not torch.allclose(differences(True), d, rtol=0.1, atol=1e-3 * float(d.abs().max()))


def test_best_length_makes_the_published_gradient_that_of_the_best_decrease():
    """The docstring of `meta`: at lr = 1 / B the mean of (1) is -(1/2) d(A / B)/ds.

    Blocks of d = 400 equal curvatures. Left out are terms of relative size 2 / d of each part; parts are up to 10 times the
    difference here, so 5 %, and 5 standard errors of the mean over u.
    """
    generator = torch.Generator().manual_seed(1)
    d, samples = 400, 6000
    h = torch.tensor([1.0, 3.0, 0.2]).double()
    g = torch.randn(3, d, dtype=torch.float64, generator=generator) * torch.tensor([1.0, 0.5, 2.0]).double()[:, None]
    s, energy, trace = torch.tensor([1.0, 0.8, 1.2]).double(), g.square().sum(1), d * h
    a, b = float((s.square() * energy).sum()), float((s.square() * trace).sum())
    u = torch.randn(samples, 3, d, dtype=torch.float64, generator=generator)
    rho = (u * s[:, None] * g).sum((1, 2))
    moved = (u * g).sum(2) - (rho / b)[:, None] * h * s * u.square().sum(2)
    found = -(rho / b)[:, None] * moved
    expected = -(s * energy / b - a * s * trace / b**2)
    error = 5 * (found.var(0) / samples).sqrt() + 0.05 * (s * energy / b)
    assert bool(((found.mean(0) - expected).abs() < error).all())
    assert bool((expected.abs() > 2 * error).any()), "nothing was resolved"


def test_slopes_are_those_of_autograd():
    check_slopes_are_those_of_autograd()


def test_at_most_one_gradient_lives():
    case = llama()
    alive = []

    def read(slot, gradient):
        alive.append(sum(p.grad is not None for _, p in case.named))
        return False

    run(Weights(case.named), lambda: case.closure().backward(), 0, read)
    assert alive == [1] * len(case.named)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 3.0])
def test_displaced_weights_come_back_to_the_bit(dtype, scale):
    check_displaced_comes_back(dtype, scale)


def test_few_numbers_are_kept_for_small_displacements():
    """Weights of scale 0.3 and displacements of 3e-5: about 1e-4 of the numbers, at 8 bytes each."""
    case = llama()
    weights = Weights(case.named)
    with displaced(weights, 3e-5 * u_of(weights)) as kept:
        pass
    assert 0 <= kept.nbytes < 0.01 * sum(p.nbytes for _, p in case.named)
    with displaced(weights, 30.0 * u_of(weights)) as kept:
        pass
    assert kept.nbytes <= sum(p.nbytes for _, p in case.named)  # never more than a copy


@pytest.mark.parametrize("gradients", ["keep", "twice"])
def test_trajectory_is_torch_sgd_with_momentum_and_clipping(gradients):
    check_trajectory_is_torch_sgd(gradients)


@pytest.mark.parametrize("gradients", ["keep", "twice"])
def test_learning_is_its_readable_twin(gradients):
    check_learning_is_its_readable_twin(gradients)


def test_corrected_visit_is_made_of_its_parts():
    check_corrected_visit()


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def test_scaled_features_fold_into_the_first_layer():
    """Folded networks answer to raw features what the others answer to scaled ones: fp32 numbers, sums of 64."""
    networks = untrained(["a", "b", "c"], 0)
    scaling = of_start([(0.01, 1e-3), (1.0, 1e-4), (0.0, 0.0)])
    features = torch.tensor([[0.02, 1.1e-3, 0.7, 0.6, 1.0], [1.01, 2e-4, 0.7, 0.6, 0.4], [0.0, 0.0, 0.1, 0.2, 1.0]])
    expected = networks.sigma(scaling(features), range(3))
    assert torch.allclose(scaling.fold(networks).sigma(features, range(3)), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(networks.sigma(features, range(3)), expected, rtol=0, atol=1e-3)
    assert torch.equal(unscaled(3).fold(networks).flat(), networks.flat())
    at_start = scaling(torch.tensor([[0.01, 1e-3, 0.0, 0.0, 1.0]]).repeat(3, 1))[0]
    assert torch.allclose(at_start[:2], torch.zeros(2).double(), atol=1e-6)


def test_meta_gradients_of_any_size_teach_alike():
    d = torch.tensor([1.0, -2.0, 50.0, 0.5, -0.1]).double()
    large, small = Size(), Size()
    for _ in range(3):
        one, other = large.normalised(1e8 * d), small.normalised(1e-20 * d)
        assert torch.allclose(one, other)
    assert one.abs().max() == 3.0  # the outlier neither sets the size nor moves further than this
    assert torch.allclose(one[0], torch.tensor(1.0).double())
    assert torch.equal(Size().normalised(torch.zeros(3)), torch.zeros(3))


def test_small_updates_do_not_round_away():
    """Rates times meta-gradients of 1e-10, as published, change no bit of a number of 0.4; over their size they do."""
    networks, d = untrained(["a"], 0), torch.full((1,), 1e-9).double()
    large = networks.flat().abs() > 0.1

    def after(rate, d):
        moved = from_flat(["a"], (networks.flat() - rate * d).float())
        return (moved.flat() != networks.flat())[large]

    assert not after(0.1, d).any()
    assert after(1e-3, Size().normalised(d)).all()


def test_modes_are_put_back_and_dropout_is_known():
    case = llama()
    model = case.module.eval()
    assert not has_dropout(model)
    with graph_mode(model, dropout=False, checkpointing=True):
        assert model.training  # no dropout to switch off, and only so it checkpoints
    assert not any(module.training for module in model.modules())
    noisy = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.1)).eval()
    assert has_dropout(noisy)
    with graph_mode(noisy, dropout=False, checkpointing=False):
        assert not noisy[1].training
    with graph_mode(noisy, dropout=True, checkpointing=False):
        assert noisy[1].training
    assert not noisy.training
