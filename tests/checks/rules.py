"""Claims about rules that mutations must break."""

import io
from contextlib import ExitStack
from unittest import mock

import torch
from torch import nn

from tests.checks.engines import make
from tests.checks.mezo import SEED, twin_model
from tests.reference.rules import mezo_gradient, rule_step
from tests.support.models import CASES, assert_same_bits, bits, snapshot
from zotune.core.context import Estimate
from zotune.core.direction import HERE, Combination, Noise, Scaled
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.optim.optimizer import ZO
from zotune.rules import make_rule

FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
CHUNKED = [f"zotune.{module}.CHUNK" for module in ("rules.base", "core.weights", "core.direction", "core.elementwise")]


def noise(number=0, kind="normal"):
    return Noise(stream(SEED, "rules", number), kind)


def estimate(direction):
    return Estimate(direction, 0.0)


def group(lr=0.1, weight_decay=0.0):
    return {"lr": lr, "weight_decay": weight_decay}


def apply(rule, directions, lr=0.1, weight_decay=0.0, shape=(3, 4), dtype=FP64, name="a.weight", start=None):
    """A rule applied to one tensor along given estimates, as the optimizer does it; returns the tensor and the state."""
    weight = torch.zeros(shape, dtype=dtype) if start is None else start.clone()
    site, state = Site(name, tuple(weight.shape)), {}
    for count, direction in enumerate(directions, start=1):
        prepared = rule.prepare(estimate(direction))
        rule(weight, site, prepared, group(lr, weight_decay), state)
        state["step"] = torch.tensor(float(count))
    return weight, state


def check_equals_the_readable_twin(rule, weight_decay=0.1, steps=20, **options):
    """20 steps of MeZO with the rule, in fp64, against plain loops.

    Both round in another order: a few 2**-53 a step, amplified by 1/eps = 100 in rho; signs amplify nothing unless a number
    is within 1e-13 of 0, and none is here.
    """
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start, memories = {name: value.clone() for name, value in twin.items()}, {}
    settings = {"lr": 0.01, "weight_decay": weight_decay}
    opt = ZO(named, eps=1e-2, seed=SEED, rule=rule, rule_options=options, **settings)
    for step in range(steps):

        def draw(name, step=step):
            return Noise(stream(SEED, "step", step, 0)).realise(Site(name, tuple(twin[name].shape)), FP64)

        gradient, expected = mezo_gradient(twin, loss, draw, eps=1e-2)
        rule_step(rule, twin, gradient, memories, **settings, **options)
        logged = opt.step(lambda: loss(dict(named)))
        assert abs(float(logged) - expected) < 1e-9
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-9, name
        assert float((p.detach() - start[name]).abs().max()) > 1e-3, "nothing moved, so nothing was compared"


def check_chunks_do_not_matter(rule, dtype=FP32, steps=4):
    """The same bits whether a tensor is worked on whole or in chunks of 64: state belongs to elements, not to chunks.

    A chunk's end moves nothing either: no operation rounds differently in a vector's tail.
    """

    def run(chunk):
        torch.manual_seed(0)
        named = [("a.weight", nn.Parameter(torch.randn(7, 43).to(dtype))), ("b.bias", nn.Parameter(torch.randn(9)))]
        named.append(("skew", nn.Parameter(torch.randn(6, 31).to(dtype).t())))
        opt = ZO(named, lr=0.01, eps=0.1, rule=rule, engine="in_place", weight_decay=0.1)
        with ExitStack() as patched:
            for target in CHUNKED:
                patched.enter_context(mock.patch(target, chunk))
            for _ in range(steps):
                opt.step(lambda: sum(p.float().square().sum() for _, p in named))
        return named, [slot.carried for slot in opt.weights]

    (whole, carried), (cut, cut_carried) = run(1 << 18), run(61)
    for (name, one), (_, other) in zip(whole, cut, strict=True):
        assert torch.equal(bits(one), bits(other)), f"{name} depends on chunks"
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(carried, cut_carried, strict=True))


