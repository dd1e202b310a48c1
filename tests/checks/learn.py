"""Claims about learning a fine-tuner that mutations must break."""

import copy

import torch
from torch import nn
from torch.nn import functional as F

from tests.reference.learn import Twin
from tests.reference.zo_finetuner import as_module
from tests.support.models import CASES, bits
from zotune.core.direction import Noise, Scaled
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.core.weights import Weights
from zotune.finetuner.networks import NUMBERS, from_flat, untrained
from zotune.learn.config import LearnConfig
from zotune.learn.displaced import displaced
from zotune.learn.learner import Learner
from zotune.learn.meta import Slopes, budgeted, of_networks, published
from zotune.learn.passes import slopes
from zotune.learn.trajectory import Trajectory

# ----------------------------------------------------------------------------------------------------------------------
# The mathematics, on a small model in fp64

SHAPES = {
    "embed_tokens.weight": (30, 4),
    "inner.weight": (5, 4),
    "inner.bias": (5,),
    "norm.weight": (5,),
    "head.weight": (3, 5),
}
COUNTS = torch.tensor([240.0, 20.0, 5.0, 5.0, 15.0], dtype=torch.float64)


def small_model(seed=3):
    generator = torch.Generator().manual_seed(seed)
    weights = {n: torch.randn(s, dtype=torch.float64, generator=generator) / 2 for n, s in SHAPES.items()}
    u = {n: torch.randn(s, dtype=torch.float64, generator=generator) for n, s in SHAPES.items()}
    return weights, u, untrained(list(SHAPES), seed)


def small_loss(w):
    hidden = w["embed_tokens.weight"][:12].view(3, 4, 4).mean(dim=1)
    hidden = torch.tanh(hidden @ w["inner.weight"].T + w["inner.bias"]) * w["norm.weight"]
    return F.cross_entropy(hidden @ w["head.weight"].T, torch.tensor([0, 1, 2]))


FEATURES = torch.tensor([[0.1, 0.3, 0.7, 0.6, 1.0]], dtype=torch.float64).repeat(5, 1) * torch.arange(1, 6)[:, None]
LR, EPS = 0.3, 1e-3


def by_autograd(weights, u, networks, differentiate_nf):
    """dL(theta')/domega of every network, (5, 449), through the written definition; and sigma, rho, nf, theta'."""
    modules = [as_module(networks, i).double() for i in range(5)]
    sigma = torch.stack([net(x).abs()[0] for net, x in zip(modules, FEATURES, strict=True)])
    nf = (COUNTS.sum() / (COUNTS * sigma.square()).sum()).sqrt()
    if not differentiate_nf:
        nf = nf.detach()

    def at(scale, s, size):
        return {n: weights[n] + scale * size * s[i] * u[n] for i, n in enumerate(weights)}

    rho = float((small_loss(at(EPS, sigma, nf)) - small_loss(at(-EPS, sigma, nf))).detach()) / (2 * EPS)
    moved = at(-LR * rho, sigma, nf)
    order = [q for net in modules for q in (net[0].weight, net[0].bias, net[2].weight, net[2].bias)]
    gradients = torch.autograd.grad(small_loss(moved), order)
    flat = torch.cat([g.flatten() for g in gradients]).view(5, NUMBERS)
    return flat, sigma.detach(), rho, float(nf.detach()), {n: m.detach() for n, m in moved.items()}


def slopes_at(weights, u):
    held = {n: w.clone().requires_grad_() for n, w in weights.items()}
    gradients = torch.autograd.grad(small_loss(held), list(held.values()))
    found = torch.stack([(u[n] * g).sum() for n, g in zip(held, gradients, strict=True)])
    return found, torch.stack([g.square().sum() for g in gradients])


