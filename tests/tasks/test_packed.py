"""Prompts fed once and examples that share rows: the same hidden states, fewer tokens, and refused where it is not so."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.classification import MODELS, SHAPES, batch_of, usual_loss, usual_scores

from zotune.tasks.encoding import Encoded
from zotune.tasks.layout import lay_out
from zotune.tasks.packed import DEAR, _fill, _rows, pack, packed_size, visible
from zotune.tasks.packing_trial import NEIGHBOURS, TRIAL, UNMOVED
from zotune.tasks.scoring import OptionScorer

# fp64 sums in another order, of numbers near 10, through two layers: a few dozen units of 2e-15
FP64 = {"rtol": 0.0, "atol": 1e-12}


def test_a_tree_by_hand():
    example = Encoded([5, 6], ([9, 8, 7], [9, 3], [4], [9, 8, 1, 2]), 0)
    layout = pack([example, Encoded([7], ([2, 2], [3]), 1)], pad_id=0, longest=5)
    # the prompt, then what options begin with in preorder: 9, 9 8, 9 8 1; no last token is fed. The second one fits nowhere
    assert layout.input_ids.tolist() == [[5, 6, 9, 8, 1], [7, 2, 0, 0, 0]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]]
    assert layout.ends.tolist() == [[5, 5, 5, 5, 5], [2, 2, 3, 4, 5]]
    # asked for: the prompt's end, after 9, after 9 8, after 9 8 1; of the second the prompt's end and after 2
    queries = list(zip(layout.query_row.tolist(), layout.query_position.tolist(), strict=True))
    assert queries == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1)]


def test_branches_do_not_see_each_other():
    layout = pack([Encoded([5], ([1, 2, 9], [1, 3, 9], [4, 9]), 0)], pad_id=0)
    assert layout.input_ids.tolist() == [[5, 1, 2, 3, 4]]
    assert layout.position_ids.tolist() == [[0, 1, 2, 2, 1]]
    seen = visible(layout.ends, torch.float32)[0, 0] == 0
    ancestors = [{0}, {0, 1}, {0, 1, 2}, {0, 1, 3}, {0, 4}]
    assert [set(row.nonzero().flatten().tolist()) for row in seen] == ancestors


def test_short_examples_share_a_row_and_do_not_see_each_other():
    examples = [Encoded([1] * n, ([8], [9]), 0) for n in (2, 6, 3, 1)]
    layout = pack(examples, pad_id=0)
    assert layout.input_ids.shape == (2, 6)  # 6; 3 + 2 + 1
    assert (packed_size(examples), lay_out(examples, 0).input_ids.shape) == ((2, 6), (4, 6))
    seen = visible(layout.ends, torch.float32)[1, 0] == 0
    blocks = torch.block_diag(*(torch.ones(n, n).tril() for n in (3, 2, 1))).bool()
    assert torch.equal(seen, blocks)
    assert layout.query_row.tolist() == [1, 0, 1, 1]
    assert layout.query_position.tolist() == [4, 5, 2, 5]


def test_rows_may_be_longer_than_the_largest_example():
    """Four of 5 and four of 6: eight rows of 6, four of 11 or 12; those of 11 are full. Nobody sees another."""
    examples = [Encoded([1] * n, ([8], [9]), 0) for n in (5, 6) * 4]
    layout = pack(examples, pad_id=0)
    assert packed_size(examples) == tuple(layout.input_ids.shape) == (4, 11)
    assert packed_size(examples, longest=10) == (8, 6)
    assert packed_size(examples, longest=3) == (8, 6)  # for its caller to refuse
    seen = visible(layout.ends, torch.float32)[:, 0] == 0
    blocks = torch.block_diag(torch.ones(6, 6).tril(), torch.ones(5, 5).tril()).bool()
    assert all(torch.equal(row, blocks) for row in seen)


def test_long_rows_are_dear():
    """Two rows of 257 cost 514 * (1 + 257 / DEAR), one of 514 a half more."""
    assert _rows([DEAR + 1, DEAR + 1], 10_000) == ([[0], [1]], DEAR + 1)
    assert _rows([20, 20], 10_000) == ([[0], [1]], 20)
    # three rows of the largest, or two a third longer, one of which is full: a ninth fewer slots
    assert _rows([30, 30, 10], 10_000) == ([[0, 2], [1]], 40)
    assert _rows([300, 300, 100], 10_000) == ([[0], [1], [2]], 300)


sizes_ = st.lists(st.integers(1, 30), min_size=1, max_size=20)


@given(sizes_, st.integers(0, 60))
@settings(max_examples=50, deadline=None)
def test_rows_are_filled_without_overflow(sizes, longest):
    longest = max(longest, max(sizes))
    bins, length = _fill(sizes, longest)
    assert sorted(number for members in bins for number in members) == list(range(len(sizes)))
    loads = [sum(sizes[number] for number in members) for members in bins]
    assert max(loads) == length <= longest
    assert sum(2 * load <= longest for load in loads) <= 1, "two half-empty rows would have been one"


@given(sizes_, st.integers(1, 60))
@settings(max_examples=50, deadline=None)
def test_rows_cost_no_more_than_the_shortest(sizes, longest):
    """Bounded, and never dearer than rows of the largest example's length."""
    (bins, length), (shortest, least) = _rows(sizes, longest), _fill(sizes, max(sizes))
    assert length <= max(longest, max(sizes))
    assert len(bins) * length * (1 + length / DEAR) <= len(shortest) * least * (1 + least / DEAR)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_scores_and_losses_are_the_usual_ones(name, shape):
    model = MODELS[name]()
    scorer, batch = OptionScorer(model), batch_of(shape)
    packed, rows = scorer.arrange(batch), scorer.lay_out(batch)
    assert packed.ends is not None or shape == "long prompts", "nothing was packed: nothing is tried"
    assert packed.input_ids.numel() <= rows.input_ids.numel()
    torch.testing.assert_close(scorer.scores(batch), usual_scores(model, batch), **FP64)
    torch.testing.assert_close(scorer.loss(batch), usual_loss(model, batch), **FP64)
    scorer._longest_packed = 0
    torch.testing.assert_close(scorer.scores(batch), usual_scores(model, batch), **FP64)


