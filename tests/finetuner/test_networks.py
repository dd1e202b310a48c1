"""The arrays answer as the modules do (T7)."""

import pytest
import torch
from tests.reference.zo_finetuner import as_module

from zotune.errors import FinetunerError
from zotune.finetuner.networks import Networks, from_flat, untrained

NAMES = [f"layer{i}.weight" for i in range(8)]


def features(count=8):
    """Of the sizes that occur: small means, variances near 0, losses of some units."""
    return torch.randn(count, 5) * torch.tensor([0.05, 0.02, 2.0, 2.0, 1.0])


def modules_answer(networks, x, dtype=torch.float32):
    modules = [as_module(networks, i).to(dtype) for i in range(len(networks.names))]
    with torch.no_grad():
        return torch.stack([m(row.to(dtype)).abs()[0] for m, row in zip(modules, x, strict=True)]).float()


def test_arrays_answer_as_modules():
    """fp32: both round sums of 5 and of 64 products of size below 1, hence 1e-6."""
    networks = untrained(NAMES, 0)
    x = features()
    assert (networks.sigma(x, range(8)) - modules_answer(networks, x)).abs().max() < 1e-6


@pytest.mark.parametrize(("dtype", "unit"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_arrays_answer_as_modules_in_low_precision(dtype, unit):
    """Modules keep sums in fp32 and round each layer's output, as the arrays do: at most one unit of a number below 1."""
    networks = untrained(NAMES, 0)
    x = features()
    ours, theirs = networks.sigma(x, range(8), dtype), modules_answer(networks, x, dtype)
    assert (ours - theirs).abs().max() <= 2 * unit
    assert (ours == theirs).sum() >= 6


def test_answers_do_not_depend_on_company():
    networks = untrained(NAMES, 0)
    x = features()
    together = networks.sigma(x, range(8))
    for i in range(8):
        assert torch.equal(networks.sigma(x[i : i + 1], [i])[0], together[i])


def test_answers_are_never_negative():
    networks = untrained(NAMES, 0)
    assert (networks.sigma(features(), range(8)) >= 0).all()
    flipped = from_flat(NAMES, torch.cat([networks.flat()[:, :384], -networks.flat()[:, 384:]], dim=1).float())
    x = features()
    assert torch.equal(flipped.sigma(x, range(8)), networks.sigma(x, range(8)))


def test_flat_and_back():
    networks = untrained(NAMES, 0)
    again = from_flat(NAMES, networks.flat().float())
    assert all(torch.equal(a, b) for a, b in zip(networks.arrays.values(), again.arrays.values(), strict=True))
    assert networks.digest() == again.digest()
    assert networks.flat().shape == (8, 449)
    assert networks.nbytes == 8 * 449 * 4


def test_digest_sees_names_bits_and_dtype():
    flat = untrained(NAMES, 0).flat().float()
    digests = {from_flat(NAMES, flat).digest(), from_flat(NAMES[::-1], flat).digest()}
    digests.add(from_flat(NAMES, flat.half()).digest())
    other = flat.clone()
    other[3, 17] = torch.nextafter(other[3, 17], torch.tensor(1.0))
    digests.add(from_flat(NAMES, other).digest())
    assert len(digests) == 4


def test_what_cannot_be_networks():
    good = untrained(NAMES, 0)
    with pytest.raises(FinetunerError, match="several for layer0"):
        Networks(("layer0.weight",) * 8, *good.arrays.values())
    with pytest.raises(FinetunerError, match="b1 of 8 networks must be"):
        Networks(good.names, good.w1, good.b1[:, :3], good.w2, good.b2)
    with pytest.raises(FinetunerError, match="w2 of 8 networks must be"):
        Networks(good.names, good.w1, good.b1, good.w2.half(), good.b2)
    broken = good.b2.clone()
    broken[5] = float("nan")
    with pytest.raises(FinetunerError, match=r"those for layer5\.weight do not"):
        Networks(good.names, good.w1, good.b1, good.w2, broken)
