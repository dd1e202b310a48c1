"""The ZO Fine-tuner's downstream step is the one of its paper and code (T1 to T4, T8, T9, T11 of its specification)."""

import math
import warnings

import pytest
import torch
from tests.checks.zo_finetuner import (
    SEED,
    check_equal_scales_are_mezo,
    check_equals_the_readable_twin,
    check_features_in_order,
    check_first_features,
    check_mean_of_estimates,
    check_networks_belong_to_names,
    check_normaliser,
    check_refused_steps_are_forgotten,
    check_remembers_sigma_without_nf,
    check_weights_asked_at,
    equal_networks,
    loss_of,
    of,
    weights_of,
)
from tests.support.bare import bare_context, estimate_of, sites_of
from tests.support.models import CASES, assert_same_bits, snapshot
from torch import nn

from zotune.core.ledger import read_ledger
from zotune.core.site import Site
from zotune.errors import ConfigError, FinetunerError
from zotune.finetuner.folder import save_folder
from zotune.finetuner.networks import Networks, untrained
from zotune.methods.zo_finetuner import ZOFineTuner
from zotune.optim.optimizer import ZO
from zotune.optim.replaying import optimizer_for, replay

NAMES = list(weights_of())


@pytest.mark.parametrize("options", [{}, {"batch": 2, "world_size": 3}, {"normalise": False}])
def test_equals_the_readable_twin(options):
    check_equals_the_readable_twin(**options)


@pytest.mark.parametrize("sigma", [1.0, 0.25, 64.0])
def test_equal_scales_that_are_powers_of_two_are_mezo_bit_for_bit(sigma):
    check_equal_scales_are_mezo(sigma)


@pytest.mark.parametrize("sigma", [0.3, 1e-3, -7.7])
def test_equal_scales_are_mezo_to_rounding(sigma):
    check_equal_scales_are_mezo(sigma, exact=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_networks_are_mezo_bit_for_bit(dtype):
    weights = []
    for method, options in (("mezo", {}), ("zo_finetuner", {"networks": "constant"})):
        torch.manual_seed(0)
        case = CASES["llama"](dtype)
        opt = ZO(case.named, method, lr=1e-2, eps=1e-2, method_options=options)
        for _ in range(5):
            opt.step(case.closure)
        weights.append(snapshot(case))
    assert_same_bits(*weights)


@pytest.mark.parametrize("k", [4.0, 3.0])
def test_scale_of_the_last_layer_changes_nothing_in_the_first_step_alone(k):
    """T2: nf sigma is the same, exactly for a power of two; later the fed-back sigma is k times as large."""
    weights = weights_of()
    networks = untrained(NAMES, 5)
    scaled = Networks(networks.names, networks.w1, networks.b1, k * networks.w2, k * networks.b2)
    one, other = of(networks), of(scaled)
    (g1, _, _), (g2, _, _) = (estimate_of(method, weights, loss_of, seed=SEED) for method in (one, other))
    if k == 4.0:
        assert torch.equal(g1, g2)
    else:  # 3 w2 and the answer are rounded to fp32: 2**-24 of each of 64 terms, against a sum that may cancel
        assert torch.allclose(g1, g2, rtol=1e-4, atol=1e-6 * float(g1.abs().max()))
    (g1, _, _), (g2, _, _) = (estimate_of(method, weights, loss_of, seed=SEED, step=1) for method in (one, other))
    assert not torch.allclose(g1, g2, rtol=1e-2)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (16, 1)])
def test_normaliser_keeps_the_size(sizes):
    check_normaliser(*sizes)


def test_normaliser_sees_batch_and_world_size_through_the_embedding_alone():
    weights = weights_of()
    networks = untrained(NAMES, 5)

    def nf(drop=(), **options):
        kept = {name: value for name, value in weights.items() if name not in drop}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return of(networks, **options).factors(bare_context(kept, loss_of))[1]

    assert nf(batch=8) != nf(batch=16)
    assert nf(batch=8, world_size=2) == nf(batch=16)
    embedding = ("embed_tokens.weight",)
    assert nf(embedding, batch=8) == nf(embedding, batch=16)


def test_mean_of_estimates_is_the_preconditioned_gradient():
    check_mean_of_estimates()


@pytest.mark.statistical
def test_mean_of_many_estimates_is_the_preconditioned_gradient():
    check_mean_of_estimates(count=5000)


