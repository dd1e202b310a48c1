"""Claims about the ZO Fine-tuner that mutations must break."""

import math
import warnings

import torch
from torch import nn

from tests.reference.zo_finetuner import Twin, as_module
from tests.support.bare import bare_context, estimate_of, flat, realised, sites_of
from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.finetuner.networks import FEATURES, Networks, untrained
from zotune.methods.zo_finetuner import ZOFineTuner
from zotune.optim.optimizer import ZO

SEED = 11
TOKENS = 15  # per example, in the released code


def weights_of(seed=4):
    """A small network's weights in fp64: an embedding, a matrix, a bias, a norm, and two tensors of one shape."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, mean=0.0):
        return mean + torch.randn(*shape, dtype=torch.float64, generator=generator) / 2

    return {
        "embed_tokens.weight": draw(300, 6),
        "inner.weight": draw(5, 6),
        "inner.bias": draw(5, mean=0.3),
        "norm.weight": draw(5, mean=1.0),
        "twin_a.weight": draw(5, 5),
        "twin_b.weight": draw(5, 5),
        "head.weight": draw(2, 5),
    }


def loss_of(w):
    """A regression on fixed tokens. Most embedding rows are not used, as in a language model's batch."""
    hidden = w["embed_tokens.weight"][:24].view(4, 6, 6).mean(dim=1)
    hidden = torch.tanh(hidden @ w["inner.weight"].T + w["inner.bias"]) * w["norm.weight"]
    hidden = torch.tanh(hidden @ w["twin_a.weight"]) + torch.tanh(hidden @ w["twin_b.weight"])
    target = torch.tensor([[1.0, -1.0], [0.5, 0.0], [-1.0, 2.0], [0.0, 0.3]], dtype=torch.float64)
    return float((hidden @ w["head.weight"].T - target).square().mean())


def of(networks, **options):
    """The method with networks that lie in memory instead of a folder."""
    method = ZOFineTuner(networks="untrained", **options)
    method._loaded = networks
    return method


def equal_networks(names, sigma):
    """Networks that answer `sigma` whatever they are asked: only the last bias is not 0."""
    n = len(names)
    zero = torch.zeros(n, 64)
    return Networks(tuple(names), torch.zeros(n, 64, len(FEATURES)), zero, zero.clone(), torch.full((n,), sigma))


def check_equals_the_readable_twin(steps=20, lr=0.02, eps=1e-2, **options):
    """20 steps in fp64 against plain loops.

    Both give sigma as an fp32 number; the twin's fp32 modules round in between in another order, so a sigma may differ by
    some 2**-24 relative, hence v, and hence the weights by 1e-6 of what they moved (about 1).
    """
    weights = weights_of()
    networks = untrained(list(weights), 3)
    twin = Twin({name: as_module(networks, i) for i, name in enumerate(weights)}, **options)
    named = [(name, nn.Parameter(value.clone())) for name, value in weights.items()]
    start = {name: value.clone() for name, value in weights.items()}
    opt = ZO(named, of(networks, **options), lr=lr, eps=eps, seed=SEED)
    for step in range(steps):

        def draw(name, step=step):
            return Noise(stream(SEED, "step", step, 0)).realise(Site(name, tuple(weights[name].shape)), torch.float64)

        expected, rho = twin.step(weights, loss_of, draw, lr=lr, eps=eps)
        logged = opt.step(lambda: loss_of(dict(named)))
        assert abs(float(logged) - expected) < 1e-5 * expected
        assert abs(opt.last.estimate.info["rho"] - rho) < 1e-4 * (1 + abs(rho))
    for name, p in named:
        assert float((p.detach() - weights[name]).abs().max()) < 1e-5, name
    moved = max(float((weights[name] - start[name]).abs().max()) for name in weights)
    assert moved > 1e-2, "nothing moved, so nothing was compared"


