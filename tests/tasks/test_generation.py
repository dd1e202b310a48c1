"""Greedy answers against a plain loop over single prompts, for every architecture."""

import pytest
import torch

from zotune.errors import ConfigError, DataError
from zotune.tasks.generation import Generator, pad_left


def plain_greedy(model, prompt, stops, count):
    """One prompt, no padding, no cache: the whole sequence again for every token."""
    ids = list(prompt)
    for _ in range(count):
        logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


def prompts_of(lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, 384, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def test_answers_equal_a_plain_loop_in_every_batch(architecture, tokenizer):
    # fp32 with weights of scale 0.3: the first and second logit lie far apart beside rounding (1e-5), so token ids agree
    prompts = prompts_of([3, 30, 1, 12, 7])
    generator = Generator(architecture, tokenizer, max_new_tokens=12)
    alone = [plain_greedy(architecture, prompt, generator.stops, 12) for prompt in prompts]
    for batch_size in (1, 2, 5):
        written = generator.generate(prompts, batch_size=batch_size)
        assert [list(answer.token_ids) for answer in written] == alone
    assert [list(a.token_ids) for a in generator.generate(prompts[::-1], batch_size=5)] == alone[::-1]


class Scripted(torch.nn.Module):
    """Stands for a model: 'generates' what a test wants."""

    def __init__(self, answers):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answers = answers

    def generate(self, input_ids, attention_mask, generation_config):
        rows = self.answers[: len(input_ids)]
        width = max(map(len, rows))
        new = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, new], dim=1)


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("written", "text", "finished"),
    [
        (" great film\n the cast", "great film", True),
        (" great", "great", True),  # what pads the row is the end of text
        ("\n great", "", True),
        ("  \n", "", True),
        ("", "", True),
    ],
)
def test_an_answer_ends_at_a_line_break(tokenizer, written, text, finished):
    model = Scripted([ids(tokenizer, written), ids(tokenizer, " a long answer that goes on")])
    answer = Generator(model, tokenizer).generate([[5], [5, 6]])[0]
    assert (answer.text, answer.finished) == (text, finished)


def test_an_answer_without_end_is_cut_off(tokenizer):
    tokens = ids(tokenizer, " the cast is great")
    answer = Generator(Scripted([tokens]), tokenizer).generate([[5]])[0]
    assert (answer.text, answer.finished, list(answer.token_ids)) == ("the cast is great", False, tokens)


def test_all_tokens_with_a_line_break_stop(tokenizer):
    stops = Generator(Scripted([]), tokenizer).stops
    with_break = {number for number in range(len(tokenizer)) if "\n" in tokenizer.decode([number])}
    assert with_break
    assert stops == with_break | {tokenizer.eos_token_id}


def test_a_token_that_holds_more_than_the_line_break_counts_to_it(tokenizer):
    class Merged:
        """A token of its own for '.\\n', as large vocabularies have it."""

        eos_token_id, pad_token_id = 0, 0
        texts = ("", "yes", ".\n", "no")

        def __len__(self):
            return 4

        def convert_ids_to_tokens(self, numbers):
            return [self.texts[number].replace("\n", "Ċ") for number in numbers]

        def decode(self, numbers, **_):
            return "".join(self.texts[number] for number in numbers)

    answer = Generator(Scripted([[1, 2, 3]]), Merged()).generate([[5]])[0]
    assert (answer.text, answer.token_ids, answer.finished) == ("yes.", (1, 2), True)


def test_the_models_own_generation_settings_do_not_leak(make_llama, tokenizer):
    model = make_llama()
    plain = Generator(model, tokenizer, max_new_tokens=8).generate(prompts_of([5]))
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty, settings.num_beams = True, 9.0, 50.0, 2
    settings.no_repeat_ngram_size = 1
    state = torch.get_rng_state()
    assert Generator(model, tokenizer, max_new_tokens=8).generate(prompts_of([5])) == plain
    assert torch.equal(torch.get_rng_state(), state)


def test_the_models_further_end_tokens_count(make_llama, tokenizer):
    model = make_llama()
    first = Generator(model, tokenizer, max_new_tokens=8).generate(prompts_of([5]))[0].token_ids
    model.generation_config.eos_token_id = [first[1], 0]
    assert Generator(model, tokenizer, max_new_tokens=8).generate(prompts_of([5]))[0].token_ids == first[:2]


# peft asks transformers for an attribute by its old name
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("adapter", ["lora", "prefix", "prompt"])
@torch.no_grad()
def test_peft_adapters_generate(adapter, make_llama, tokenizer):
    peft = pytest.importorskip("peft")
    make = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
        "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    model = peft.get_peft_model(make_llama(), make[adapter]()).eval()
    for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
    prompts = prompts_of([3, 9, 1])
    generator = Generator(model, tokenizer, max_new_tokens=6)
    alone = [plain_greedy(model, prompt, generator.stops, 6) for prompt in prompts]
    assert [list(answer.token_ids) for answer in generator.generate(prompts, batch_size=3)] == alone


def test_refusals(make_llama, tokenizer):
    generator = Generator(make_llama(), tokenizer)
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        generator.generate([[5], []])
    with pytest.raises(DataError, match=r"prompt 0 has 100 tokens.*max_length 78"):
        generator.generate([[5] * 100])
    with pytest.raises(ConfigError, match="batch_size"):
        generator.generate([[5]], batch_size=0)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        Generator(make_llama(), tokenizer, max_new_tokens=0)
    with pytest.raises(ConfigError, match="no generate"):
        Generator(torch.nn.Linear(2, 2), tokenizer)
    assert generator.generate([]) == []


def test_left_padding():
    ids, mask = pad_left([[1, 2, 3], [4]], pad_id=9)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