def test_features_are_in_order():
    check_features_in_order()


def test_first_step_is_asked_with_zeros_and_one():
    check_first_features()


def test_what_is_fed_back_has_no_nf():
    check_remembers_sigma_without_nf()


def test_probes_are_one_direction_of_the_unperturbed_weights():
    check_weights_asked_at()


def test_refused_steps_leave_no_trace():
    check_refused_steps_are_forgotten()


def test_networks_go_with_names_not_shapes():
    check_networks_belong_to_names()


@pytest.mark.parametrize("engine", ["in_place", "layerwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_restored_exactly(engine, dtype):
    """T9: with lr 0 no bit of any weight changes."""
    case = CASES["mlp"](dtype)
    before = snapshot(case)
    options = {"networks": "untrained"}
    opt = ZO(case.named, "zo_finetuner", lr=0.0, eps=1e-2, engine=engine, method_options=options)
    for _ in range(4):
        opt.step(case.closure)
    assert_same_bits(before, snapshot(case))


def test_moments_are_of_the_weights_that_the_optimizer_keeps_not_of_their_storage():
    """bf16 weights with carried bits: the features are those of the fp32 sum."""
    case = CASES["mlp"](torch.bfloat16)
    opt = ZO(case.named, "zo_finetuner", lr=1e-3, eps=1e-2, method_options={"networks": "untrained"})
    seen = []
    right = opt.method.factors
    opt.method.factors = lambda ctx: seen.append({s.name: ctx.weight(s) for s in ctx.sites}) or right(ctx)
    for _ in range(2):
        opt.step(case.closure)
    stored = dict(case.named)
    assert all(value.dtype == torch.float32 for value in seen[1].values())
    assert any(not torch.equal(value, value.bfloat16().float()) for value in seen[1].values())
    assert set(seen[1]) == set(stored)


# ----------------------------------------------------------------------------------------------------------------------
# Controls, gaps, guards


def test_untrained_networks_depend_on_name_and_seed_alone():
    one, other = untrained(NAMES, 7), untrained(NAMES[::-1], 7)
    assert torch.equal(one.flat(), other.flat().flip(0))
    assert not torch.equal(one.flat(), untrained(NAMES, 8).flat())
    assert len(set(one.b2.tolist())) == len(NAMES)


def test_untrained_networks_have_the_moments_of_torch_linear():
    """449 * 200 uniform numbers: a mean of 0 and a variance of bound^2 / 3 within 5 standard errors, none outside."""
    networks = untrained([f"tensor{i}" for i in range(200)], 0)
    for array, fan in ((networks.w1, 5), (networks.b1, 5), (networks.w2, 64), (networks.b2, 64)):
        values, bound = array.double().flatten(), fan**-0.5
        assert float(values.abs().max()) <= bound
        n = values.numel()
        assert abs(float(values.mean())) < 5 * bound / math.sqrt(3 * n)
        assert abs(float(values.square().mean()) - bound**2 / 3) < 5 * bound**2 * math.sqrt(4 / 45 / n)


def test_shuffled_networks_are_the_same_networks_elsewhere():
    weights = weights_of()
    networks = untrained(NAMES, 5)

    def index(seed, names=NAMES):
        method = of(networks, shuffle=seed)
        method.factors(bare_context({name: weights[name] for name in names}, loss_of))
        return dict(zip(method._names, method._index, strict=True))

    dealt = index(1)
    assert sorted(dealt.values()) == list(range(len(NAMES)))
    assert list(dealt.values()) != list(range(len(NAMES)))
    assert dealt == index(1, NAMES[::-1])
    assert dealt != index(2)


def test_tensor_without_network_is_an_error():
    """T11."""
    weights = weights_of()
    method = of(untrained(NAMES[:-2], 5))
    with pytest.raises(ConfigError, match=r"no network for 2 of 7 trained tensors: twin_b\.weight, head\.weight"):
        method.factors(bare_context(weights, loss_of))


def test_missing_networks_on_request_are_mezo_on_their_tensors():
    """sigma = rms of the others with nf's own weights, so nf sigma = 1 (to two roundings) and nf is as without them."""
    weights = weights_of()
    factors, nf = of(untrained(NAMES[:-2], 5), missing="rms").factors(bare_context(weights, loss_of))
    for name in NAMES[-2:]:
        assert factors[name] == pytest.approx(1.0, rel=1e-6)  # sigma is kept in fp32
    known = {name: weights[name] for name in NAMES[:-2]}
    alone, nf_alone = of(untrained(NAMES[:-2], 5)).factors(bare_context(known, loss_of))
    assert nf == pytest.approx(nf_alone, rel=1e-12)
    assert all(factors[name] == pytest.approx(alone[name], rel=1e-12) for name in known)


def test_no_network_at_all_is_an_error_even_with_rms():
    method = of(untrained(["other.weight"], 5), missing="rms")
    with pytest.raises(ConfigError, match="networks='untrained' needs none"):
        method.factors(bare_context(weights_of(), loss_of))


def test_adapters_have_no_networks():
    case = CASES["lora"](torch.float32)
    base = [name for name, _ in CASES["llama"](torch.float32).module.named_parameters()]
    opt = ZO(case.named, of(untrained(base, 0), missing="rms"), lr=0.0)
    with pytest.raises(ConfigError, match="adapters"):
        opt.step(case.closure)


def test_wrapped_names_find_their_networks():
    weights = weights_of()
    named = [(f"module._orig_mod.{name}", nn.Parameter(value)) for name, value in weights.items()]
    opt = ZO(named, of(untrained(NAMES, 5)), lr=0.0)
    opt.step(lambda: loss_of(weights))
    assert opt.method._names == NAMES


def test_networks_that_answer_zero_are_refused():
    with pytest.raises(ConfigError, match="Every network answers 0"):
        of(equal_networks(NAMES, 0.0)).factors(bare_context(weights_of(), loss_of))


def test_some_networks_that_answer_zero_freeze_their_tensors():
    networks = untrained(NAMES, 5)
    networks.w2[1], networks.b2[1] = 0.0, 0.0
    _, estimate, _ = estimate_of(of(networks), weights_of(), loss_of, seed=SEED)
    ((_, v),) = estimate.direction.terms
    assert not v.touches(Site(NAMES[1], (5, 6)))
    assert v.touches(Site(NAMES[2], (5,)))


def test_weights_that_are_not_finite_are_named():
    weights = weights_of()
    weights["inner.bias"][2] = math.inf
    with pytest.raises(ConfigError, match=r"'inner\.bias'"):
        of(untrained(NAMES, 5)).factors(bare_context(weights, loss_of))


def test_only_tensors_of_three_dimensions_have_no_scale():
    weights = {"conv.weight": torch.randn(2, 3, 4)}
    with pytest.raises(ConfigError, match="vectors and matrices"):
        of(untrained(["conv.weight"], 0)).factors(bare_context(weights, loss_of))


# ----------------------------------------------------------------------------------------------------------------------
# The method as a type


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"networks": "random"}, "networks must be one of folder, untrained, constant"),
        ({"missing": "skip"}, "missing must be one of error, rms"),
        ({"dtype": "fp64"}, "dtype must be one of fp32, bf16, fp16"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"world_size": 0}, "world_size must be at least 1"),
        ({"networks": "constant", "shuffle": 1}, "shuffle must be left out"),
        ({"networks": "untrained", "finetuner": "folder"}, "finetuner must be left out"),
        ({"networks": "untrained", "digest": "0"}, "digest must be left out"),
    ],
)
def test_options_out_of_range(options, match):
    with pytest.raises(ConfigError, match=match):
        ZOFineTuner(**options)


