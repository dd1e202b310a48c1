"""Slopes by forward-mode differentiation: right on every model, without a trace, and refused where they would be wrong."""

import warnings

import pytest
import torch
from tests.checks.engines import Interrupted, fabric, make, steps
from tests.checks.forward_grad import (
    check_equals_backprop,
    check_no_trace,
    check_same_masks_as_a_query,
    kernel_flags,
    slope_and_truth,
    tangents_left,
)
from tests.support.memory import peak_bytes
from tests.support.models import CASES, Case, assert_same_bits, of_language_model, of_module, snapshot
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from zotune.core.direction import Noise, Scaled
from zotune.core.noise import stream
from zotune.engines import ENGINES
from zotune.errors import ClosureError, EngineError
from zotune.optim.optimizer import ZO

FP64, FP32, BF16 = torch.float64, torch.float32, torch.bfloat16
NO_FORWARD_MODE = {"weight_norm": "_weight_norm_interface", "lstm": "mkldnn_rnn_layer"}
engines = pytest.mark.parametrize("engine", ENGINES)
models = pytest.mark.parametrize("name", [name for name in CASES if name not in NO_FORWARD_MODE])


@pytest.fixture
def small_pieces(monkeypatch):
    """As in test_engines: Linear layers of 32 numbers and more are cut into pieces."""
    monkeypatch.setattr("zotune.engines.forms.MIN_NUMEL", 32)
    monkeypatch.setattr("zotune.engines.swapping.MIN_NUMEL", 32)


def z_of(name="t"):
    return Noise(stream(0, name))


# ----------------------------------------------------------------------------------------------------------------------
# Right


@models
@engines
@pytest.mark.parametrize(("dtype", "rel"), [(FP64, 1e-10), (FP32, 1e-5)], ids=["fp64", "fp32"])
def test_equals_backprop(name, engine, dtype, rel):
    """C6's bounds. Cases that compute their loss in fp32 whatever the weights are held to fp32's."""
    wide = name in ("mlp", "dropout_mlp", "weight_giver", "shared", "attention")
    check_equals_backprop(name, engine, dtype, rel if wide else 1e-5)


@models
@engines
def test_bf16_is_as_right_as_bf16_back_propagation(name, engine):
    """Tangents and activations are rounded to 8 bits, 2**-9 each; through a few layers a few per cent of |grad|."""
    check_equals_backprop(name, engine, BF16, 0.15)


def test_lstm_in_fp64_where_no_fused_kernel_is():
    check_equals_backprop("lstm", "layerwise", FP64, 1e-10)
    check_equals_backprop("lstm", "in_place", FP64, 1e-10)


@models
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_engines_give_the_same_numbers(name, dtype):
    """The same kernels on the same numbers: equal bits. Where a kernel is chosen by address or stride: 64 ulp."""
    answers = []
    for engine in ENGINES:
        torch.manual_seed(0)
        case = CASES[name](dtype)
        opt = make(case, engine, method="forward_grad")
        opt.step(case.closure)
        answers.append(opt.last.losses)
    if name in ("mlp", "dropout_mlp", "attention"):
        assert answers[0] == pytest.approx(answers[1], rel=64 * torch.finfo(dtype).eps)
    else:
        assert answers[0] == answers[1]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
@engines
def test_attention_of_transformers(kind, attention, engine):
    slope, truth, size, _ = slope_and_truth(language_model(kind, attention), engine)
    assert abs(slope - truth) < 1e-5 * size  # C6's bound in fp32


