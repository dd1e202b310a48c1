"""Golden texts of every masked template, encoding, truncation, refusals."""

import pytest

from zotune.errors import ConfigError, DataError, ModelError
from zotune.masked import MASKED_TEMPLATES, MaskedTemplate, encode_all_masked, encode_masked, find_masked_template

PAIR = {"premise": "The cat sat.", "hypothesis": "The cat ran.", "label": 1}
GOLDEN = [
    ("sst2", {"sentence": "a gripping film ", "label": 1}, "a gripping film It was<mask>.", "great"),
    ("vader_movie", {"sentence": "a dull film", "label": 0}, "a dull film It was<mask>.", "terrible"),
    ("sst5", {"sentence": "a film .", "label": 2}, "a film . It was<mask>.", "okay"),
    ("snli", PAIR, "The cat sat?<mask>, the cat ran.", "Maybe"),
    ("mnli", {**PAIR, "label": "contradiction"}, "The cat sat?<mask>, the cat ran.", "No"),
    ("rte", {**PAIR, "label": "entailment"}, "The cat sat?<mask>, the cat ran.", "Yes"),
    ("rte", PAIR, "The cat sat?<mask>, the cat ran.", "No"),
    ("trec", {"text": "How did it end ?", "coarse_label": 0}, "<mask>: How did it end ?", "Expression"),
    ("trec", {"text": "Who ?", "coarse_label": 2}, "<mask>: Who ?", "Description"),
]


@pytest.mark.parametrize(("task", "row", "text", "word"), GOLDEN)
def test_golden_texts(tokenizer, task, row, text, word):
    encoded = encode_masked(find_masked_template(task), row, tokenizer)
    inner = encoded.prompt_ids[1:-1]
    # the space before a mask belongs to the mask, as in RoBERTa's own tokenizer, so the golden texts have none there
    assert inner == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [encoded.prompt_ids[0], encoded.prompt_ids[-1]] == [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert encoded.prompt_ids.count(tokenizer.mask_token_id) == 1
    assert tokenizer.convert_ids_to_tokens(encoded.option_ids[encoded.label]) == [f"Ġ{word}"]
    assert [len(option) for option in encoded.option_ids] == [1] * len(MASKED_TEMPLATES[task].words)
    assert encoded.cut == 0


def test_all_templates_are_covered_and_agree_with_the_labels_of_the_causal_tasks():
    assert {task for task, *_ in GOLDEN} == set(MASKED_TEMPLATES)
    tasks = pytest.importorskip("zotune.tasks.catalogue").TASKS
    for name in ("sst2", "vader_movie", "rte"):
        if name in tasks:
            words = list(MASKED_TEMPLATES[name].words.values())
            causal = [text.strip() for text in tasks[name].options.values()]
            assert words == causal


def test_only_final_punctuation_goes_and_only_the_first_letter_changes(tokenizer):
    template = find_masked_template("rte")
    rows = [
        {"premise": "The U.S. ran", "hypothesis": "NASA Ran", "label": 0},
        {"premise": "Ran!", "hypothesis": "I", "label": 0},
    ]
    for row, text in zip(rows, ["The U.S. ran?<mask>, nASA Ran", "Ran?<mask>, i"], strict=True):
        assert encode_masked(template, row, tokenizer).prompt_ids[1:-1] == tokenizer(text)["input_ids"]


def test_truncation_keeps_what_is_near_the_mask(tokenizer):
    whole = encode_masked(find_masked_template("sst2"), {"sentence": "a gripping film " * 5, "label": 1}, tokenizer)
    n = len(whole.prompt_ids)
    for length in range(4, n):
        cut = encode_masked(
            find_masked_template("sst2"), {"sentence": "a gripping film " * 5, "label": 1}, tokenizer, length
        )
        assert len(cut.prompt_ids) == length
        assert cut.cut == n - length
        assert cut.prompt_ids[0] == whole.prompt_ids[0]
        # the one side is one token long: all that goes is the left end of the other
        assert cut.prompt_ids[1:] == whole.prompt_ids[-(length - 1) :]
    row = {"text": "a gripping film " * 5, "coarse_label": 1}
    cut = encode_masked(find_masked_template("trec"), row, tokenizer, 8)
    assert cut.prompt_ids[1] == tokenizer.mask_token_id
    pair = {"premise": "a film " * 20, "hypothesis": "a cat " * 20, "label": 0}
    cut = encode_masked(find_masked_template("rte"), pair, tokenizer, 24)
    assert len(cut.prompt_ids) == 24
    assert 11 <= cut.prompt_ids.index(tokenizer.mask_token_id) <= 12  # 21 tokens of text, half on each side


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"hypothesis": "x", "label": 0}, "'premise' must hold words; the row has hypothesis, label"),
        ({**PAIR, "premise": " . "}, "'premise' must hold words; it is ' . '"),
        ({**PAIR, "label": -1}, "label -1 .*withheld"),
        ({**PAIR, "label": "maybe"}, "label 'maybe' in 'label' is none of 0, 1, 'entailment'"),
        ({**PAIR, "label": True}, "label True"),
        ({**PAIR, "premise": "a <mask> cat"}, "holds the mask token"),
    ],
)
def test_bad_rows_are_refused_by_number(tokenizer, row, message):
    with pytest.raises(DataError, match=f"row 1: .*{message}"):
        encode_all_masked(find_masked_template("rte"), [PAIR, row], tokenizer)


def test_refusals(tokenizer):
    with pytest.raises(ConfigError, match="no masked template for task 'copa'"):
        find_masked_template("copa")
    with pytest.raises(ConfigError, match=r"\{sentence:upper\} names no form of a field: there are open, lower"):
        MaskedTemplate("{sentence:upper} It was {mask}.", {0: "bad", 1: "good"})
    with pytest.raises(ConfigError, match="once"):
        MaskedTemplate("{sentence} It was", {0: "a", 1: "b"})
    with pytest.raises(DataError, match=r"'unheard' is .* tokens"):
        encode_masked(MaskedTemplate("{s} {mask}.", {0: "great", 1: "unheard"}), {"s": "a", "label": 0}, tokenizer)
    with pytest.raises(DataError, match="no room"):
        encode_masked(find_masked_template("rte"), PAIR, tokenizer, 3)

    class Causal:
        mask_token_id = None

    with pytest.raises(ModelError, match="no mask token"):
        encode_masked(find_masked_template("rte"), PAIR, Causal())
