"""Option length, truncation, and the boundary between prompt and option."""

import pytest

from zotune.core.errors import ConfigError, DataError
from zotune.tasks.catalogue import TASKS
from zotune.tasks.encoding import encode, encode_all
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