def language_model(kind, attention):
    import transformers

    small = {"num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16}
    made = {
        "llama": ("Llama", {**small, "vocab_size": 67, "intermediate_size": 24, "num_key_value_heads": 1}),
        "gpt2": ("GPT2", {"vocab_size": 67, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}),
        "opt": ("OPT", {**small, "vocab_size": 67, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32}),
    }  # fmt: skip
    prefix, sizes = made[kind]
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    config = getattr(transformers, f"{prefix}Config")(**sizes, **ids, use_cache=False, initializer_range=0.3)
    config._attn_implementation = attention
    model = getattr(transformers, "GPT2LMHeadModel" if kind == "gpt2" else f"{prefix}ForCausalLM")(config)
    return of_language_model(model.train(), FP32, 67)


@engines
def test_a_tied_weight_counts_in_all_its_places(engine):
    """f = |W (W x)|^2 in two modules with one Parameter: the derivative is the sum over both, not one of them."""
    torch.manual_seed(1)
    first, second = nn.Linear(5, 5, bias=False).double(), nn.Linear(5, 5, bias=False).double()
    second.weight = first.weight
    case = of_module(nn.Sequential(first, second), lambda m: m(torch.ones(1, 5, dtype=FP64)), FP64)
    slope, truth, size, _ = slope_and_truth(case, engine)
    assert abs(slope - truth) < 1e-12 * size
    w, z = first.weight.detach(), z_along(case, engine)
    ones = torch.ones(5, dtype=FP64)
    one_place = float((w @ w @ ones) @ (z @ w @ ones)) * 2 / 5
    assert abs(slope - one_place) > 1e-3 * size


def z_along(case, engine):
    opt = make(case, engine, method="forward_grad")
    opt.step(case.closure)
    ((_, z),) = opt.last.estimate.direction.terms
    return z.realise(next(iter(opt.weights)).site, FP64)


@pytest.mark.parametrize("name", ["llama", "shared", "weight_giver", "lora"])
def test_pieces(name, small_pieces):
    """Embedding rows and slices of Linear layers are dual tensors as well; sums in another order: 1e-5 of fp32."""
    case = CASES[name](FP32)
    slope, truth, size, opt = slope_and_truth(case, "layerwise")
    assert len(opt.engine._forms) > 0
    assert abs(slope - truth) < 1e-5 * size


def test_tensors_that_lie_in_one_storage():
    both, x = torch.randn(2, 6), torch.randn(6)
    case = Case([("a", nn.Parameter(both[0])), ("b", nn.Parameter(both[1]))], None)
    case.closure = lambda: (case.named[0][1] * x + case.named[1][1].tanh()).square().sum()
    slope, truth, size, _ = slope_and_truth(case, "layerwise")
    assert abs(slope - truth) < 1e-5 * size  # C6's bound in fp32


@engines
@pytest.mark.parametrize("outside", [True, False])
def test_autocast(engine, outside):
    """bf16 products of fp32 weights: the slope is that of fp32 to bf16's rounding, 2**-8 per product, a few of them."""
    case = CASES["shared"](FP32)
    plain = case.closure
    exact, _, size, _ = slope_and_truth(case, engine)
    opt = make(case, engine, method="forward_grad")
    with torch.autocast("cpu", BF16, enabled=outside):
        opt.step(plain if outside else torch.autocast("cpu", BF16)(plain))
    assert opt.last.losses[1] != exact
    assert abs(opt.last.losses[1] - exact) < 0.05 * size


@engines
def test_a_compiled_model(engine):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)), torch.randn(8, 4)
    compiled = torch.compile(model, backend="eager")
    case = Case(list(compiled.named_parameters()), lambda: compiled(x).square().mean(), model)
    slope, truth, size, _ = slope_and_truth(case, engine)
    assert abs(slope - truth) < 1e-5 * size  # C6's bound in fp32


@engines
def test_the_fast_path_of_an_encoder_layer_is_not_taken(engine):
    model, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(2, 5, 8)
    case = Case(list(model.named_parameters()), lambda: (model(x) * x).sum(), model)
    slope, truth, size, _ = slope_and_truth(case, engine)
    assert abs(slope - truth) < 1e-4 * size  # |grad| is small beside the sums, which cancel after the norm


@engines
def test_checkpointing_without_reentry(engine):
    case = CASES["shared"](FP32)
    plain, model, x = case.closure, case.module, torch.randn(4, 6)
    case.closure = lambda: 4 * checkpoint(model, x, use_reentrant=False).square().mean() + plain()
    slope, truth, size, _ = slope_and_truth(case, engine)
    assert abs(slope - truth) < 1e-5 * size  # C6's bound in fp32


@engines
def test_same_masks_as_a_query(engine):
    check_same_masks_as_a_query(engine)


def test_a_path_that_changes():
    """Experts that the first batch did not choose, and a mode that was not looked at, are found as with queries."""
    for engine in ENGINES:
        torch.manual_seed(3)
        model, chosen = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), [0]
        x = torch.randn(4, 6)
        case = Case(
            list(model.named_parameters()), lambda model=model, x=x, c=chosen: model[c[0]](x).square().mean(), model
        )
        opt = make(case, engine, method="forward_grad")
        for chosen[0] in (0, 1, 2, 0):
            opt.step(case.closure)
            ((_, z),) = opt.last.estimate.direction.terms
            expected = sum(
                float((g * z.realise(slot.site)).sum())
                for slot, g in zip(opt.weights, gradients(case), strict=True)
                if g is not None
            )
            assert opt.last.losses[1] == pytest.approx(expected, rel=1e-4)