def check_resumes(rule="sgd", method="mezo", dtype=FP32, steps=6, stops=(1, 4), **settings):
    """Through torch.save and torch.load(weights_only=True) in the middle of a run: bits, carried bits and losses as without."""

    def fresh():
        torch.manual_seed(0)
        case = CASES["dropout_mlp"](dtype)
        return case, make(case, "in_place", lr=1e-3, rule=rule, method=method, **settings)

    def advance(case, opt, until):
        while opt.step_number < until:
            opt.step(case.closure)

    case, whole = fresh()
    advance(case, whole, steps)
    assert whole.refused == 0, "the run blew up, so it shows nothing"
    for stop in stops:
        first, opt = fresh()
        advance(first, opt, stop)
        saved = io.BytesIO()
        torch.save([first.module.state_dict(), opt.state_dict()], saved)
        second, resumed = fresh()
        saved.seek(0)
        weights, state = torch.load(saved, weights_only=True)
        second.module.load_state_dict(weights)
        resumed.load_state_dict(state)
        advance(second, resumed, steps)
        assert resumed.last.losses == whole.last.losses
        assert_same_bits(snapshot(case), snapshot(second))
        for slot, other in zip(whole.weights, resumed.weights, strict=True):
            assert slot.carried is other.carried is None or torch.equal(slot.carried, other.carried)


def check_lr_0_changes_no_bit(rule, dtype):
    """Signed zeros included; the rule goes on remembering."""
    start = torch.tensor([-0.0, 0.0, 1.5, -2.0, -0.0, 0.0], dtype=dtype)
    weight, _ = apply(make_rule(rule), [noise(0), HERE, noise(1)], lr=0.0, weight_decay=0.3, start=start)
    assert torch.equal(bits(weight), bits(start))


def check_declared_bytes(rule):
    """Bytes of all full-size tensors in the optimizer's state, beside carried bits; fp32 and bf16 weights have fp32 values."""
    for dtype in (FP32, BF16):
        case = CASES["mlp"](dtype)
        opt = make(case, "in_place", lr=1e-3, rule=rule)
        for _ in range(3):
            opt.step(case.closure)
        kept = [value for state in opt.state.values() for key, value in state.items() if key not in ("step", "carried")]
        assert sum(value.nbytes for value in kept) == opt.rule.extra_bytes([slot.site for slot in opt.weights])


def check_the_trial_is_the_update(rule):
    """Contract 2 for tried steps: weights plus the trial are, bit for bit, the weights after the rule."""
    for dtype in (FP32, FP64):
        start = torch.randn(5, 70, dtype=dtype)
        for direction in (0.3 * noise(0), -(0.3 * noise(0)), 0.3 * noise(0) - 1.7 * noise(1), HERE):
            tried = start.clone()
            made = make_rule(rule)
            made.trial(direction, group(0.01)).add_to(tried, Site("a.weight", (5, 70)))
            moved, _ = apply(made, [direction], lr=0.01, start=start)
            assert torch.equal(bits(tried), bits(moved))
            assert torch.equal(bits(moved), bits(start)) == (not direction)


# ----------------------------------------------------------------------------------------------------------------------
# Constants of single rules


def check_sign_moves_every_number_by_lr():
    """C2: elementwise |move| = lr exactly (from weight 0), in the direction of -sign(g)."""
    g = -0.7 * noise(0) + 0.2 * noise(1)
    moved, _ = apply(make_rule("sign"), [g], lr=0.125)
    assert torch.equal(moved, -0.125 * torch.sign(g.realise(Site("a.weight", (3, 4)), FP64)))
    assert torch.equal(moved.abs(), torch.full_like(moved, 0.125))


def check_sign_does_not_see_the_scale_of_the_loss():
    """C2: a loss times any positive factor gives the same bits. The factors are powers of two, so rho is scaled exactly."""
    ends = []
    for factor in (1.0, 2.0**-20, 2.0**9):
        named, loss = twin_model()
        opt = ZO(named, lr=0.01, eps=2.0**-7, seed=SEED, rule="sign")
        for _ in range(5):
            opt.step(lambda factor=factor, named=named, loss=loss: factor * loss(dict(named)))
        ends.append(torch.cat([p.detach().flatten() for _, p in named]))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def check_momentum_is_the_heavy_ball_on_the_log():
    """C1: the buffer is sum beta^(t-k) c_k z_k, rebuilt from the run seed and the slopes of the ledger (fp64, rounding)."""
    named, loss = twin_model()
    opt, slopes = ZO(named, lr=0.01, eps=1e-2, seed=SEED, rule="momentum"), []
    for _ in range(12):
        opt.step(lambda: loss(dict(named)))
        plus, minus = opt.last.losses
        slopes.append((plus - minus) / 2e-2)
    for name, p in named:
        zs = [Noise(stream(SEED, "step", k, 0)).realise(Site(name, tuple(p.shape)), FP64) for k in range(12)]
        expected = sum(0.9 ** (11 - k) * c * z for k, (c, z) in enumerate(zip(slopes, zs, strict=True)))
        assert torch.allclose(opt.state[p]["momentum"].view(p.shape), expected, rtol=1e-12, atol=1e-13)


