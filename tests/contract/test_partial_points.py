"""Points that move only some tensors (blocks, sparse choices): the others must not be taken for leaks.

The layerwise engine looks for tensors that are read outside their module with the first point it gets. Were a tensor that this
point leaves alone left out of the swap, its own module would read the stored memory, and it would be perturbed in place, at
the cost of a copy, for the rest of the run.
"""

import pytest
import torch
from tests.checks.engines import make
from tests.support.models import CASES, assert_same_bits, snapshot

from zotune.core.direction import HERE, Combination, Noise, Scaled, Stored
from zotune.core.noise import stream
from zotune.core.site import canonical_name
from zotune.engines import ENGINES

HOOKED = ["mlp", "dropout_mlp", "weight_giver", "shared", "lstm", "weight_norm", "llama", "gpt2", "lora"]
LEAKS = {
    "attention": {"attention.out_proj.weight", "attention.out_proj.bias"},
    "bare": {"a", "b"},
    "leaky": {"2.weight"},
    "penalty": {"2.weight"},
}
Z = 2.0**-7 * Noise(stream(3, "partial"))


def only(*names):
    """A point that moves the named tensors alone."""
    return Scaled(Z, dict.fromkeys(names, 1.0), otherwise=0.0)


def names_of(case):
    return [canonical_name(name) for name, _ in case.named]


def asked(case, engine, points):
    """The losses of several waves of one point each, and the engine."""
    opt = make(case, engine)
    with torch.no_grad():
        return [opt.engine.losses([point], case.closure, 5).item() for point in points], opt.engine


@pytest.mark.parametrize("name", HOOKED)
@pytest.mark.parametrize("first", [0, -1])
def test_a_first_point_on_one_tensor_makes_no_leaks(name, first):
    case = CASES[name](torch.float32)
    _, engine = asked(case, "layerwise", [only(names_of(case)[first])])
    assert engine.direct == set()
    assert "read outside their module" not in engine.reason


@pytest.mark.parametrize("name", LEAKS)
@pytest.mark.parametrize("first", [0, -1])
def test_leaks_are_found_by_a_point_that_does_not_move_them(name, first):
    case = CASES[name](torch.float32)
    _, engine = asked(case, "layerwise", [only(names_of(case)[first])])
    assert engine.direct == LEAKS[name]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_later_points_on_other_tensors_give_the_losses_of_in_place(name, dtype):
    """One tensor after the other, then all, then none. Equal bits; where kernels are chosen by address or stride, 8 ulp."""
    answers = {}
    for engine in ENGINES:
        torch.manual_seed(0)
        case = CASES[name](dtype)
        before = snapshot(case)
        points = [*(only(one) for one in names_of(case)), Z, HERE]
        answers[engine], _ = asked(case, engine, points)
        assert_same_bits(before, snapshot(case))
    assert len(set(answers["in_place"])) > len(answers["in_place"]) / 2, (
        "most points changed nothing: nothing was compared"
    )
    if "mlp" in name or name == "attention":
        assert answers["layerwise"] == pytest.approx(answers["in_place"], rel=8 * torch.finfo(dtype).eps)
    else:
        assert answers["layerwise"] == answers["in_place"]


@pytest.mark.parametrize("name", ["shared", "llama"])
def test_other_kinds_of_partial_points(name):
    """Stored directions and combinations that touch one tensor each, as masks and policies make them."""
    case = CASES[name](torch.float32)
    first, last = names_of(case)[0], names_of(case)[-1]
    tensors = {canonical_name(n): torch.full(p.shape, 0.01) for n, p in case.named}
    points = [
        Stored({first: tensors[first]}),
        0.5 * Stored({last: tensors[last]}) + only(first),
        Combination(((1.0, only(last)), (-1.0, only(last)))),  # touches a tensor and moves nothing
    ]
    of_layerwise, engine = asked(case, "layerwise", points)
    of_in_place, _ = asked(case, "in_place", points)
    assert of_layerwise == of_in_place
    assert engine.direct == set()


def test_unmoved_tensors_are_not_written_and_not_swapped():
    """What a point leaves alone is read where it is stored: no scratch is made for it."""
    case = CASES["shared"](torch.float32)
    name = names_of(case)[0]
    opt, seen = make(case, "layerwise"), []
    stored = dict(case.module.block.named_parameters())
    case.module.block.register_forward_pre_hook(
        lambda module, args: seen.append({a: p is stored[a] for a, p in module._parameters.items()})
    )
    with torch.no_grad():
        opt.engine.losses([only(name)], case.closure, 5)
        seen.clear()
        opt.engine.losses([only(name)], case.closure, 5)
    assert name == "block.weight"
    assert seen == [{"weight": False, "bias": True}] * 2  # the module runs twice in a forward


def test_slopes_along_partial_directions_add_up():
    """The slope along a sum of blocks is the sum of their slopes; fp64: a few 2**-53 of the terms."""
    case = CASES["shared"](torch.float64)
    opt = make(case, "layerwise", method="forward_grad")
    with torch.no_grad():
        parts = [opt.engine.slope(only(name), case.closure, 5)[1] for name in names_of(case)]
        _, whole = opt.engine.slope(Z, case.closure, 5)
    assert opt.engine.direct == set()
    assert all(part != 0.0 for part in parts)
    assert whole == pytest.approx(sum(parts), rel=1e-12)