@torch.no_grad()
def test_counts_choose_the_layout():
    scorer = OptionScorer(MODELS["llama"]())
    equal = [Encoded([3, 4, 5, 6], ([7], [8]), 0)] * 3
    assert scorer.arrange(equal).ends is None, "rows without padding: nothing can be saved"
    assert scorer.arrange([Encoded([3] * 8, ([7], [8]), 0)]).ends is None, "one row"
    almost = [
        Encoded([3] * n, ([7], [8]), 0) for n in (12, 12, 12, 12, 12, 6, 6)
    ]  # 72 of 84 tokens: a seventh is saved
    assert scorer.arrange(almost).ends is not None
    less = [Encoded([3] * n, ([7], [8]), 0) for n in (12,) * 7 + (6, 6)]  # 96 of 108 tokens: a ninth
    assert scorer.arrange(less).ends is None
    long = [Encoded([3] * 40, ([7] * 30, [8] * 30), 0)]  # a tree of 98 where the model reads 64
    scorer._longest = None
    assert scorer.arrange(long).ends is None
    first, again = (scorer.arrange(batch_of("long options")) for _ in range(2))
    assert torch.equal(first.input_ids, again.input_ids)


@torch.no_grad()
def test_dropout_keeps_a_row_for_each_option():
    model = MODELS["gpt2"]()
    scorer, batch = OptionScorer(model), batch_of("long options")
    assert scorer.arrange(batch).ends is not None
    model.transformer.h[1].train()
    assert scorer.arrange(batch).ends is None
    looked = OptionScorer(model.train())
    assert all(module.training for module in model.modules()), "the trial's mode was left on"
    assert looked.arrange(batch).ends is None
    model.eval()
    assert looked.arrange(batch).ends is not None, "dropout confused the trial"
    llama = MODELS["llama"]().train()  # in training mode, but nothing is dropped
    assert OptionScorer(llama).arrange(batch).ends is not None
    llama.model.layers[0].self_attn.attention_dropout = 0.1
    assert OptionScorer(llama).arrange(batch).ends is None


