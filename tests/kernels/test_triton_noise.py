"""The Triton kernels against the CPU's noise and storage, bit for bit: interpreted on a CPU, compiled on a GPU.

Every comparison is of bits: the contract leaves no room for a tolerance.
"""

import math
from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.models import CASES, assert_same_bits, snapshot
from tests.support.triton import DEVICES, backend
from torch.utils._python_dispatch import TorchDispatchMode

from zotune.core.direction import Combination, Noise
from zotune.core.noise import stream
from zotune.core.site import Site
from zotune.core.weights import Weights
from zotune.kernels.contract import Addition, Run, Term
from zotune.kernels.dispatch import using
from zotune.optim.optimizer import ZO

pytest.importorskip("triton")
pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")]

KINDS = ["normal", "rademacher"]
LOW = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, torch.float64, *LOW]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
FAR = (1 << 41) + 7  # its block number does not fit into 32 bits
SCALES = [1e-3, -0.7, 1.0, 3e-41, -1e36, 0.0, -0.0, 0.1, torch.tensor(1 / 3, dtype=torch.float64), torch.tensor(-0.3)]
terms_of = st.lists(
    st.tuples(st.integers(0, 99), st.sampled_from(KINDS), st.sampled_from(SCALES)), min_size=1, max_size=3
)
quick = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))


def same(one, two):
    """Equal bits; any NaN equals any NaN."""
    kind = INTEGERS[one.element_size()]
    one, two = one.detach().cpu(), two.detach().cpu()
    return torch.equal(one.isnan(), two.isnan()) and torch.equal(
        one.nan_to_num(nan=1.0, posinf=math.inf, neginf=-math.inf).view(kind),
        two.nan_to_num(nan=1.0, posinf=math.inf, neginf=-math.inf).view(kind),
    )


def terms(made, device):
    """(seed, kind, scale) triples as the back end's terms; tensors lie on the device."""
    moved = [(n, kind, scale.to(device) if isinstance(scale, torch.Tensor) else scale) for n, kind, scale in made]
    return [Term(stream(n, "triton").key, kind, scale) for n, kind, scale in moved]


def direction(made):
    """The same as a direction of the CPU."""
    return Combination(tuple((scale, Noise(stream(n, "triton"), kind)) for n, kind, scale in made))


def values(count, dtype, seed=0):
    """Numbers of every size, of both signs, and the awkward ones."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(count, generator=generator, dtype=torch.float64)
    made *= 2.0 ** torch.randint(-12, 9, (count,), generator=generator)
    made[::7] = torch.tensor([0.0, -0.0, 1e-7, -6e-8, 65504.0, -65000.0, math.inf]).repeat(count)[: len(made[::7])]
    return made.to(dtype)


def run_of(part):
    return Run(part.id, part.start, part.numel, part.rows, part.width)


def to(run, device):
    return Run(run.site, run.start, run.count, None if run.rows is None else run.rows.to(device), run.width)


def slot_of(count, dtype, carry, seed=0, shape=None):
    """A tensor of the CPU's engine, with carried bits of a few updates."""
    weights = Weights([("w", values(count, dtype, seed).view(shape or (count,)))])
    slot = weights.slots["w"]
    if carry:
        noise = Noise(stream(seed, "before"))
        weights.update(slot, lambda w, part: noise.add_to(w, part, 1e-4))
    return weights, slot


@given(start=st.integers(0, 3000), count=st.integers(1, 5000), made=terms_of, wide=st.booleans())
@quick
def test_noise_is_added_as_the_cpu_adds_it(device, start, count, made, wide):
    dtype = torch.float64 if wide else torch.float32
    part = Site("a.weight", (1 << 20,), start, count)
    expected = values(count, dtype)
    out = expected.to(device, copy=True)
    direction(made).add_to(expected, part)
    backend(device).add(out, to(run_of(part), device), terms(made, device))
    assert same(out, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 8192, FAR, (1 << 40) - 512])
def test_noise_far_into_a_tensor(device, kind, start):
    """Three tiles; element numbers of more than 32 bits, and block numbers too."""
    part, made = Site("far", (1 << 42,), start, 16384 + 24), [(1, kind, 0.25)]
    expected = torch.zeros(part.count)
    out = expected.to(device, copy=True)
    direction(made).add_to(expected, part)
    backend(device).add(out, run_of(part), terms(made, device))
    assert same(out, expected)


