"""Claims about GRZO and its directions that mutations must break."""

import numpy as np
import torch
from torch import nn

from tests.reference.grzo import grzo_step
from tests.support.bare import flat, realised, sites_of
from tests.support.language_models import VOCABULARY, make
from zotune.core.context import Context
from zotune.core.direction import Noise, Scaled
from zotune.core.noise import stream
from zotune.core.signed import PerExample, SignedSum
from zotune.core.site import Site
from zotune.core.weights import Weights
from zotune.engines.batched import Batched
from zotune.engines.in_place import InPlace
from zotune.methods.grzo import GRZO
from zotune.optim.optimizer import ZO

SEED = 11
SITES = [Site("first.weight", (5, 7)), Site("second.weight", (5, 7)), Site("norm.bias", (6,)), Site("scale", ())]


def direction(number=0):
    return PerExample(Noise(stream(SEED, "u", number)), stream(SEED, "signs", number))


# ----------------------------------------------------------------------------------------------------------------------
# Directions


def check_elements_are_those_of_u():
    """z_i is u with signs, and the signs are an outer product."""
    z = direction()
    for site in SITES:
        u = z.inner.realise(site, torch.float64)
        for i in range(3):
            signs = z.example(i).realise(site, torch.float64) / u
            assert bool((signs.abs() == 1).all())
            if len(site.shape) == 2:
                assert torch.linalg.matrix_rank(signs) == 1


def check_examples_and_shapes_share_no_signs():
    """Signs of 35 elements from 12 bits: a chance of 2**-11 for each pair to be equal; the streams are fixed."""
    z = direction()
    made = {}
    for site in SITES[:2]:
        u = z.inner.realise(site, torch.float64)
        for i in range(4):
            made[site.name, i] = (z.example(i).realise(site, torch.float64) / u).flatten()
    pairs = [(a, b) for a in made for b in made if a < b]
    assert all(abs(float(made[a] @ made[b])) < 35 for a, b in pairs)
    assert np.mean([abs(float(made[a] @ made[b])) for a, b in pairs]) < 12  # of shared signs: 35


def check_rows_and_columns_turn():
    """Both sides have both signs, so a missing factor shows."""
    z = direction()
    signs = z.example(0).realise(SITES[0], torch.float64) / z.inner.realise(SITES[0], torch.float64)
    assert len(signs[0].unique()) == 2, "columns do not turn"
    assert len(signs[:, 0].unique()) == 2, "rows do not turn"


def check_sum_is_the_sum_of_examples():
    """fp64, weights of few bits: products and sums of 3 terms round to a few 2**-53."""
    z, weights = direction(), [0.5, -1.25, 3.0]
    for site in SITES:
        expected = sum(w * z.example(i).realise(site, torch.float64) for i, w in enumerate(weights))
        made = z.weighted(weights).realise(site, torch.float64)
        assert torch.allclose(made, expected, rtol=0, atol=1e-14), site


# ----------------------------------------------------------------------------------------------------------------------
# The estimate


def context(weights, losses, *, step=0, eps=0.25):
    """`losses`: dict of tensors -> (B,) tensor."""

    def ask_examples(points):
        answers = []
        for point in points:
            ((factor, z),) = point.terms
            made = []
            for i in range(len(losses(weights))):
                moved = {s.name: weights[s.name].clone() for s in sites_of(weights)}
                for site in sites_of(weights):
                    z.example(i).add_to(moved[site.name], site, factor)
                made.append(losses(moved)[i])
            answers.append(torch.stack(made))
        return torch.stack(answers)

    return Context(
        step=step, seed=SEED, hyperparameters={"eps": eps}, sites=sites_of(weights), ask=None,
        weight=weights.__getitem__, ask_examples=ask_examples,
    )  # fmt: skip


def estimate_on(weights, losses, *, step=0, eps=0.25, **options):
    """The estimate as one fp64 vector, and as it is."""
    estimate = GRZO(**options).estimate(context(weights, losses, step=step, eps=eps))
    return flat(realised(estimate.direction, weights)), estimate


def slopes(kind):
    """(3, 15) gradients of three examples."""
    draws = torch.Generator().manual_seed(5)
    made = torch.randn(3, 15, dtype=torch.float64, generator=draws)
    return made[:1].repeat(3, 1) if kind == "agreeing" else torch.linalg.qr(made.T).Q.T


def _quadratic(gradients, weights, factor=1.0):
    """Losses whose gradients at `weights` are those, curved."""
    at = flat(weights)

    def losses(moved):
        x = flat(moved) - at
        return factor * (gradients @ x + 0.4 * (x**2).sum() + 0.3 * x[0] * x[3])

    return losses


def start():
    draws = torch.Generator().manual_seed(6)
    return {
        "a.weight": torch.randn(3, 4, dtype=torch.float64, generator=draws),
        "b.bias": torch.randn(3, dtype=torch.float64, generator=draws),
    }


def check_moments(kind, count=150):
    """Mean and second moment of the plain estimator within 5 standard errors, 2**-20 beside for the rounded weights.

    E|g|^2 = 1/B^2 [(d + 2) sum |G_i|^2 + 3 sum_{i != j} <G_i, G_j>]; central differences of quadratics are exact.
    """
    gradients, weights = slopes(kind), start()
    losses = _quadratic(gradients, weights)
    made = torch.stack([estimate_on(weights, losses, step=step, normalise=False)[0] for step in range(count)])
    error = made.std(0) / count**0.5
    assert bool(((made.mean(0) - gradients.mean(0)).abs() < 5 * error + 1e-5).all())
    gram, d, examples = gradients @ gradients.T, 15, 3
    own, cross = float(gram.trace()), float(gram.sum() - gram.trace())
    expected = ((d + 2) * own + 3 * cross) / examples**2
    squares = made.square().sum(1)
    assert abs(float(squares.mean()) - expected) < 5 * float(squares.std()) / count**0.5 + 1e-5 * expected
    return expected