def gradients(case):
    with torch.enable_grad():
        return torch.autograd.grad(case.closure(), [p for _, p in case.named], allow_unused=True)


# ----------------------------------------------------------------------------------------------------------------------
# Without a trace


@models
@engines
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_no_trace(name, engine, dtype):
    check_no_trace(name, engine, dtype)


@pytest.mark.parametrize("at", range(1, 9))
@pytest.mark.parametrize("name", ["mlp", "attention", "shared"])
@engines
def test_an_exception_leaves_no_trace(name, engine, at):
    """Calls 1 to 8 are the survey, the leak query, the comparison, the slope and its check."""
    case, calls = CASES[name](FP32), []
    before, made_of, kernels = snapshot(case), fabric(case), kernel_flags()
    opt = make(case, engine, method="forward_grad")

    def closure():
        calls.append(None)
        loss = case.closure()
        if len(calls) == at:
            raise Interrupted
        return loss

    with pytest.raises(Interrupted):
        steps(opt, closure, 9)
    assert_same_bits(before, snapshot(case))
    assert fabric(case) == made_of
    assert kernel_flags() == kernels
    assert tangents_left(case) == []
    opt.step(closure)
    fresh = make(case, engine, method="forward_grad")
    while fresh.step_number < opt.step_number:
        fresh.step(case.closure)
    assert opt.last.losses == fresh.last.losses


@pytest.mark.parametrize("name", ["mlp", "weight_giver", "shared", "llama", "gpt2", "lora"])
def test_layerwise_never_writes_what_hooks_reach(name):
    case = CASES[name](FP32)
    opt, written = make(case, "layerwise", method="forward_grad"), []
    opt.step(case.closure)
    before = [tensor._version for _, tensor in case.named]
    opt.step(lambda: written.append([tensor._version for _, tensor in case.named]) or case.closure())
    assert written == [before]


@engines
def test_no_graph_is_built(engine):
    case, graphs = CASES["llama"](FP32), []

    def closure():
        loss = case.closure()
        graphs.append((loss.grad_fn, loss.requires_grad))
        return loss

    make(case, engine, method="forward_grad", lr=1e-3).step(closure)
    assert set(graphs) == {(None, False)}
    assert all(t.grad is None and t.is_leaf and t.requires_grad for _, t in case.named)


@engines
def test_values_that_are_not_numbers_stay(engine):
    """The in-place engine writes stored values over themselves: NaN payloads and the sign of zero are bits like others."""
    weight = torch.zeros(4)
    weight.view(torch.int32)[:] = torch.tensor([0x7FC01234, -0x80000000, 0x7F800000, 0x3F800000])
    odd, used = nn.Parameter(weight), nn.Parameter(torch.ones(3))
    case = Case([("odd", odd), ("used", used)], lambda: used.square().sum() + 0.0 * odd[3])
    before = snapshot(case)
    make(case, engine, method="forward_grad").step(case.closure)
    assert_same_bits(before, snapshot(case))


def test_memory_of_a_slope():
    """16 layers of 1 MiB: layerwise holds tangents and noise of one layer, in_place tangents of all."""
    layer = 512 * 512 * 4
    model, x = nn.Sequential(*[nn.Linear(512, 512) for _ in range(16)]), torch.randn(4, 512)
    extra = {}
    for engine in ENGINES:
        opt = ZO(model.named_parameters(), "forward_grad", lr=0.0, engine=engine)
        opt.step(lambda: model(x).square().mean())
        with torch.no_grad():
            forward = peak_bytes(lambda: model(x).square().mean())
        extra[engine] = peak_bytes(lambda opt=opt: opt.step(lambda: model(x).square().mean())) - forward
    assert extra["layerwise"] < 4 * layer
    assert 16 * layer < extra["in_place"] < 19 * layer