def test_without_networks_the_first_step_says_what_to_do():
    case = CASES["bare"](torch.float32)
    opt = ZO(case.named, "zo_finetuner")
    with pytest.raises(ConfigError, match="give finetuner=FOLDER"):
        opt.step(case.closure)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_networks_in_another_dtype(dtype):
    """They answer numbers of that dtype, near those of fp32 (a few roundings of 2**-8 or 2**-11 each)."""
    ctx = bare_context(weights_of(), loss_of)
    networks = untrained(NAMES, 5)
    exact, low = of(networks), of(networks, dtype=dtype)
    (_, nf), (_, nf_low) = exact.factors(ctx), low.factors(ctx)
    kept = low._asked
    assert torch.equal(kept, kept.to(getattr(torch, {"bf16": "bfloat16", "fp16": "float16"}[dtype])).float())
    assert torch.allclose(kept, exact._asked, atol=0.02)
    assert nf != nf_low


def test_declared_costs(tmp_path):
    """extra_bytes is what the tensors that the method keeps weigh; nothing for the control that is MeZO."""
    folder = tmp_path / "networks"
    save_folder(folder, untrained(NAMES, 5), {})
    for options in ({"networks": "untrained"}, {"networks": "constant"}, {"finetuner": str(folder)}):
        method = ZOFineTuner(**options)
        estimate_of(method, weights_of(), loss_of)
        held = [*method._loaded.arrays.values()] if method._loaded is not None else []
        kept = [value for value in vars(method).values() if isinstance(value, torch.Tensor)]
        assert sum(tensor.nbytes for tensor in held + kept) == method.extra_bytes(sites_of(weights_of()))
        assert method.forwards == 2


