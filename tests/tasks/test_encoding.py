"""Option length, truncation, and the boundary between prompt and option."""

import pytest

from zotune.errors import ConfigError, DataError
from zotune.tasks.catalogue import TASKS
from zotune.tasks.demonstrations import with_demonstrations
from zotune.tasks.encoding import encode, encode_all, special_tokens, truncation
from zotune.tasks.task import Example, make_example

SST2 = make_example(TASKS["sst2"], {"sentence": "a gripping film", "label": 1})


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_option_length_is_the_difference_of_lengths(tokenizer):
    encoded = encode(SST2, tokenizer, 512)
    for option, tokens in zip(SST2.options, encoded.option_ids, strict=True):
        assert len(tokens) == len(ids(tokenizer, SST2.prompt + option)) - len(ids(tokenizer, SST2.prompt))
        assert encoded.prompt_ids + tokens == ids(tokenizer, SST2.prompt + option)
    assert encoded.label == 1
    assert encoded.length == len(encoded.prompt_ids) + max(map(len, encoded.option_ids))


def test_trailing_spaces_of_the_prompt_belong_to_the_option(tokenizer):
    # "It was " + "great": the space is part of the token " great", so it must not count as prompt
    with_space = encode(Example("a film It was ", ("great", "terrible"), 0), tokenizer, 512)
    usual = encode(Example("a film It was", (" great", " terrible"), 0), tokenizer, 512)
    assert with_space == usual


def test_nothing_is_added_by_the_tokenizer(tokenizer):
    class Adding:
        def __call__(self, text, add_special_tokens=True):
            plain = ids(tokenizer, text)
            return {"input_ids": [1, *plain, 2] if add_special_tokens else plain}

    assert encode(SST2, Adding(), 512) == encode(SST2, tokenizer, 512)


def test_truncation_cuts_the_left_and_never_the_option(tokenizer):
    whole = encode(SST2, tokenizer, 512)
    longest = max(map(len, whole.option_ids))
    for max_length in range(longest + 1, whole.length):
        cut = encode(SST2, tokenizer, max_length)
        assert cut.length == max_length
        assert cut.option_ids == whole.option_ids
        assert cut.prompt_ids == whole.prompt_ids[-(max_length - longest) :]
    with pytest.raises(DataError, match="no prompt token is left"):
        encode(SST2, tokenizer, longest)


def test_bos_survives_truncation(tokenizer):
    whole = encode(SST2, tokenizer, 512)
    assert encode(SST2, tokenizer, 512, bos_id=3).prompt_ids == [3, *whole.prompt_ids]
    longest = max(map(len, whole.option_ids))
    assert encode(SST2, tokenizer, longest + 3, bos_id=3).prompt_ids == [3, *whole.prompt_ids[-2:]]
    assert encode(SST2, tokenizer, longest + 1, bos_id=3).prompt_ids == [3]


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example("It was", ("", " great"), 0), "adds no token"),
        (Example("", (" great", " terrible"), 0), "no prompt token is left"),
    ],
)
def test_refusals(tokenizer, example, message):
    with pytest.raises(DataError, match=message):
        encode(example, tokenizer, 512)


def test_options_that_change_the_prompts_tokens_are_refused():
    # "ab" + "c" is the one token 7, with which the other option's prompt does not end
    table = {"x ab": [1, 2], "x abc d": [1, 7, 8], "x abz": [1, 2, 9]}
    with pytest.raises(DataError, match="depend on the option"):
        encode(Example("x ab", ("c d", "z"), 0), lambda text, add_special_tokens: {"input_ids": table[text]}, 512)


def test_refusals_name_the_example_and_the_setting(tokenizer):
    with pytest.raises(DataError, match="example 1: the option ''"):
        encode_all([SST2, Example("It was", ("", " great"), 0)], tokenizer, 512)
    with pytest.raises(ConfigError, match="max_length"):
        encode(SST2, tokenizer, 0)


def test_cut_prompts_are_counted(tokenizer):
    whole = encode(SST2, tokenizer, 512)
    short = make_example(TASKS["sst2"], {"sentence": "a", "label": 1})
    for bos_id in (None, 3):
        encoded = encode_all([SST2, short], tokenizer, whole.length - 2 + (bos_id is not None), bos_id=bos_id)
        assert [example.cut for example in encoded] == [2, 0]
    report = truncation(encoded)
    assert (report.examples, report.of, report.tokens) == (1, 2, 2)
    assert str(report) == "1 of 2 prompts lost tokens at their left end, 2 in all"
    assert str(truncation(encoded[1:])) == "none of 1 prompts was cut"


