"""Block-wise probes: which tensors make a block, that nothing else moves, and that their sum is the estimate (C8)."""

import pytest
import torch
from tests.checks import blockwise as checks
from tests.checks.blockwise import sites_named
from tests.checks.engines import make
from tests.checks.mezo import SEED
from tests.checks.rules import check_resumes
from tests.support.bare import estimate_of
from tests.support.models import CASES, assert_same_bits, snapshot

from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.methods.blockwise import Blockwise, blocks_of
from zotune.optim.optimizer import ZO

# ----------------------------------------------------------------------------------------------------------------------
# Blocks


def opt_names(layers):
    inside = [
        *(f"self_attn.{p}_proj.{kind}" for p in ("q", "k", "v", "out") for kind in ("weight", "bias")),
        *(
            f"{m}.{kind}"
            for m in ("self_attn_layer_norm", "fc1", "fc2", "final_layer_norm")
            for kind in ("weight", "bias")
        ),
    ]
    around = ["embed_tokens.weight", "embed_positions.weight", "final_layer_norm.weight", "final_layer_norm.bias"]
    return [
        *(f"model.decoder.{name}" for name in around),
        *(f"model.decoder.layers.{i}.{name}" for i in range(layers) for name in inside),
    ]


def test_opt_13b_has_the_43_blocks_of_the_paper():
    sites = sites_named(*opt_names(40))
    assert len(blocks_of(sites, "layer")) == 43
    assert Blockwise().forwards_for(sites) == 86
    assert Blockwise(level="tensor").forwards_for(sites) == 2 * len(sites)
    assert len(blocks_of(sites, "module")) == 3 + 40 * 5


@pytest.mark.parametrize(
    ("name", "layer", "module"),
    [
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3", "model.layers.3.mlp"),
        ("model.layers.3.self_attn.q_proj.lora_A.weight", "model.layers.3", "model.layers.3.self_attn"),
        ("model.layers.3.input_layernorm.weight", "model.layers.3", "model.layers.3.input_layernorm"),
        ("transformer.h.11.attn.c_attn.bias", "transformer.h.11", "transformer.h.11.attn"),
        ("encoder.layer.0.output.dense.weight", "encoder.layer.0", "encoder.layer.0.output"),
        ("layers.2.experts.7.w1.weight", "layers.2", "layers.2.experts"),
        ("2.weight", "2", "2"),
        ("layers.5.weight", "layers.5", "layers.5"),
        ("model.embed_tokens.weight", "model.embed_tokens", "model.embed_tokens"),
        ("roberta.embeddings.word_embeddings.weight", *["roberta.embeddings.word_embeddings"] * 2),
        ("model.norm.weight", "model.norm", "model.norm"),
        ("lm_head.weight", "lm_head", "lm_head"),
        ("scale", "scale", "scale"),
        ("prompts.0", "prompts", "prompts"),
    ],
)
def test_block_of_a_name(name, layer, module):
    for level, expected in (("layer", layer), ("module", module), ("tensor", name)):
        assert list(blocks_of(sites_named(name), level)) == [expected]


def test_order_of_blocks_counts_numbers_and_does_not_depend_on_the_order_of_tensors():
    names = ["a.layers.10.x", "a.layers.2.y", "lm_head.weight", "a.layers.2.x", "a.embed.weight", "a.layers.10.b"]
    expected = {
        "a.embed": ["a.embed.weight"],
        "a.layers.2": ["a.layers.2.x", "a.layers.2.y"],
        "a.layers.10": ["a.layers.10.b", "a.layers.10.x"],
        "lm_head": ["lm_head.weight"],
    }
    for given in (names, names[::-1], sorted(names)):
        made = blocks_of(sites_named(*given), "layer")
        assert list(made.items()) == list(expected.items())


# ----------------------------------------------------------------------------------------------------------------------
# Probes and estimate


@pytest.mark.parametrize("update", ["together", "each"])
@pytest.mark.parametrize("level", ["layer", "tensor"])
def test_equals_the_readable_twin(update, level):
    checks.check_equals_the_readable_twin(update, level)


@pytest.mark.parametrize("level", ["layer", "module", "tensor"])
def test_other_blocks_are_not_touched(level):
    checks.check_other_blocks_are_not_touched(level)


def test_later_blocks_are_probed_where_earlier_ones_moved():
    checks.check_later_blocks_are_probed_where_earlier_ones_moved()