def check_replayed_momentum_is_momentum(window=32, beta=0.9, steps=40):
    """C1: on equal estimates the two rules differ by rounding until `window` steps are over, then by the terms left out."""
    directions = [((-1) ** k * (0.3 + k % 3)) * noise(k) for k in range(steps)]
    site = Site("a.weight", (3, 4))
    g = [direction.realise(site, FP64) for direction in directions]
    buffered, replayed = (
        make_rule("momentum", {"beta": beta}),
        make_rule("momentum_replayed", {"beta": beta, "window": window}),
    )
    for count in (window, steps):
        kept, _ = apply(buffered, directions[:count])
        made, _ = apply(make_rule("momentum_replayed", {"beta": beta, "window": window}), directions[:count])
        left_out = sum(
            0.1 * beta**age * g[t - age] for t in range(count) for age in range(window, t + 1)
        )  # w sums lr m_t over t
        # a few hundred additions of numbers below 30, each rounded by 2**-53
        assert torch.allclose(kept + left_out, made, rtol=0, atol=1e-12)
        assert count == window or float((kept - made).abs().max()) > 1e-4, (
            "nothing was left out, so nothing was compared"
        )
    assert replayed.extra_bytes([site]) == 0


def check_adam_is_torch_adam():
    """torch.optim.Adam fed with the realised estimates, in fp64; both do the same few operations in another order."""
    directions = [(1 + k % 4) * noise(k) for k in range(15)]
    start = torch.randn(3, 4, dtype=FP64)
    moved, _ = apply(make_rule("adam"), directions, lr=0.05, start=start)
    p = nn.Parameter(start.clone())
    opt = torch.optim.Adam([p], lr=0.05)
    for direction in directions:
        p.grad = direction.realise(Site("a.weight", (3, 4)), FP64)
        opt.step()
    assert torch.allclose(moved, p.detach(), rtol=1e-12, atol=1e-13)


def check_adam_without_memory_is_sign():
    """C4: b1 = b2 = 0, delta -> 0: m / sqrt(m^2) is +-1 up to the roundings of a square, a root and a division."""
    g = [(-1) ** k * (k + 1) * noise(k) for k in range(3)]
    signed, _ = apply(make_rule("sign"), g)
    made, _ = apply(make_rule("adam", {"beta1": 0.0, "beta2": 0.0, "delta": 1e-30}), g)
    assert torch.allclose(made, signed, rtol=0, atol=1e-15)


def check_adamm_never_forgets_a_large_estimate():
    """A spike of 1,000 at step 0 keeps the denominator of later steps: v_max stays (1 - beta2) 1000^2 g^2."""
    size = 1000.0
    _, state = apply(make_rule("adamm"), [size * noise(0, "rademacher")] + [0.001 * noise(1)] * 5)
    spike = (1 - 0.999) * size**2
    assert torch.allclose(state["largest"], torch.full((12,), spike, dtype=FP64), rtol=1e-14)
    assert bool((state["square"] < spike).all())


def check_jaguar_keeps_what_was_not_touched():
    """Untouched tensors: accumulator unchanged, weights moved by lr sign(a) all the same. Touched ones: beta, 1 - beta."""
    only_b = Scaled(noise(1), {"b.weight": 1.0}, otherwise=0.0)
    first = {name: noise(0).realise(Site(name, (3, 4)), FP64) for name in ("a.weight", "b.weight")}
    second = noise(1).realise(Site("b.weight", (3, 4)), FP64)
    for name, expected in (
        ("a.weight", 0.1 * first["a.weight"]),
        ("b.weight", 0.09 * first["b.weight"] + 0.1 * second),
    ):
        moved, state = apply(make_rule("jaguar"), [noise(0), Combination() + only_b], name=name)
        average = state["average"].view(3, 4)
        assert torch.allclose(average, expected, rtol=1e-14, atol=1e-16)
        assert torch.allclose(moved, -0.1 * torch.sign(first[name]) - 0.1 * torch.sign(expected), rtol=1e-15)