def test_memory_of_a_slope_with_a_large_vocabulary(monkeypatch):
    """A tied matrix of 8 MiB in pieces of 1 MiB: its tangent never exists as a whole."""
    piece = 1 << 18  # elements
    monkeypatch.setattr("zotune.engines.forms.MIN_NUMEL", piece)
    monkeypatch.setattr("zotune.engines.swapping.MIN_NUMEL", piece)
    embed, head = nn.Embedding(8192, 256), nn.Linear(256, 8192, bias=False)
    head.weight = embed.weight
    model, ids = nn.Sequential(embed, head), torch.randint(0, 8192, (4,))
    opt = ZO(model.named_parameters(), "forward_grad", lr=0.0)
    opt.step(lambda: model(ids).square().mean())
    with torch.no_grad():
        forward = peak_bytes(lambda: model(ids).square().mean())
    assert peak_bytes(lambda: opt.step(lambda: model(ids).square().mean())) - forward < 5 * 4 * piece


# ----------------------------------------------------------------------------------------------------------------------
# Refused, or warned of


WRONG = {
    "float": (lambda loss: float(loss.detach()), "returned a float, which carries no derivative"),
    "item": (lambda loss: loss.item(), "returned a float, which carries no derivative"),
    "detach": (lambda loss: loss.detach(), r"carries no derivative, though the closure reads .* of the tensors"),
    "data": (lambda loss: loss.data, r"carries no derivative, though"),
    "vector": (lambda loss: loss.expand(2), r"tensor of shape \(2,\); one number is needed"),
    "none": (lambda loss: None, "returned NoneType"),
}


@engines
@pytest.mark.parametrize("kind", WRONG)
def test_closures_without_a_derivative_are_refused(engine, kind):
    change, says = WRONG[kind]
    case = CASES["shared"](FP32)
    before = snapshot(case)
    with pytest.raises(ClosureError, match=says):
        make(case, engine, method="forward_grad").step(lambda: change(case.closure()))
    assert_same_bits(before, snapshot(case))
    assert tangents_left(case) == []


@engines
def test_inference_mode_in_the_closure_is_refused(engine):
    case = CASES["shared"](FP32)
    with pytest.raises(ClosureError, match=r"inference_mode"):
        make(case, engine, method="forward_grad").step(torch.inference_mode()(case.closure))


@engines
def test_inference_mode_around_the_step_is_fine(engine):
    case = CASES["shared"](FP32)
    opt = make(case, engine, method="forward_grad")
    with torch.inference_mode():
        opt.step(case.closure)
    assert opt.last.losses[1] != 0.0


@engines
def test_a_closure_that_runs_another_model_is_refused(engine):
    case, other = CASES["shared"](FP32), CASES["shared"](FP32)
    with pytest.raises(ClosureError, match="reads none of the 2 trained tensors"):
        make(case, engine, method="forward_grad").step(other.closure)


@engines
def test_a_direction_that_moves_only_what_is_not_read_has_slope_0(engine):
    model, x = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)]), torch.randn(2, 3)
    case = Case(list(model.named_parameters()), lambda: model[0](x).square().mean(), model)
    opt = make(case, engine, method="forward_grad")
    unread = Scaled(z_of(), {"1.weight": 1.0, "1.bias": 1.0}, otherwise=0.0)
    with torch.no_grad():
        loss, slope = opt.engine.slope(unread, case.closure, 0)
    assert slope == 0.0
    assert loss == float(case.closure().detach())


@engines
@pytest.mark.parametrize("name", NO_FORWARD_MODE)
def test_operations_without_forward_mode_are_named(engine, name):
    case = CASES[name](FP32)
    before = snapshot(case)
    with pytest.raises(EngineError, match=rf"forward mode.*{NO_FORWARD_MODE[name]}.*mezo"):
        make(case, engine, method="forward_grad").step(case.closure)
    assert_same_bits(before, snapshot(case))


@engines
def test_the_advice_for_an_lstm_works(engine):
    case = CASES["lstm"](FP32)
    plain = case.closure

    def closure():
        with torch.backends.mkldnn.flags(enabled=False):
            return plain()

    case.closure = closure
    slope, truth, size, _ = slope_and_truth(case, engine)
    assert abs(slope - truth) < 1e-5 * size  # C6's bound in fp32


def test_fused_attention_chosen_in_the_closure_is_named():
    q, w = torch.randn(1, 2, 4, 8), nn.Parameter(torch.randn(8, 8))

    def closure():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q @ w, q, q).square().mean()

    with pytest.raises(EngineError, match=r"forward mode.*flash.*attn_implementation"):
        ZO([("w", w)], "forward_grad").step(closure)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad


def test_a_custom_function_without_jvp_is_named():
    w = nn.Parameter(torch.randn(3))
    with pytest.raises(EngineError, match=r"jvp.*mezo"):
        ZO([("w", w)], "forward_grad").step(lambda: Twice.apply(w).square().sum())


@engines
def test_other_errors_pass_as_they_are(engine):
    case = CASES["shared"](FP32)

    def closure():
        case.closure()
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire") as caught:
        make(case, engine, method="forward_grad").step(closure)
    assert type(caught.value) is RuntimeError


def partly_lost(case):
    model, x = case.module, torch.randn(4, 6)
    return lambda: case.closure() + F.linear(x, model.block.weight.data).square().mean()


def checkpointed(case):
    model, x = case.module, torch.randn(4, 6)
    return lambda: 4 * checkpoint(model, x, use_reentrant=True).square().mean() + case.closure()


@engines
@pytest.mark.parametrize("lose", [partly_lost, checkpointed])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_lost_tangents_are_warned_of(engine, lose):
    """The slope misses a part of the loss without an error: central differences see it."""
    case = CASES["shared"](FP32)
    with pytest.warns(UserWarning, match=r"Forward mode gives the slope .* central differences .* lose its tangents"):
        make(case, engine, method="forward_grad").step(lose(case))


@models
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_right_slopes_are_not_warned_of(name, dtype):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Forward mode")
        for seed in range(5):
            torch.manual_seed(seed)
            case = CASES[name](dtype)
            make(case, "in_place", method="forward_grad", seed=seed).step(case.closure)


@engines
def test_the_slope_is_checked_once_and_counted(engine):
    case, calls = CASES["shared"](FP32), []
    opt = make(case, engine, method="forward_grad", method_options={"n": 2})
    for _ in range(3):
        opt.step(lambda: calls.append(None) or case.closure())
    assert opt.forwards == 6
    assert len(calls) == 6 + opt.engine.check_forwards
    assert opt.engine.check_forwards <= (5 if engine == "in_place" else 10)


@engines
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_refused(engine, bad):
    case = CASES["mlp"](FP32)
    opt = make(case, engine, method="forward_grad", lr=0.1)
    opt.step(case.closure)
    before = snapshot(case)
    with pytest.warns(UserWarning, match="Step 1 was refused"):
        opt.step(lambda: torch.tensor(bad))
    with pytest.warns(UserWarning, match="Step 2 was refused"):
        opt.step(lambda: case.closure() * bad)
    assert_same_bits(before, snapshot(case))
    opt.step(case.closure)
    assert opt.refused == 2


# ----------------------------------------------------------------------------------------------------------------------
# The trainer's closure


def scorer_and_batch():
    from zotune.tasks.encoding import Encoded
    from zotune.tasks.scoring import OptionScorer

    case = CASES["llama"](FP32)
    batch = [Encoded(prompt_ids=[5, 6, 7 + i], option_ids=([1], [2]), label=i % 2) for i in range(5)]
    return case, OptionScorer(case.module.eval()), batch


def test_the_trainers_closure_has_a_slope():
    from zotune.tasks.objectives import Classification, closure_for

    case, scorer, batch = scorer_and_batch()
    for micro_batch in (None, 2):
        case.closure = closure_for(Classification(scorer), batch, micro_batch)
        slope, truth, size, _ = slope_and_truth(case, "layerwise")
        assert abs(slope - truth) < 1e-5 * size  # C6's bound in fp32


def test_the_trainers_closure_gives_the_numbers_of_plain_sums():
    """What ledgers hold: the fp64 mean over examples of fp32 losses, summed in order. Equal bits."""
    from zotune.engines.query import as_number
    from zotune.tasks.objectives import Classification, closure_for

    _, scorer, batch = scorer_and_batch()
    with torch.no_grad():
        for micro_batch in (None, 1, 2, 3, 5, 8):
            size = micro_batch or len(batch)
            parts = [batch[start : start + size] for start in range(0, len(batch), size)]
            expected = sum(float(scorer.loss(part)) * len(part) for part in parts) / len(batch)
            assert as_number(closure_for(Classification(scorer), batch, micro_batch)()) == expected