def check_published_is_autograd():
    """(1) and the networks' part, to rounding of fp64."""
    weights, u, networks = small_model()
    expected, sigma, rho, nf, moved = by_autograd(weights, u, networks, differentiate_nf=False)
    d = published(sigma, Slopes(rho, slopes_at(moved, u)[0]), lr=LR, nf=nf)
    found = of_networks(networks, FEATURES, d)
    assert float(expected.abs().max()) > 1e-4
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def check_budgeted_is_autograd():
    """(2): the same with nf as a function of the scales."""
    weights, u, networks = small_model()
    expected, sigma, rho, _, moved = by_autograd(weights, u, networks, differentiate_nf=True)
    d = budgeted(sigma, Slopes(rho, slopes_at(moved, u)[0]), COUNTS, lr=LR)
    found = of_networks(networks, FEATURES, d)
    assert float(expected.abs().max()) > 1e-4
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-12)


def check_scale_invariance():
    """sum sigma d = 0, sum w sigma (d / w) = 0, and d at k sigma is d / k; (1) has none of this."""
    weights, u, networks = small_model()
    _, sigma, rho, nf, moved = by_autograd(weights, u, networks, differentiate_nf=True)
    here, energy = slopes_at(weights, u)
    for found in (Slopes(rho, slopes_at(moved, u)[0]), Slopes(rho, slopes_at(moved, u)[0], here, energy)):
        d = budgeted(sigma, found, COUNTS, lr=LR)
        size = float((sigma * d).abs().sum())
        assert abs(float((sigma * d).sum())) < 1e-12 * size
        assert abs(float((COUNTS * sigma * (d / COUNTS)).sum())) < 1e-12 * size
        assert torch.allclose(budgeted(3.0 * sigma, found, COUNTS, lr=LR), d / 3.0, rtol=1e-12, atol=0)
    plain = published(sigma, found, lr=LR, nf=nf)
    assert abs(float((sigma * plain).sum())) > 0.1 * float((sigma * plain).abs().sum())


def check_average_has_the_same_mean(samples=20000):
    """(3) against (2) on a quadratic, over u: means within 5 standard errors, variance a tenth at most.

    At a small lr: the first-order part, of which the noise is taken away, is nearly all. Tensors are of 6 numbers.
    """
    generator = torch.Generator().manual_seed(0)
    n, size, lr = 5, 6, 1e-3
    g = torch.randn(n, size, dtype=torch.float64, generator=generator)
    curvature = torch.rand(n, size, dtype=torch.float64, generator=generator)
    sigma, counts = torch.tensor([0.3, 1.0, 2.0, 0.7, 1.3]).double(), torch.full((n,), float(size)).double()
    nf = float((counts.sum() / (counts * sigma.square()).sum()).sqrt())
    noisy, calm = [], []
    for _ in range(samples // 10):
        u = torch.randn(n, size, dtype=torch.float64, generator=generator)
        v = nf * sigma[:, None] * u
        rho = float((g * v).sum())  # central differences of a quadratic are exact
        moved = (u * (g - lr * rho * curvature * v)).sum(1)
        noisy.append(budgeted(sigma, Slopes(rho, moved), counts, lr=lr))
        calm.append(budgeted(sigma, Slopes(rho, moved, (u * g).sum(1), g.square().sum(1)), counts, lr=lr))
    noisy, calm = torch.stack(noisy), torch.stack(calm)
    error = (noisy.var(0) / len(noisy)).sqrt()
    assert bool(((noisy.mean(0) - calm.mean(0)).abs() < 5 * error).all())
    assert bool((calm.var(0) < 0.1 * noisy.var(0)).all())


# ----------------------------------------------------------------------------------------------------------------------
# Passes through a model


def llama():
    torch.manual_seed(0)
    return CASES["llama"](torch.float32)


def u_of(weights, seed=7):
    factors = {slot.site.name: 0.5 + 0.1 * i for i, slot in enumerate(weights)}
    return Scaled(Noise(stream(seed, "u")), factors)


def check_slopes_are_those_of_autograd():
    """Tied embeddings, in two parts; fp32 sums over at most 1,100 numbers: 1e-4 of the sum of magnitudes."""
    case = llama()
    weights, u = Weights(case.named), u_of(Weights(case.named))
    gradients = dict(
        zip((n for n, _ in case.named), torch.autograd.grad(case.closure(), [p for _, p in case.named]), strict=True)
    )

    def backward():
        for share in (0.25, 0.75):
            (share * case.closure()).backward()
        return 0.0

    found = slopes(weights, backward, 0, u)
    for value, slot in zip(found, weights, strict=True):
        terms = u.realise(slot.site) * gradients[slot.site.name]
        assert abs(float(value) - float(terms.double().sum())) < 1e-4 * float(terms.abs().sum()), slot.site.name
    assert all(p.grad is None for _, p in case.named)


def check_displaced_comes_back(dtype, scale, name="mlp"):
    """Inside, round(value + point); afterwards the same bits, -0.0 included, also after an exception."""
    torch.manual_seed(0)
    case = CASES[name](dtype)
    with torch.no_grad():
        for _, p in case.named:
            p[(0,) * p.dim()] = -0.0
    weights = Weights(case.named)
    before = {n: bits(p) for n, p in case.named}
    point = scale * u_of(weights)
    with displaced(weights, point):
        for slot in weights:
            expected = torch.empty_like(slot.tensor.detach())
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            whole = before[slot.site.name].view(dtype).view(slot.tensor.shape).to(wide)
            expected.copy_(whole + point.realise(slot.site, wide).view(whole.shape))
            assert torch.equal(slot.tensor.detach(), expected), slot.site.name
    assert all(torch.equal(before[n], bits(p)) for n, p in case.named)
    try:
        with displaced(weights, point):
            raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(before[n], bits(p)) for n, p in case.named)