def test_generated_answers_find_room(tokenizer):
    rows = {"context": "the cast is great " * 30, "question": "who", "answers": {"text": ["the cast", "cast"]}}
    example = make_example(TASKS["squad"], rows)
    whole = encode(example, tokenizer, 4096)
    assert whole.option_ids == (ids(tokenizer, " the cast\n"),)
    assert encode(example, tokenizer, 100).prompt_ids == whole.prompt_ids[-50:]
    assert encode(example, tokenizer, 100).cut == len(whole.prompt_ids) - 50
    assert encode(example, tokenizer, 100).example.answers == ("the cast", "cast")
    with pytest.raises(DataError, match="or 50 new ones"):
        encode(example, tokenizer, 50)


class Adding:
    """A tokenizer that puts tokens around a text by itself."""

    def __init__(self, tokenizer, before, after, bos_token_id, eos_token_id):
        self.tokenizer, self.before, self.after = tokenizer, before, after
        self.bos_token_id, self.eos_token_id = bos_token_id, eos_token_id

    def __call__(self, text, add_special_tokens):
        plain = ids(self.tokenizer, text)
        return {"input_ids": [*self.before, *plain, *self.after] if add_special_tokens else plain}


@pytest.mark.parametrize(
    ("before", "after", "bos", "eos", "wanted"),
    [
        ([2], [], 2, 3, {"bos_id": 2, "start_id": 2}),  # OPT, Llama, Gemma
        ([], [], 1, 1, {"bos_id": None, "start_id": 1}),  # GPT-2, SmolLM2: there is one, and it is not put before texts
        ([], [], None, 3, {"bos_id": None, "start_id": 3}),  # Qwen
        ([], [3], None, 3, {"bos_id": None, "start_id": 3}),
        ([], [], None, None, {"bos_id": None, "start_id": None}),
    ],
)
def test_a_bos_exactly_where_the_tokenizer_puts_one(tokenizer, before, after, bos, eos, wanted):
    assert special_tokens(Adding(tokenizer, before, after, bos, eos)) == wanted


def test_an_empty_prompt_starts_with_the_start_token(tokenizer):
    bare = Example("", ("Yes", "No"), 0)
    assert encode(bare, tokenizer, 512, start_id=5).prompt_ids == [5]
    assert encode(bare, tokenizer, 512, bos_id=3, start_id=5).prompt_ids == [3]
    assert encode(SST2, tokenizer, 512, start_id=5) == encode(SST2, tokenizer, 512)
    assert encode(bare, tokenizer, 512, start_id=5).cut == 0


POOL = [Example(f"film {n} It was", (" bad", " good"), n % 2) for n in range(6)]


def test_demonstrations_come_before_the_question():
    asked = with_demonstrations([SST2, SST2], POOL, count=2, seed=0)
    shown = asked[0].prompt.split("\n\n")
    solved = [f"film {n} It was {('bad', 'good')[n % 2]}" for n in range(6)]
    assert len(shown) == 3
    assert set(shown[:2]) < set(solved)
    assert shown[2] == SST2.prompt
    assert (asked[0].options, asked[0].label) == (SST2.options, SST2.label)
    assert asked[0].prompt == asked[1].prompt, "with a seed all questions have the same demonstrations"
    assert asked == with_demonstrations([SST2, SST2], POOL, count=2, seed=0)


def test_demonstrations_without_a_seed_differ_from_question_to_question():
    asked = with_demonstrations([SST2] * 8, POOL, count=3, seed=None)
    # eight sets equal by chance: 120 ordered sets of three, probability below 1e-14
    assert len({example.prompt for example in asked}) > 1
    assert asked == with_demonstrations([SST2] * 8, POOL, count=3, seed=None)


def test_demonstrations_are_cut_from_the_left(tokenizer):
    asked = with_demonstrations([SST2], POOL, count=6, seed=0)
    plain = encode(SST2, tokenizer, 512)
    cut = encode_all(asked, tokenizer, plain.length)
    assert cut[0].prompt_ids == plain.prompt_ids
    assert truncation(cut).examples == 1
    with pytest.raises(DataError, match="6 training examples to show and 7"):
        with_demonstrations([SST2], POOL, count=7, seed=0)
    with pytest.raises(ConfigError, match="at least 1"):
        with_demonstrations([SST2], POOL, count=0, seed=0)