def test_blocks_share_no_noise():
    checks.check_blocks_share_no_noise()


def test_the_estimate_is_the_sum_of_the_blocks_terms():
    checks.check_the_estimate_is_the_sum_of_the_blocks_terms()


def test_logged_loss():
    checks.check_logged_loss()


def test_moments():
    checks.check_moments(600)


@pytest.mark.statistical
def test_moments_of_many():
    checks.check_moments(20000)


def test_one_block_is_mezo_bit_for_bit():
    ends = []
    for method in ("mezo", "blockwise"):
        torch.manual_seed(0)
        weight, bias = (torch.nn.Parameter(torch.randn(*shape).bfloat16()) for shape in ((5, 4), (4,)))
        named, x = [("layers.0.weight", weight), ("layers.0.bias", bias)], torch.randn(3, 5)
        opt = ZO(named, method, lr=1e-2, eps=1e-1)
        for _ in range(4):
            opt.step(lambda w=weight, b=bias, x=x: (x @ w.float() + b.float()).tanh().square().mean())
        ends.append(dict(named))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_blocks_that_do_not_move_are_probed_alike_either_way():
    """lr 0: "each" asks at the same points as "together", so its losses are the same bits."""
    losses = [checks.probed(update, lr=0.0)[0].last.losses for update in ("together", "each")]
    assert losses[0] == losses[1]


def test_freezing_a_block_leaves_the_others_their_noise():
    torch.manual_seed(0)
    weights = {f"layers.{i}.weight": torch.zeros(3, 4, dtype=torch.float64) for i in range(3)}

    def terms(trained):
        _, estimate, _ = estimate_of(Blockwise(), trained, lambda w: sum(float(v.sum()) for v in w.values()), eps=0.5)
        site = Site("layers.2.weight", (3, 4))
        (own,) = [z for _, z in estimate.direction.terms if z.touches(site)]
        return own.realise(site)

    fewer = {name: value for name, value in weights.items() if name != "layers.0.weight"}
    assert torch.equal(terms(weights), terms(fewer))


@pytest.mark.parametrize("rule", ["sgd", "sign"])
def test_each_resumes(rule):
    check_resumes(rule, "blockwise", torch.bfloat16, method_options={"update": "each"})


@pytest.mark.parametrize("update", ["together", "each"])
def test_engines_agree(update):
    """fp64: products in another order, a few 2**-53, amplified by 1/eps = 128."""
    ends = []
    for engine in ("in_place", "layerwise"):
        torch.manual_seed(0)
        case = CASES["llama"](torch.float64)
        opt = make(case, engine, method="blockwise", method_options={"update": update}, lr=1e-3)
        for _ in range(3):
            opt.step(case.closure)
        ends.append(torch.cat([p.detach().flatten() for _, p in case.named]))
    assert torch.allclose(*ends, rtol=0, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# The method as a type


@pytest.mark.parametrize("options", [{"level": "neuron"}, {"update": "coordinate"}])
def test_options_out_of_range(options):
    with pytest.raises(ConfigError, match="method 'blockwise'"):
        Blockwise(**options)


def test_each_needs_a_rule_that_can_be_tried():
    case = CASES["bare"](torch.float32)
    with pytest.raises(ConfigError, match="cannot be tried"):
        ZO(case.named, "blockwise", rule="adam", method_options={"update": "each"})
    ZO(case.named, "blockwise", rule="adam")
    opt = ZO(case.named, "blockwise", weight_decay=0.1, method_options={"update": "each", "level": "tensor"}, seed=SEED)
    with pytest.raises(ConfigError, match="set it to 0"):
        opt.step(case.closure)


@pytest.mark.filterwarnings("ignore:Step 0 was refused")
@pytest.mark.parametrize("at", [0, 3, 5])
def test_one_loss_that_is_not_finite_refuses_the_step(at):
    case = CASES["mlp"](torch.float32)
    opt = make(case, "in_place", method="blockwise", method_options={"update": "each"}, lr=1e-3)
    before, calls = snapshot(case), []

    def closure():
        calls.append(1)
        loss = case.closure()
        return loss * float("nan") if len(calls) == at + 2 else loss  # the first call is the engine's

    opt.step(closure)
    assert opt.refused == 1
    assert_same_bits(before, snapshot(case))