def check_scale_of_the_loss_does_not_matter(factor=8.0):
    """Multiplied by a power of two, the losses give the same bits."""
    weights, gradients = start(), slopes("orthogonal")
    one, _ = estimate_on(weights, _quadratic(gradients, weights))
    other, _ = estimate_on(weights, _quadratic(gradients, weights, factor))
    assert float(one.abs().max()) > 0
    assert torch.equal(one, other)


def check_equal_differences_give_no_step():
    """No spread: nothing to divide by."""
    made, estimate = estimate_on(start(), lambda _: torch.full((3,), 0.1, dtype=torch.float64))
    assert estimate.is_finite()
    assert estimate.info["spread"] == 0.0
    assert float(made.abs().max()) == 0.0


def twin_model(dtype=torch.float64):
    """Named parameters and losses of 4 examples."""
    draws = torch.Generator().manual_seed(4)

    def draw(*shape):
        return torch.randn(*shape, dtype=dtype, generator=draws) / 2

    x, y = draw(4, 5), draw(4, 2)
    named = [("inner.weight", draw(6, 5)), ("norm.weight", draw(6)), ("head.weight", draw(2, 6))]

    def losses(w):
        hidden = torch.tanh(x @ w["inner.weight"].T) * w["norm.weight"]
        return (hidden @ w["head.weight"].T - y).square().mean(1)

    return [(name, nn.Parameter(value)) for name, value in named], losses


def check_equals_the_readable_twin(normalise=True, steps=20):
    """20 steps in fp64 against plain loops. They round in another order: 2**-53 of the losses, amplified by 1/eps."""
    named, losses = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    begun = {name: value.clone() for name, value in twin.items()}
    lr, eps = (1e-4 if normalise else 0.05), 1e-2
    options = {"normalise": normalise}
    opt = ZO(named, "grzo", lr=lr, eps=eps, seed=SEED, engine="in_place", method_options=options)
    for step in range(steps):

        def u(name, step=step):
            return Noise(stream(SEED, "step", step, 0)).realise(Site(name, tuple(twin[name].shape)), torch.float64)

        def signs(i, name, step=step):
            shape = twin[name].shape
            sides = []
            for side, length in (("rows", shape[0]), ("columns", shape[1:].numel())):
                noise = Noise(stream(SEED, "step", step, 1), "rademacher")
                sides.append(noise.realise(Site(f"{name}#{side}", (4, length)), torch.float64)[i])
            return sides

        expected = grzo_step(
            twin, lambda w: [float(x) for x in losses(w)], u, signs, lr=lr, eps=eps, normalise=normalise
        )
        assert abs(float(opt.step(lambda: losses(dict(named)))) - expected) < 1e-11
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-10, name
        assert float((p.detach() - begun[name]).abs().max()) > 1e-3, "nothing moved, so nothing was compared"


def check_slices_have_the_bits_of_the_whole(examples=5):
    """Runs that begin anywhere, chosen rows, and tensors that are not contiguous."""
    z = direction()
    made = SignedSum(z.inner, z.source, tuple(float(k + 1) for k in range(examples)))
    site = Site("first.weight", (9, 13))
    whole = made.realise(site).view(9, 13)
    for begin, count in [(0, 117), (1, 30), (12, 2), (13, 26), (100, 17)]:
        assert torch.equal(made.realise(site.part(begin, count)).flatten(), whole.flatten()[begin : begin + count])
    rows = torch.tensor([7, 0, 3, 7])
    assert torch.equal(made.realise(site.take(rows)).view(4, 13), whole[rows])
    strided = torch.zeros(13, 9).t()
    made.add_to(strided, site)
    assert torch.equal(strided, whole)


# ----------------------------------------------------------------------------------------------------------------------
# Engines


def of_examples(name, dtype=torch.float64, examples=4, group=1, positions=7):
    """A model, its trained tensors, and a closure of `examples` losses; each has `group` rows."""
    model, named, _ = make(name, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    rows = examples * group
    if name == "mlp":
        x = torch.randn(rows, 8, dtype=dtype)
        return model, named, lambda: model(x).to(wide).square().view(examples, -1).mean(1)
    ids = torch.randint(2, VOCABULARY, (rows, positions))
    mask = torch.ones_like(ids)
    mask[0, -2:] = 0

    def closure():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].to(wide)
        each = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        return each.reshape(examples, -1).mean(1)

    return model, named, closure


def pair(z, eps=2.0**-6):
    return [eps * z, -eps * z]


def answers(engine, points, closure, waves=1):
    with torch.no_grad():
        for _ in range(waves):
            made = engine.example_losses(points, closure, 0)
    return made


def check_batched_answers_are_those_of_single_examples(name="llama", group=1, factors=None, **settings):
    """fp64: products are summed in another order and u is added to the outputs: a few hundred 2**-53."""
    _, named, closure = of_examples(name, group=group, **settings)
    weights, z = Weights(named), direction()
    if factors is not None:
        made = factors(list(weights.slots))  # inside, as groups have them, and outside
        z = Scaled(PerExample(Scaled(z.inner, made), z.source), made)
    engine = Batched(weights)
    engine.compares = False
    batched = answers(engine, pair(z), closure, waves=2)
    expected = answers(InPlace(weights), pair(z), closure)
    assert float((expected[0] - expected[1]).abs().min()) > 1e-4
    assert torch.allclose(batched, expected, rtol=1e-12, atol=0)
    return engine