@given(
    dtype=st.sampled_from(DTYPES), carry=st.booleans(), sides=st.sampled_from([(1.0,), (-1.0,), (1.0, -1.0), (-1.0, 1.0)]),
    start=st.integers(0, 700), count=st.integers(1, 2000), made=terms_of, seed=st.integers(0, 9),
)  # fmt: skip
@settings(quick, max_examples=25)
def test_perturbed_values_are_those_of_the_cpu(device, dtype, carry, sides, start, count, made, seed):
    weights, slot = slot_of(2700, dtype, carry and dtype in LOW, seed)
    part = slot.site.part(start, count)
    cut = slice(start, start + count)
    outs = [(torch.empty(count, dtype=dtype, device=device), sign) for sign in sides]
    carried = None if slot.carried is None else slot.carried[cut].to(device)
    stored = slot.tensor[cut].to(device)
    backend(device).perturb(outs, stored, carried, run_of(part), terms(made, device))
    for out, sign in outs:
        expected = torch.empty(count, dtype=dtype)
        total = torch.full((count,), -0.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        for one in made:
            direction([one]).add_to(total, part)
        value = slot.storage.read(slot, part)
        expected.copy_(value + sign * total)
        assert same(out, expected)
        if sign > 0:
            weights.perturb(slot, part, direction(made), expected)
            assert same(out, expected)
    assert same(stored, slot.tensor[cut])  # the stored numbers are read only


@given(dtype=st.sampled_from(DTYPES), count=st.integers(1, 9000), made=terms_of, seed=st.integers(0, 9))
@settings(quick, max_examples=20)
def test_updates_keep_what_the_cpu_keeps(device, dtype, count, made, seed):
    weights, slot = slot_of(count, dtype, dtype in LOW, seed)
    stored, carried = (
        slot.tensor.to(device, copy=True),
        None if slot.carried is None else slot.carried.to(device, copy=True),
    )
    backend(device).update(stored, carried, run_of(slot.site), terms(made, device))
    weights.update(slot, direction(made).add_to)
    assert same(stored, slot.tensor)
    if carried is not None:
        finite = slot.tensor.isfinite()  # beside infinity and NaN nothing that matters is carried
        assert torch.equal(carried.cpu()[finite], slot.carried[finite])


@pytest.mark.parametrize("dtype", LOW)
def test_carried_bits_of_halfway_cases(device, dtype):
    """Numbers half way between two stored ones, above and below zero, and fp16's subnormals and its largest numbers."""
    near = torch.tensor(
        [1.0, -1.0, 1.5, 65504.0, -65504.0, 6e-8, -6e-8, 6.1e-5, 0.0, -0.0, 3e38 if dtype != LOW[1] else 1.0]
    )
    values = torch.cat([near * (1 + k * 2.0**-12) for k in range(-8, 9)]).to(dtype)
    weights = Weights([("w", values.clone())])
    slot = weights.slots["w"]
    weights.update(slot, lambda w, part: w.mul_(1 + 2.0**-9))
    stored, carried = slot.tensor.to(device, copy=True), slot.carried.to(device, copy=True)
    for scale in (2.0**-10, -(2.0**-20), 2.0**-33):
        made = [(3, "rademacher", scale)]
        backend(device).update(stored, carried, run_of(slot.site), terms(made, device))
        weights.update(slot, direction(made).add_to)
    assert same(stored, slot.tensor)
    assert torch.equal(carried.cpu(), slot.carried)


@pytest.mark.parametrize("dtype", LOW)
def test_every_carried_number_counts_and_zeros_keep_their_sign(device, dtype):
    """Displaced by zeros of both signs, so that nothing hides a lost bit or the sign of -0.0."""
    stored = torch.tensor([0.0, -0.0, 1.0, -1.0, 6e-8, -3e-5]).to(dtype).repeat_interleave(10)
    low = torch.tensor([0, 0, 1, -1, 2, -2, 255, -256, 32767, -32768], dtype=torch.int16).repeat(6)
    weights = Weights([("w", stored.clone())])
    slot, made = weights.slots["w"], [(3, "rademacher", 0.0)]
    slot.carried = low.clone()
    ours, carried, out = (
        stored.to(device, copy=True),
        low.to(device, copy=True),
        torch.empty_like(stored, device=device),
    )
    backend(device).perturb([(out, 1.0)], ours, carried, run_of(slot.site), terms(made, device))
    weights.perturb(slot, slot.site, direction(made), expected := torch.empty_like(stored))
    assert same(out, expected)
    backend(device).update(ours, carried, run_of(slot.site), terms(made, device))
    weights.update(slot, direction(made).add_to)
    assert same(ours, slot.tensor)
    assert torch.equal(carried.cpu(), slot.carried)


@given(
    dtype=st.sampled_from(DTYPES), carry=st.booleans(), width=st.sampled_from([1, 5, 64, 100, 513]),
    rows=st.lists(st.integers(0, 40), min_size=1, max_size=7), made=terms_of,
)  # fmt: skip
@settings(quick, max_examples=15)
def test_chosen_rows_are_those_of_the_whole(device, dtype, carry, width, rows, made):
    weights, slot = slot_of(41 * width, dtype, carry and dtype in LOW, shape=(41, width))
    rows = torch.tensor(rows)
    part, run = slot.site.take(rows), to(run_of(slot.site.take(rows)), device)
    stored = slot.tensor[rows].view(-1).to(device)
    carried = None if slot.carried is None else slot.carried[rows].view(-1).to(device)
    outs = [(torch.empty_like(stored), 1.0), (torch.empty_like(stored), -1.0)]
    backend(device).perturb(outs, stored, carried, run, terms(made, device))
    whole = torch.empty(slot.site.numel, dtype=dtype)
    weights.perturb(slot, slot.site, direction(made), whole)
    assert same(outs[0][0], whole.view(41, width)[rows].view(-1))
    value = slot.storage.read(slot, part).view(-1)
    total = torch.full_like(value, -0.0)
    for one in made:
        direction([one]).add_to(total, part)
    assert same(outs[1][0], (value - total).to(dtype))
    if dtype not in LOW or carried is not None:
        backend(device).update(stored, carried, run, terms(made, device))
        weights.update(slot, direction(made).add_to)
        assert same(stored, slot.tensor[rows].view(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_out_may_be_the_stored_tensor(device, dtype):
    weights, slot = slot_of(3000, dtype, carry=False)
    made = [(4, "normal", 0.01), (5, "rademacher", 0.02)]
    stored = slot.tensor.to(device, copy=True)
    backend(device).perturb([(stored, 1.0)], stored, None, run_of(slot.site), terms(made, device))
    weights.perturb(slot, slot.site, direction(made), slot.tensor)
    assert same(stored, slot.tensor)


def test_several_outputs_of_one_sign(device):
    stored, made = values(1000, torch.float32).to(device), [(6, "normal", 0.5)]
    run = Run(9, 0, 1000)
    outs = [(torch.empty_like(stored), sign) for sign in (1.0, 1.0, -1.0, 1.0)]
    backend(device).perturb(outs, stored, None, run, terms(made, device))
    assert same(outs[0][0], outs[1][0])
    assert same(outs[0][0], outs[3][0])
    assert not same(outs[0][0], outs[2][0])


def test_a_scale_on_the_device_is_read_when_the_kernel_runs(device):
    """Not on the host; and its table is not kept, because somebody may write to it."""
    scale = torch.tensor(0.5, dtype=torch.float64, device=device)
    made = []
    for number in (0.5, 0.25):
        scale.fill_(number)
        made.append(torch.zeros(64, device=device))
        with Operations() as operations:
            backend(device).add(made[-1], Run(1, 0, 64), [Term((1, 2), "normal", scale)])
        assert not {"aten::_local_scalar_dense", "aten::equal"} & operations.names
    assert same(made[0], 2 * made[1])


class Operations(TorchDispatchMode):
    """Names of the operations that were run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def test_zeros_of_both_signs_are_different_scales(device):
    """Kept tables are found by bits: -0.0 == 0.0, but -0.0 + 0.0 * z is 0.0 where z is positive."""
    for number in (0.0, -0.0):
        expected = torch.full((64,), -0.0)
        out = expected.to(device, copy=True)
        backend(device).add(out, Run(Site("z", (64,)).id, 0, 64), terms([(1, "normal", number)], device))
        direction([(1, "normal", number)]).add_to(expected, Site("z", (64,)))
        assert same(out, expected)


def test_nothing_to_do(device):
    empty = torch.empty(0, device=device)
    rows = torch.empty(0, dtype=torch.int64, device=device)
    for run in (Run(1, 5, 0), Run(1, 0, 0, rows, 8)):
        backend(device).add(empty, run, terms([(1, "normal", 1.0)], device))
        backend(device).perturb([(empty, 1.0)], empty, None, run, terms([(1, "normal", 1.0)], device))


def test_what_is_refused(device):
    low, run = torch.zeros(64, dtype=torch.bfloat16, device=device), Run(1, 0, 64)
    with pytest.raises(TypeError, match="carried"):
        backend(device).update(low, None, run, terms([(1, "normal", 1.0)], device))
    with pytest.raises(TypeError, match="fp32"):
        backend(device).add(low, run, terms([(1, "normal", 1.0)], device))
    good, one = torch.zeros(64, device=device), terms([(1, "normal", 1.0)], device)
    for out in (low, good[:32], torch.zeros(64, 2, device=device)[:, 0]):
        with pytest.raises(ValueError, match="64 contiguous"):
            backend(device).perturb([(out, 1.0)], good, None, run, one)
    with pytest.raises(ValueError, match="64 contiguous"):
        backend(device).update(low, low, run, one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_terms_are_no_displacement(device, dtype):
    weights, slot = slot_of(1000, dtype, carry=dtype in LOW)
    stored, carried = slot.tensor.to(device, copy=True), None if slot.carried is None else slot.carried.to(device)
    outs = [(torch.empty_like(stored), sign) for sign in (1.0, -1.0)]
    backend(device).perturb(outs, stored, carried, run_of(slot.site), [])
    backend(device).update(stored, carried, run_of(slot.site), [])
    weights.perturb(slot, slot.site, Combination(), expected := torch.empty(1000, dtype=dtype))
    assert same(outs[0][0], expected)
    assert same(outs[1][0], expected)
    assert same(stored, slot.tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_and_what_reads_it(device, dtype):
    weights, slot = slot_of(1000, dtype, carry=dtype in LOW)
    stored, carried = (
        slot.tensor.to(device, copy=True),
        None if slot.carried is None else slot.carried.to(device, copy=True),
    )
    update, moved = [(1, "normal", 1e-4)], [(2, "normal", 1e-2)]
    outs = [(torch.empty_like(stored), sign) for sign in (1.0, -1.0)]
    addition = Addition(stored, carried, slot.site.id, terms(update, device))
    backend(device).update_and_perturb(addition, outs, terms(moved, device))
    slot.late = tuple(terms(update, "cpu"))
    z = direction(moved)
    expected = [torch.empty(1000, dtype=dtype) for _ in outs]
    weights.perturb_many(slot, slot.site, (z, -z), expected)
    assert all(same(out, want) for (out, _), want in zip(outs, expected, strict=True))
    assert same(stored, slot.tensor)


def test_autograd_is_told(device):
    """A tensor that was saved for a backward pass and then written to must not pass as unchanged."""
    out, run = torch.zeros(64, device=device), Run(1, 0, 64)
    before = out._version
    backend(device).add(out, run, terms([(1, "normal", 1.0)], device))
    assert out._version > before


@pytest.mark.parametrize(
    ("method", "engine", "dtype"), [("mezo", "layerwise", torch.bfloat16), ("fzoo", "in_place", torch.float32)]
)
def test_whole_steps_have_the_same_bits(device, method, engine, dtype):
    """The interpreted kernels in the place of the CPU's, from the first query to the carried bits."""
    if device != "cpu":
        pytest.skip("the losses of a GPU are others; replays are compared in tests/invariance/test_devices.py")
    ends, options = [], {"fzoo": {"n": 3}}.get(method, {})
    for backends in (nullcontext(), using(backend(device))):
        torch.manual_seed(0)
        case = CASES["mlp"](dtype)
        with backends:
            opt = ZO(case.named, method, method_options=options, engine=engine, lr=1e-3, eps=1e-2)
            for _ in range(2):
                opt.step(case.closure)
        ends.append((snapshot(case), [slot.carried for slot in opt.weights], opt.last.losses))
    assert ends[0][2] == ends[1][2]
    assert_same_bits(ends[0][0], ends[1][0])
    for one, other in zip(ends[0][1], ends[1][1], strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