def test_the_trial_tries_what_it_says():
    """UNMOVED are the queries that see the same tokens in both trials, and neighbours before them in a row that differ."""
    paths = []
    for examples in (TRIAL, NEIGHBOURS):
        layout = pack(examples, 0)
        assert layout.input_ids.shape == (2, 10)
        seen = visible(layout.ends, torch.float32)[:, 0] == 0
        places = list(zip(layout.query_row.tolist(), layout.query_position.tolist(), strict=True))
        paths.append([layout.input_ids[row, seen[row, place]].tolist() for row, place in places])
        paths.append([layout.input_ids[row, : place + 1].tolist() for row, place in places])
    same = [number for number, (one, two) in enumerate(zip(paths[0], paths[2], strict=True)) if one == two]
    assert same == sorted(number % len(paths[0]) for number in UNMOVED)
    assert sum(paths[1][number] != paths[3][number] for number in same) >= 5


def ignoring(model, *names):
    """The model with a body that does not look at some of its arguments."""
    plain = model.model.forward

    def forward(*args, **kwargs):
        return plain(*args, **{key: value for key, value in kwargs.items() if key not in names})

    model.model.forward = forward
    return model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (
            ("attention_mask",),
            "other hidden states",
        ),  # transformers makes a mask of its own where positions start again
        (("position_ids",), "other hidden states"),
        (("attention_mask", "position_ids"), "does not heed a mask"),
    ],
)
@torch.no_grad()
def test_models_that_ignore_masks_or_positions_are_found_out(dtype, names, reason):
    model = ignoring(MODELS["llama"](), *names).to(dtype)
    scorer = OptionScorer(model)
    assert reason in scorer.layout_reason
    assert scorer.arrange(batch_of("long options")).ends is None


def test_models_that_take_no_mask_are_left_alone():
    model = MODELS["llama"]()
    plain = model.model.forward

    def forward(attention_mask=None, **kwargs):
        if attention_mask is not None and attention_mask.dim() == 4:
            raise ValueError("a mask of padding is needed")
        return plain(attention_mask=attention_mask, **kwargs)

    model.model.forward = forward
    assert "takes no mask of who sees whom (ValueError)" in OptionScorer(model).layout_reason


@torch.no_grad()
def test_sliding_windows_bound_the_rows():
    import transformers as hf

    config = hf.MistralConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        sliding_window=12,
    )
    config.num_key_value_heads, config.initializer_range, config._attn_implementation = 1, 0.3, "sdpa"
    model = hf.MistralForCausalLM(config).eval().double()
    scorer = OptionScorer(model)
    short, long = batch_of("two words"), batch_of("long options")
    assert scorer.arrange(short).ends is not None
    assert scorer.arrange(long).ends is None, "a mask of our own would replace the window"
    for batch in (short, long):
        torch.testing.assert_close(scorer.scores(batch), usual_scores(model, batch), **FP64)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_attention_implementations_take_the_mask(implementation):
    model = MODELS["llama"]()
    model.set_attn_implementation(implementation)
    scorer, batch = OptionScorer(model), batch_of("long options")
    assert scorer.arrange(batch).ends is not None
    allowed = FP64["atol"] if implementation == "sdpa" else 1e-5  # eager attention takes its softmax in fp32
    torch.testing.assert_close(scorer.scores(batch), usual_scores(model, batch), rtol=0, atol=allowed)