def check_trajectory_is_torch_sgd(gradients):
    """Six steps over a restart-less window against torch, clipped (the norm is above 1 here): fp32 rounding, 1e-6."""
    ours, theirs = llama(), llama()
    settings = {"lr": 0.1, "momentum": 0.8, "clip": 0.5, "window": 8}
    trajectory = Trajectory(Weights(ours.named), gradients=gradients, **settings)
    parameters = [p for _, p in theirs.named]
    sgd = torch.optim.SGD(parameters, lr=1.0, momentum=0.8)
    for step in range(6):

        def backward():
            loss = ours.closure()
            loss.backward()
            return float(loss.detach())

        found = trajectory.visit(backward, step, u_of(Weights(ours.named)))
        sgd.zero_grad()
        theirs.closure().backward()
        energy = torch.stack([p.grad.double().square().sum() for p in parameters])
        assert torch.allclose(found[1], energy, rtol=1e-4)
        assert float(nn.utils.clip_grad_norm_(parameters, 0.5)) > 0.5
        sgd.param_groups[0]["lr"] = 0.1 * (1 - step / 8)
        sgd.step()
    for (name, p), q in zip(ours.named, parameters, strict=True):
        assert torch.allclose(p, q, rtol=0, atol=1e-6), name
        assert p.grad is None


