"""Modes under zotune's engines, scorer and ledger, and what they leave in a folder."""

import math

import pytest
import torch
import transformers

import zotune
from zotune.core.ledger import Ledger, read_ledger, weights_hash
from zotune.core.site import canonical_name
from zotune.optim.replaying import replay
from zotune.tasks.encoding import Encoded
from zotune.tasks.scoring import OptionScorer
from zotune.tuning import MODES, describe_mode, make_mode, mode_of
from zotune.tuning.full import kind_of

from .conftest import refused_by_oldest

IDS = torch.tensor([[5, 6, 7, 8], [9, 3, 1, 4]])
BATCH = [Encoded([5, 6, 7], ([9], [11]), 0), Encoded([8, 3], ([9], [11]), 1), Encoded([4, 4, 2, 1], ([9], [11]), 1)]
RAGGED = [Encoded([5, 6, 7], ([9, 2], [11]), 0), Encoded([8, 3], ([9], [11, 5, 1]), 1)]


def attached(make_model, mode, name="llama_tied", dtype=torch.float64):
    """A model in a mode; what is trained is moved off its start, where LoRA does nothing."""
    model = make_mode(mode).attach(make_model(name, dtype), 0)
    if dtype == torch.float64:
        model = model.double()
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
            parameter.add_(0.05 * noise)
    return model


def named(model):
    return [(canonical_name(name), p) for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("batch", [BATCH, RAGGED], ids=["single", "ragged"])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
@pytest.mark.parametrize("mode", list(MODES))
def test_engines_agree_through_the_scorer(make_model, mode, name, batch):
    answers = {}
    for engine in ("layerwise", "in_place"):
        model = attached(make_model, mode, name)
        scorer = OptionScorer(model)
        opt = zotune.ZO(named(model), lr=1e-3, eps=1e-3, engine=engine)
        losses = []
        for _ in range(3):
            opt.step(lambda scorer=scorer: scorer.loss(batch))
            losses += opt.last.losses
        answers[engine] = torch.tensor(losses, dtype=torch.float64)
    # fp64 sums in the same order but for modules done in pieces: a few units of 2e-16 times logits of some tens
    torch.testing.assert_close(answers["layerwise"], answers["in_place"], rtol=0, atol=1e-11)
    assert len(set(answers["layerwise"].tolist())) == 6, "the perturbation does not reach the loss"


@pytest.mark.parametrize("mode", list(MODES))
def test_the_slope_is_the_gradients(make_model, mode):
    """The difference along z against autograd: the probe reaches every number that the mode trains, and no other."""
    model = attached(make_model, mode, "gpt2")  # Llama's norms compute in fp32 also in an fp64 model
    scorer = OptionScorer(model)
    parameters = [p for _, p in named(model)]
    opt = zotune.ZO(named(model), lr=1.0, eps=1e-5)
    before = [p.detach().clone() for p in parameters]
    gradient = torch.autograd.grad(scorer.loss(BATCH), parameters)
    opt.step(lambda: scorer.loss(BATCH))
    plus, minus = opt.last.losses
    rho = (plus - minus) / 2e-5
    # with lr 1 the update is rho z, so the gradient along it is rho (z . g) and its square root is |rho| at eps -> 0
    moved = sum(float(((b - p.detach()) * g).sum()) for b, p, g in zip(before, parameters, gradient, strict=True))
    # central differences of a smooth loss: eps^2 = 1e-10 times third derivatives of some thousands; fp64 losses near 1
    # divided by 2e-5 add 1e-11
    assert moved == pytest.approx(rho**2, rel=1e-5)


@pytest.mark.parametrize("mode", ["prefix", "prompt", "lora"])
def test_which_engine_reaches_adapters(make_model, mode):
    model = attached(make_model, mode)
    scorer = OptionScorer(model)
    opt = zotune.ZO(named(model), lr=0.0, eps=1e-3)
    opt.step(lambda: scorer.loss(BATCH))
    assert "perturbed in place" not in opt.engine.reason
    assert "not seen to be read" not in opt.engine.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", list(MODES))
def test_a_ledgers_header_is_enough_to_attach_again_and_replay(make_model, mode, dtype, tmp_path):
    made, seed = make_mode(mode), 7
    model = made.attach(make_model("llama_tied", dtype), seed)
    scorer = OptionScorer(model)
    start = weights_hash(named(model))
    opt = zotune.ZO(named(model), lr=1e-2, eps=1e-2, ledger=Ledger(tmp_path / "l", {"mode": describe_mode(made, seed)}))
    for _ in range(4):
        opt.step(lambda: scorer.loss(BATCH))
    ledger = read_ledger(tmp_path / "l")
    torch.manual_seed(99)
    again, seed = mode_of(ledger.header["base"]["mode"])
    rebuilt = again.attach(make_model("llama_tied", dtype), seed)
    assert weights_hash(named(rebuilt)) == start
    fresh = zotune.ZO(named(rebuilt), lr=1e-2, eps=1e-2)
    replay(fresh, ledger.entries)
    assert weights_hash(named(rebuilt)) == weights_hash(named(model)) != start


# plain PEFT asks transformers for an attribute by its old name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "gpt2", "opt", "gemma2"])
@pytest.mark.parametrize("mode", ["lora", "prefix", "prompt"])
@torch.no_grad()
def test_adapters_are_saved_in_the_standard_folder(make_model, mode, name, tmp_path):
    import peft

    if refused_by_oldest(name, mode):
        pytest.skip("zotune refuses this prefix with these versions")
    model = attached(make_model, mode, name, torch.float32)
    expected = model(input_ids=IDS, use_cache=False).logits
    model.save_pretrained(tmp_path)
    files = {path.name for path in tmp_path.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files
    assert not any("model-" in file or file == "model.safetensors" for file in files)
    loaded = peft.PeftModel.from_pretrained(make_model(name), tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS, use_cache=False).logits, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "opt", "roberta"])
