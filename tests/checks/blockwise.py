"""Claims about block-wise probes that mutations must break."""

import math

import torch

from tests.checks.engines import make
from tests.checks.mezo import SEED, twin_model
from tests.reference.blockwise import blockwise_step
from tests.support.bare import estimate_of
from tests.support.models import CASES, snapshot
from zotune.core.direction import Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.methods.blockwise import Blockwise, blocks_of
from zotune.optim.optimizer import ZO

FP32, FP64 = torch.float32, torch.float64


def sites_named(*names):
    return [Site(name, (2, 3)) for name in names]


def check_equals_the_readable_twin(update="together", level="layer", steps=20):
    """20 steps in fp64 against plain loops: a few 2**-53 a step, amplified by 1/eps = 100."""
    named, loss = twin_model()
    twin = {name: p.detach().clone() for name, p in named}
    start = {name: value.clone() for name, value in twin.items()}
    opt = ZO(named, "blockwise", lr=0.02, eps=1e-2, seed=SEED, method_options={"update": update, "level": level})
    blocks = list(blocks_of([slot.site for slot in opt.weights], level).values())
    assert len(blocks) == {"layer": 3, "tensor": 4}[level]
    for step in range(steps):

        def draw(name, step=step):
            return Noise(stream(SEED, "step", step, 0)).realise(Site(name, tuple(start[name].shape)), FP64)

        expected, _ = blockwise_step(twin, loss, draw, blocks, lr=0.02, eps=1e-2, each=update == "each")
        assert abs(float(opt.step(lambda: loss(dict(named)))) - expected) < 1e-10
    for name, p in named:
        assert float((p.detach() - twin[name]).abs().max()) < 1e-10, name
        assert float((p.detach() - start[name]).abs().max()) > 1e-3, "nothing moved, so nothing was compared"


def probed(update="together", level="layer", dtype=FP64, lr=1e-2, case="llama", engine="in_place"):
    """One step: (the optimizer, bits before, bits at each probe, blocks). The in-place engine writes what it probes."""
    torch.manual_seed(0)
    case = CASES[case](dtype)
    opt = make(case, engine, method="blockwise", method_options={"update": update, "level": level}, lr=lr)
    before, seen = snapshot(case), []

    def closure():
        seen.append(snapshot(case))
        return case.closure()

    opt.step(closure)
    blocks = list(blocks_of([slot.site for slot in opt.weights], level).values())
    return opt, before, snapshot(case), seen[1:], blocks


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def check_other_blocks_are_not_touched(level="layer"):
    """C8: during a probe the tensors of its block are changed, each number of them, and all others have their bits."""
    opt, before, after, seen, blocks = probed("together", level)
    assert len(seen) == 2 * len(blocks) == opt.method.forwards_for([slot.site for slot in opt.weights]) == opt.forwards
    for number, block in enumerate(blocks):
        for probe in seen[2 * number : 2 * number + 2]:
            assert changed(before, probe) == set(block)
            assert all(bool((before[name] != probe[name]).all()) for name in block)
    assert changed(before, after) == set(before)


def check_later_blocks_are_probed_where_earlier_ones_moved():
    """ "each": at the probes of block b the earlier blocks have, bit for bit, the weights that the step ends with."""
    _, before, after, seen, blocks = probed("each")
    for number, block in enumerate(blocks):
        earlier = {name for previous in blocks[:number] for name in previous}
        for probe in seen[2 * number : 2 * number + 2]:
            assert changed(before, probe) == earlier | set(block)
            assert not changed(after, probe) & earlier, "the step is not the weights at which later blocks were probed"


def check_blocks_share_no_noise():
    """C8: directions of blocks of one shape are uncorrelated: |r| below 4 / sqrt(numbers)."""
    sites = [Site(f"layers.{i}.weight", (64, 64)) for i in range(4)]
    weights = {site.name: torch.zeros(site.shape, dtype=FP64) for site in sites}
    _, estimate, _ = estimate_of(Blockwise(), weights, lambda w: sum(float(v.sum()) for v in w.values()), eps=0.5)
    parts = [sum((z.realise(site, FP64) for _, z in estimate.direction.terms)).flatten() for site in sites]
    for i, one in enumerate(parts):
        for other in parts[:i]:
            assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 4 / math.sqrt(one.numel())


def check_the_estimate_is_the_sum_of_the_blocks_terms():
    """C8: sum over blocks of (z_b . grad) z_b, on a linear loss, where slopes are exact for any eps (fp64 rounding)."""
    torch.manual_seed(0)
    shapes = {"embed.weight": (4, 3), "layers.0.a.weight": (3, 3), "layers.0.b.bias": (3,), "layers.1.a.weight": (3, 3)}
    b = {name: torch.randn(shape, dtype=FP64) for name, shape in shapes.items()}
    weights = {name: torch.zeros_like(value) for name, value in b.items()}

    def loss(w):
        return sum(float((w[name] * b[name]).sum()) for name in w)

    made, estimate, ctx = estimate_of(Blockwise(), weights, loss, eps=0.5, seed=SEED)
    z = {name: Noise(stream(SEED, "step", 0, 0)).realise(Site(name, shape), FP64) for name, shape in shapes.items()}
    blocks = [["embed.weight"], ["layers.0.a.weight", "layers.0.b.bias"], ["layers.1.a.weight"]]
    rho = {name: sum(float((z[n] * b[n]).sum()) for n in block) for block in blocks for name in block}
    expected = torch.cat([(rho[name] * z[name]).flatten() for name in weights])
    assert torch.allclose(made, expected, rtol=1e-12, atol=1e-13)
    assert ctx.queries == 6
    assert abs(float(estimate.loss)) < 1e-12  # the mean of linear pairs around 0; a plus side would be eps rho


def check_logged_loss():
    """The mean of all probes; with "each" that of the first pair, which is asked before anything moved."""
    for update, of in (
        ("together", lambda losses: sum(losses) / len(losses)),
        ("each", lambda losses: sum(losses[:2]) / 2),
    ):
        opt, *_ = probed(update)
        assert (
            abs(float(opt.last.estimate.loss) - of(opt.last.losses)) < 1e-14
        )  # a mean of means rounds in another order
        assert max(opt.last.losses) - min(opt.last.losses) > 1e-4


def check_moments(count):
    """E g = b and E|g|^2 = sum_b (d_b + 2) |b_b|^2 on a linear loss with Gaussian z, to 5 sigma."""
    torch.manual_seed(0)
    shapes = {"layers.0.weight": (4, 5), "layers.1.weight": (3, 4), "norm.weight": (6,)}
    b = {name: torch.randn(shape, dtype=FP64) for name, shape in shapes.items()}
    weights = {name: torch.zeros_like(value) for name, value in b.items()}

    def loss(w):
        return sum(float((w[name] * b[name]).sum()) for name in w)

    run = [estimate_of(Blockwise(), weights, loss, step=k, kind="gaussian", eps=0.5)[0] for k in range(count)]
    made, expected = torch.stack(run), torch.cat([value.flatten() for value in b.values()])
    norms = torch.cat([value.square().sum().expand(value.numel()) for value in b.values()])
    error = (made.mean(dim=0) - expected).abs() / ((expected.square() + norms) / count).sqrt()
    assert float(error.max()) < 5
    squares = made.square().sum(dim=1)
    predicted = sum((value.numel() + 2) * float(value.square().sum()) for value in b.values())
    assert abs(float(squares.mean()) - predicted) < 5 * float(squares.std()) / math.sqrt(count)