class Words(nn.Module):
    """A language model of one layer with tied embeddings, fp64 throughout (a Llama's norms compute in fp32)."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(67, 8)
        self.inner, self.norm = nn.Linear(8, 12), nn.LayerNorm(12)
        self.outer = nn.Linear(12, 8)

    def forward(self, input_ids):
        hidden = self.outer(torch.tanh(self.norm(self.inner(self.embed_tokens(input_ids).cumsum(1)))))
        return hidden @ self.embed_tokens.weight.T


class OfModel:
    """An objective of batches of token ids."""

    differentiable = True

    def __init__(self, model):
        self.model = model

    def loss(self, batch):
        return loss_of_tokens(self.model, batch)

    def weight(self, batch):
        return len(batch)


def loss_of_tokens(model, batch):
    ids = torch.stack(list(batch))
    logits = model(input_ids=ids)[:, :-1]
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


def check_learning_is_its_readable_twin(gradients="keep"):
    """Six visits of two tasks with a restart, in fp64: networks, losses, slopes and weights as with deep copies.

    1e-6 relative: sigma is an fp32 number here and fp64 in the twin, and networks are kept in fp32 (2**-24 of 0.4).
    """
    torch.manual_seed(0)
    model = Words().double()
    batches = [list(torch.randint(0, 67, (3, 7))) for _ in range(6)]
    settings = {
        "lr_llm": 0.05, "momentum": 0.8, "clip": 1.0, "lr_mlp": 50.0, "lr_update": 1e-2, "eps": 1e-3
    }  # fmt: skip
    config = LearnConfig(
        tasks="a,b", variant="paper", batch_size=3, seed=5, gradients=gradients, checkpointing=False, **settings
    )
    twin_model = copy.deepcopy(model)
    learner = Learner(model, list(model.named_parameters()), config, window=4)

    def draw(step, name, shape):
        return Noise(stream(5, "step", step, 0)).realise(Site(name, tuple(shape)), torch.float64)

    twin = Twin(twin_model, learner.start, window=4, batch=3, seed_noise=draw, **settings)
    begin = {n: p.detach().clone() for n, p in model.named_parameters()}
    for number, batch in enumerate(batches):
        if number == 4:
            twin.begin()
            with torch.no_grad():
                for n, p in model.named_parameters():
                    p.copy_(begin[n])
            learner.trajectory.buffers, learner.trajectory.done = {}, 0
        task = "ab"[number % 2]
        visit = learner.visit(task, OfModel(model), batch, config.rate)
        loss, rho, nf = twin.visit(task, loss_of_tokens, batch)
        assert abs(visit.loss - loss) < 1e-6 * loss
        assert abs(visit.rho - rho) < 1e-5 * (1 + abs(rho))
        assert abs(visit.nf - nf) < 1e-5 * nf
    for i, name in enumerate(learner.start.names):
        net = twin.nets[name]
        theirs = torch.cat([q.detach().flatten() for q in (net[0].weight, net[0].bias, net[2].weight, net[2].bias)])
        assert float((learner.flat[i] - theirs).abs().max()) < 1e-6, name
    assert learner.moved > 1e-4, "nothing was learned, so nothing was compared"
    for (name, p), q in zip(model.named_parameters(), twin_model.parameters(), strict=True):
        assert float((p - q).detach().abs().max()) < 1e-9, name


def check_corrected_visit():
    """A visit of the corrected form, put together again from its parts: budget's metric, size, scaled features, rate."""
    torch.manual_seed(0)
    model = Words().double()
    config = LearnConfig(tasks="a", variant="corrected", batch_size=3, lr_update=1e-2, checkpointing=False, lr_llm=0.1)
    learner = Learner(model, list(model.named_parameters()), config, window=8)
    assert learner.averaged
    for number in range(3):
        before, kept, batch = learner.flat.clone(), {}, list(torch.randint(0, 67, (3, 7)))
        start = copy.deepcopy(model)
        right = learner._teach

        def teach(sigma, found, rate, right=right, kept=kept):
            kept.update(sigma=sigma, found=found)
            right(sigma, found, rate)

        learner._teach = teach
        learner.visit("a", OfModel(model), batch, 0.01)
        learner._teach = right
        sigma, found = kept["sigma"], kept["found"]
        gradients = torch.autograd.grad(loss_of_tokens(start, batch), list(start.parameters()))
        # fp64 throughout; u is made in fp64 too
        energy = torch.stack([g.square().sum() for g in gradients])
        here = torch.stack(
            [
                (g * learner.probe.u.realise(s.site, torch.float64)).sum()
                for g, s in zip(gradients, learner.opt.weights, strict=True)
            ]
        )
        assert torch.allclose(found.energy, energy, rtol=1e-9)
        assert torch.allclose(found.here, here, rtol=1e-9, atol=1e-12)
        # w_i: 15 B hidden for the embedding, numbers for the others
        w = torch.tensor([15 * 3 * 8 if "embed" in n else p.numel() for n, p in model.named_parameters()]).double()
        d = budgeted(sigma, found, w, lr=1e-2) / w
        if number == 0:  # the running size is that of the first
            change = (d / d.abs().median()).clamp(-3.0, 3.0)
            networks = from_flat(learner.start.names, before)
            expected = before - 0.01 * of_networks(networks, learner.scaling(learner.probe.asked), change)
            assert torch.allclose(learner.flat.double(), expected, rtol=0, atol=1e-6)
            # equal scales: the features are those of the start, so the first layer sees 0, 0, 0, 0, 1
            assert torch.allclose(
                learner.scaling(learner.probe.asked)[:, :4], torch.zeros(len(w), 4).double(), atol=1e-6
            )