def sigmas_of(method, weights, losses, before):
    """What the method answers for given last losses and last sigmas."""
    sites = sites_of(weights)
    method.load_state_dict({"names": [s.name for s in sites], "sigma": torch.tensor(before), "losses": list(losses)})
    factors, nf = method.factors(bare_context(weights, loss_of))
    return {name: factor / nf for name, factor in factors.items()}


def asked_of_a_module(module, values):
    with torch.no_grad():
        return abs(float(module(torch.tensor(values, dtype=torch.float32))))


def check_features_in_order():
    """T8: mean, unbiased variance, l+, l-, sigma before, against a torch module; 1e-6 for fp32 sums in another order."""
    weights = weights_of()
    networks = untrained(list(weights), 5)
    before = [0.1 * (i + 1) for i in range(len(weights))]
    found = sigmas_of(of(networks), weights, (0.9, 0.2), before)
    for i, (name, w) in enumerate(weights.items()):
        x = [float(w.mean()), float(w.var()), 0.9, 0.2, before[i]]
        assert abs(found[name] - asked_of_a_module(as_module(networks, i), x)) < 1e-6, name
        x[2], x[3] = x[3], x[2]
        assert abs(found[name] - asked_of_a_module(as_module(networks, i), x)) > 1e-4, "the order of losses is not seen"


def check_first_features():
    """T8: in the first step the losses are 0 and the sigma before is 1."""
    weights = weights_of()
    networks = untrained(list(weights), 5)
    factors, nf = of(networks).factors(bare_context(weights, loss_of))
    for i, (name, w) in enumerate(weights.items()):
        x = [float(w.mean()), float(w.var()), 0.0, 0.0, 1.0]
        assert abs(factors[name] / nf - asked_of_a_module(as_module(networks, i), x)) < 1e-6, name


def check_remembers_sigma_without_nf():
    """The sigma fed back is the network's answer; nf (about 5 here) does not enter."""
    weights = weights_of()
    method = of(untrained(list(weights), 5))
    _, estimate, ctx = estimate_of(method, weights, loss_of, seed=SEED)
    state, nf = method.state_dict(), estimate.info["nf"]
    assert abs(nf - 1) > 0.5, "nf is near 1, so it would not be seen"
    factors, _ = of(method._loaded).factors(bare_context(weights, loss_of))
    expected = torch.tensor([factors[site.name] / nf for site in ctx.sites])
    assert torch.allclose(state["sigma"], expected, rtol=1e-6)
    assert state["losses"] == ctx.losses


def check_normaliser(batch=2, world_size=2):
    """T3: sum_i w_i (nf sigma_i)^2 = sum_i w_i, with the embedding's w by its rule; fp64 sums, hence 1e-12."""
    weights = weights_of()
    method = of(untrained(list(weights), 5), batch=batch, world_size=world_size)
    factors, _ = method.factors(bare_context(weights, loss_of))
    w = {name: TOKENS * batch * world_size * 6 if "embed" in name else t.numel() for name, t in weights.items()}
    assert w["embed_tokens.weight"] != weights["embed_tokens.weight"].numel(), "the rule would not be seen"
    left = math.fsum(w[name] * factors[name] ** 2 for name in w)
    assert abs(left / sum(w.values()) - 1) < 1e-12