@pytest.mark.parametrize("mode", ["head", "norm_bias"])
@torch.no_grad()
def test_parts_are_saved_as_a_whole_model(make_model, mode, name, dtype, tmp_path):
    model = attached(make_model, mode, name, dtype)
    expected = model(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    kind = transformers.AutoModelForMaskedLM if name == "roberta" else transformers.AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path, dtype="auto").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    assert not torch.equal(make_model(name, dtype)(input_ids=IDS).logits, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Groups with their own eps


def test_no_mode_makes_groups_unasked(make_model):
    for mode in MODES:
        model = make_mode(mode).attach(make_model("gpt2"), 0)
        assert make_mode(mode).groups(named(model)) is None


def test_groups_follow_the_scales_of_the_start(make_model):
    model = make_model("gpt2")
    groups = make_mode("full", {"eps_by_scale": True}).groups(named(model), eps=1e-3)
    assert [kind_of(*group["params"][0]) for group in groups] == ["matrix", "norm", "bias"]

    def rms(group):
        flat = torch.cat([tensor.detach().double().view(-1) for _, tensor in group["params"]])
        return math.sqrt(float(flat.square().mean()))

    assert groups[0]["eps"] == 1e-3
    for group in groups[1:]:  # three digits are kept
        assert group["eps"] == pytest.approx(1e-3 * rms(group) / rms(groups[0]), rel=5e-3)
    assert sorted(name for group in groups for name, _ in group["params"]) == sorted(name for name, _ in named(model))


def test_groups_scale_the_probe_and_the_update(make_model):
    """The direction of a group is multiplied by its eps over the first group's; so the update is, by that again."""
    mode = make_mode("full", {"eps_by_scale": True})
    moves = []
    for grouped in (True, False):
        model = make_model("gpt2", torch.float64)
        before = {name: p.detach().clone() for name, p in named(model)}
        opt = zotune.ZO(mode.groups(named(model), 1e-3) if grouped else named(model), lr=1.0, eps=1e-3)
        scorer = OptionScorer(model)
        opt.step(lambda scorer=scorer: scorer.loss(BATCH))
        plus, minus = opt.last.losses
        rho = (plus - minus) / 2e-3
        moves.append({name: (before[name] - p.detach()) / rho for name, p in named(model)})
        factors = {name: group["eps"] / 1e-3 for group in opt.param_groups for name in group["param_names"]}
        if grouped:
            expected = factors
    for name, move in moves[0].items():
        # both are z up to fp64 rounding of w - (w - rho z), relative to weights near 1 and slopes of 0.01 or more
        torch.testing.assert_close(move, expected[name] * moves[1][name], rtol=1e-9, atol=1e-11)
    assert len(set(expected.values())) == 3


def test_a_kind_that_is_all_zeros_keeps_the_eps_of_the_matrices(make_model):
    model = make_model("gpt2")
    with torch.no_grad():
        for name, p in named(model):
            if name.endswith("bias"):
                p.zero_()
    groups = make_mode("full", {"eps_by_scale": True}).groups(named(model), eps=1e-3)
    assert groups[2]["eps"] == 1e-3