def run_to(steps, folder, ledger=None, state=None, start=None):
    named = [(name, nn.Parameter(value)) for name, value in (start or weights_of()).items()]
    options = {"finetuner": str(folder)}
    opt = ZO(named, "zo_finetuner", lr=0.02, eps=1e-2, seed=SEED, method_options=options, ledger=ledger)
    if state is not None:
        opt.load_state_dict(state)
    while opt.step_number < steps:
        opt.step(lambda: loss_of(dict(named)))
    return opt, {name: p.detach().clone() for name, p in named}


@pytest.fixture
def folder(tmp_path):
    save_folder(tmp_path / "finetuner", untrained(NAMES, 5), {})
    return tmp_path / "finetuner"


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resumed_run_is_the_uninterrupted_one(folder, tmp_path, stop):
    _, whole = run_to(6, folder)
    opt, half = run_to(stop, folder)
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    _, again = run_to(6, folder, state=torch.load(tmp_path / "state.pt", weights_only=True), start=half)
    assert all(torch.equal(whole[name], again[name]) for name in NAMES)


def test_loaded_state_is_a_copy_and_belongs_to_its_tensors(folder):
    opt, _ = run_to(2, folder)
    state = opt.method.state_dict()
    other = ZOFineTuner(finetuner=str(folder))
    other.load_state_dict(state)
    kept = state["sigma"].clone()
    estimate_of(other, weights_of(), loss_of)
    assert torch.equal(state["sigma"], kept)
    other.load_state_dict(state)
    state["sigma"].zero_()
    assert torch.equal(other.state_dict()["sigma"], kept)
    with pytest.raises(ConfigError, match="7 other tensors"):
        other.factors(bare_context({"inner.weight": torch.randn(5, 6)}, loss_of))


def test_state_is_found_by_name_whatever_the_order(folder):
    opt, weights = run_to(2, folder)
    one, other = ZOFineTuner(finetuner=str(folder)), ZOFineTuner(finetuner=str(folder))
    one.load_state_dict(opt.method.state_dict())
    other.load_state_dict(opt.method.state_dict())
    forth, _ = one.factors(bare_context(weights, loss_of))
    back, _ = other.factors(bare_context(dict(reversed(weights.items())), loss_of))
    assert forth == back


def test_replay_rebuilds_the_weights_bit_for_bit(folder, tmp_path):
    _, trained = run_to(6, folder, ledger=tmp_path / "ledger.jsonl")
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    named = [(name, nn.Parameter(value)) for name, value in weights_of().items()]
    replay(optimizer_for(named, ledger), ledger.entries)
    assert all(torch.equal(p.detach(), trained[name]) for name, p in named)


def test_replay_with_other_networks_is_refused(folder, tmp_path):
    run_to(2, folder, ledger=tmp_path / "ledger.jsonl")
    ledger = read_ledger(tmp_path / "ledger.jsonl")
    folder.rename(tmp_path / "elsewhere")
    named = [(name, nn.Parameter(value)) for name, value in weights_of().items()]
    with pytest.raises(FinetunerError, match="holds no fine-tuner"):
        optimizer_for(named, ledger)
    save_folder(folder, untrained(NAMES, 6), {})
    with pytest.raises(ConfigError, match="made anew or replaced"):
        optimizer_for(named, ledger)


def test_digest_of_the_networks_is_in_the_header(folder):
    method = ZOFineTuner(finetuner=str(folder))
    assert method.digest == untrained(NAMES, 5).digest()
    assert ZOFineTuner(finetuner=str(folder), digest=method.digest).digest == method.digest
