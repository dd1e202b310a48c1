"""M5: a GPU draws the bits that the CPU draws, and nobody waits for it. Needs a CUDA device (`make test-gpu`)."""

import copy
from contextlib import contextmanager

import pytest
import torch
from tests.checks.noise import anew
from tests.support.models import CASES
from tests.support.triton import backend
from torch import nn
from torch.nn import functional as F

from zotune.core.context import Context
from zotune.core.direction import Noise
from zotune.core.ledger import read_ledger
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.kernels.contract import Run, Term
from zotune.kernels.philox import words
from zotune.optim.optimizer import ZO
from zotune.optim.replaying import optimizer_for, replay

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SITE = Site("layer.weight", (300, 301))
PARTS = [SITE, SITE.part(65, 700), SITE.take(torch.tensor([299, 0, 7]))]


def both(kind, part):
    z = Noise(stream(0, "device"), kind)
    return anew(z, part), anew(z, part, torch.float32, "cuda").cpu()


def test_random_words_are_the_same():
    """Integers: numpy on the CPU, torch on the GPU."""
    blocks = torch.arange(1000) + 2**33
    assert torch.equal(words((1, 2), 3 << 40, blocks.cuda()).cpu(), words((1, 2), 3 << 40, blocks))


@pytest.mark.parametrize("kind", ["normal", "rademacher"])
@pytest.mark.parametrize("part", PARTS, ids=["whole", "run", "rows"])
def test_table_noise_has_the_same_bits(kind, part):
    cpu, gpu = both(kind, part)
    assert torch.equal(cpu, gpu)


@pytest.mark.parametrize("part", PARTS, ids=["whole", "run", "rows"])
def test_exact_normals_agree_to_rounding(part):
    """log and cos differ in the last bits: a few ulp of numbers up to 6."""
    cpu, gpu = both("gaussian", part)
    assert torch.allclose(cpu, gpu, rtol=1e-5, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def case_on(device, dtype, name="llama"):
    """A small model with its closure, on a device."""
    torch.manual_seed(0)
    case = CASES[name](dtype)
    module = copy.deepcopy(case.module).to(device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, module.config.vocab_size, (2, 12), generator=generator).to(device)
    return module, lambda: module(input_ids=ids, labels=ids).loss


def trained(module):
    return list(module.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["mezo", "kerzoo", "es", "lozo"])
def test_a_ledger_replays_to_the_same_bits_on_both_devices(tmp_path, method, dtype):
    """The losses are those of the GPU; everything after them is the same arithmetic."""
    module, closure = case_on("cuda", dtype)
    opt = ZO(trained(module), method, lr=1e-3, eps=2.0**-7, ledger=tmp_path / "ledger.jsonl")
    for _ in range(4):
        opt.step(closure)
    assert opt.refused == 0
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    for device in ("cuda", "cpu"):
        rebuilt, _ = case_on(device, dtype)
        replay(optimizer_for(trained(rebuilt), ledger), ledger.entries)
        for (name, one), (_, other) in zip(trained(module), trained(rebuilt), strict=True):
            assert torch.equal(one.detach().cpu(), other.detach().cpu()), (device, name)


@contextmanager
def waiting_is_an_error(monkeypatch):
    """Inside, an operation that waits for the GPU raises, except in `Context.read`."""
    right = Context.read

    def read(self, estimate):
        torch.cuda.set_sync_debug_mode("default")
        try:
            return right(self, estimate)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(Context, "read", read)
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("engine", ["in_place", "layerwise"])
@pytest.mark.parametrize("method", ["mezo", "kerzoo"])
def test_nothing_waits_for_the_gpu_before_the_end_of_a_step(monkeypatch, method, engine):
    torch.manual_seed(0)
    layers = nn.Embedding(50, 32), nn.Linear(32, 64), nn.LayerNorm(64), nn.Tanh(), nn.Linear(64, 50)
    module, ids = nn.Sequential(*layers).to("cuda", torch.bfloat16), torch.arange(24).cuda()

    def closure():
        return F.cross_entropy(module(ids).float(), ids)

    opt = ZO(trained(module), method, lr=1e-3, eps=1e-2, engine=engine)
    opt.step(closure)  # looks at the model
    with waiting_is_an_error(monkeypatch):
        for _ in range(2):
            opt.step(closure)
    assert opt.refused == 0


def test_tensors_of_more_than_2_to_the_31_elements():
    """Offsets of 64 bits: numbers of a 4 GiB tensor are those that the CPU makes for them alone."""
    count, site = (1 << 31) + 5 * 8192, Site("large", ((1 << 31) + 5 * 8192,))
    stored = torch.zeros(count, dtype=torch.bfloat16, device="cuda")
    carried, out = torch.zeros(count, dtype=torch.int16, device="cuda"), torch.empty_like(stored)
    z, run = stream(0, "large"), Run(site.id, 0, count)
    backend("cuda").update(stored, carried, run, [Term(z.key, "normal", 0.5)])
    backend("cuda").perturb([(out, 1.0)], stored, carried, run, [Term(z.key, "normal", 0.25)])
    for first in (0, (1 << 31) - 4096, count - 8192):
        part = site.part(first, 8192)
        value = torch.zeros(8192)
        Noise(z).add_to(value, part, 0.5)
        assert torch.equal(stored[first : first + 8192].cpu(), value.bfloat16()), first
        Noise(z).add_to(value, part, 0.25)
        assert torch.equal(out[first : first + 8192].cpu(), value.bfloat16()), first


# ----------------------------------------------------------------------------------------------------------------------
# Captured and compiled forwards


def graphed(module, closure):
    """The forward as a CUDA graph: it reads the weights where they lie, and writes the loss to one place."""
    side = torch.cuda.Stream()
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            closure()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        loss = closure()

    def replayed():
        graph.replay()
        return loss

    return replayed


def compiled(module, closure):
    run = torch.compile(module)
    ids = torch.randint(0, module.config.vocab_size, (2, 12), generator=torch.Generator().manual_seed(1)).cuda()
    return lambda: run(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("prepare", [graphed, compiled])
def test_forwards_at_fixed_addresses_go_with_the_in_place_engine(prepare):
    """Captured or compiled, the forward sees each perturbation and each update; losses agree to the rounding of fp32.

    Fused kernels sum in another order: 1e-4 of the loss is a hundred roundings of 2**-24 with room to spare, and moving
    every weight by a hundredth changes the loss by far more.
    """
    ends = []
    for ready in (lambda module, closure: closure, prepare):
        module, closure = case_on("cuda", torch.float32)
        opt = ZO(trained(module), lr=1e-3, eps=1e-2, engine="in_place")
        closure = ready(module, closure)
        losses = []
        for _ in range(3):
            opt.step(closure)
            losses += opt.last.losses
        ends.append(losses)
        assert len(set(losses)) == len(losses)
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)