def check_mean_of_estimates(count=600, sigmas=5.0):
    """T4: the mean of g on a linear function is (nf sigma_i)^2 grad_i for any eps (differences are exact).

    g_k = f_k u_k sum_j f_j grad_j u_j, so Var(g_k) = f_k^2 (|f grad|^2 + f_k^2 grad_k^2): the bound is in these units.
    """
    weights = {name: tensor for name, tensor in weights_of().items() if name != "embed_tokens.weight"}
    slopes = {
        name: torch.cos(torch.arange(t.numel(), dtype=torch.float64)).view(t.shape) for name, t in weights.items()
    }
    method = of(untrained(list(weights), 5))
    first, _ = method.factors(bare_context(weights, loss_of))
    f = flat({name: torch.full_like(t, first[name]) for name, t in weights.items()})
    g = flat(slopes)

    def loss(w):
        return sum(float((w[name] * slopes[name]).sum()) for name in w)

    total = torch.zeros_like(g)
    for step in range(count):
        ctx = bare_context(weights, loss, step=step, eps=0.3)
        estimate = method.estimate(ctx)  # `observe` is not called, so the scales stay those of the first step
        total += flat(realised(estimate.direction, weights))
    deviation = f * ((f * g).square().sum() + (f * g).square()).sqrt() / math.sqrt(count)
    standard = (total / count - f**2 * g) / deviation
    d = len(g)
    assert float(standard.abs().max()) < sigmas
    # chi-squared of d numbers, a little correlated through the common factor: its spread is below 2 sqrt(2 d)
    assert abs(float(standard.square().sum()) - d) < 2 * sigmas * math.sqrt(2 * d)


def check_weights_asked_at(eps=0.1):
    """T9 and the order of work: both probes are +-eps v of one v, made of the scales of the unperturbed weights."""
    weights = weights_of()
    method = of(untrained(list(weights), 5))
    expected, _ = of(method._loaded).factors(bare_context(weights, loss_of))
    asked = []
    estimate_of(method, weights, loss_of, seed=SEED, eps=eps, asked=asked)
    u = Noise(stream(SEED, "step", 0, 0))
    for sign, point in zip((1, -1), asked, strict=True):
        for name, value in realised(point, weights).items():
            noise = u.realise(Site(name, tuple(value.shape)), torch.float64)
            # three roundings in fp64
            assert torch.allclose(value, sign * eps * expected[name] * noise, rtol=1e-14), name


def check_refused_steps_are_forgotten():
    """A step whose losses are not finite leaves sigmas and losses as they were."""
    named = [(name, nn.Parameter(value)) for name, value in weights_of().items()]
    opt = ZO(named, of(untrained([name for name, _ in named], 5)), lr=1e-3, eps=1e-2, seed=SEED)
    opt.step(lambda: loss_of(dict(named)))
    before = opt.method.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt.step(lambda: loss_of(dict(named)) * float("nan"))
    after = opt.method.state_dict()
    assert not opt.last.accepted
    assert after["losses"] == before["losses"]
    assert torch.equal(after["sigma"], before["sigma"])
    opt.step(lambda: loss_of(dict(named)))
    assert opt.method.state_dict()["losses"] != before["losses"], "nothing is ever remembered"


def check_networks_belong_to_names():
    """Two tensors of one shape and the same numbers have networks, and so scales, of their own."""
    weights = weights_of()
    weights["twin_b.weight"] = weights["twin_a.weight"].clone()
    networks = untrained(list(weights), 5)
    factors, _ = of(networks).factors(bare_context(weights, loss_of))
    assert abs(factors["twin_a.weight"] / factors["twin_b.weight"] - 1) > 1e-2
    for name in weights:  # the same from networks in another order
        again, _ = of(untrained(list(weights)[::-1], 5)).factors(bare_context(weights, loss_of))
        assert again[name] == factors[name]


def check_equal_scales_are_mezo(sigma, steps=6, exact=True):
    """T1: equal sigmas are MeZO: bit for bit if sigma is a power of two, else to the rounding of nf sigma."""
    runs = []
    for method in ("mezo", of(equal_networks(list(weights_of()), sigma))):
        named = [(name, nn.Parameter(value)) for name, value in weights_of().items()]
        opt = ZO(named, method, lr=0.02, eps=1e-2, seed=SEED)
        for _ in range(steps):
            opt.step(lambda named=named: loss_of(dict(named)))
        runs.append({name: p.detach() for name, p in named})
    for name in runs[0]:
        if exact:
            assert torch.equal(runs[0][name], runs[1][name]), name
        else:  # nf sigma is 1 to 1e-15; the difference of losses over 2 eps amplifies it 100 times, in each step
            assert torch.allclose(runs[0][name], runs[1][name], rtol=0, atol=1e-11), name
