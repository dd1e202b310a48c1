"""Batches of the shapes that tasks have, tiny language models in fp64, and the loss as it is usually computed."""

import torch
from torch.nn import functional as F

from zotune.tasks.encoding import Encoded

VOCABULARY = 97
# options, tokens of the prompt and of an option from .. to: as SST-2, TREC, CB, multiple choice, COPA, only smaller
SHAPES = {
    "two words": (2, (3, 11), (1, 1)),
    "six words": (6, (3, 9), (1, 1)),
    "long prompts": (3, (18, 22), (1, 1)),
    "long options": (4, (9, 12), (3, 6)),
    "two sentences": (2, (2, 6), (2, 4)),
    "one answer": (1, (2, 12), (1, 5)),  # as the language-model loss asks
}


def batch_of(shape, count=5):
    """Random examples; options of several tokens begin alike now and then, which is where layouts are tried."""
    options, prompt, option = SHAPES[shape]
    generator = torch.Generator().manual_seed(3)

    def ids(between):
        length = int(torch.randint(between[0], between[1] + 1, (), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    made = []
    for number in range(count):
        own = [ids(option) for _ in range(options)]
        if options > 1 and option[1] > 1:
            own[1] = [own[0][0], *own[1]]
        made.append(Encoded(ids(prompt), tuple(own), number % options))
    return made


def usual_scores(model, batch):
    """(B, K): a padded row for each option with a mask, all logits, all log-probabilities, the mean over an option's."""
    rows = [example.prompt_ids + option for example in batch for option in example.option_ids]
    lengths = [len(option) for example in batch for option in example.option_ids]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    predicted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
    scores = []
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        first = len(row) - length
        scores.append(
            torch.stack([predicted[number, place - 1, row[place]] for place in range(first, len(row))]).mean()
        )
    return torch.stack(scores).view(len(batch), -1)


def usual_loss(model, batch):
    """Cross entropy of the right option among the options."""
    return F.cross_entropy(usual_scores(model, batch), torch.tensor([example.label for example in batch]))


def _seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().double()


def _llama(**settings):
    import transformers as hf

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**sizes, **heads, "initializer_range": 0.3, **settings}))


def _gpt2():
    import transformers as hf

    sizes = {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, bos_token_id=0, eos_token_id=0, **sizes))


def _opt():
    import transformers as hf

    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "init_std": 0.3}
    config = hf.OPTConfig(
        vocab_size=VOCABULARY, word_embed_proj_dim=8, max_position_embeddings=64, pad_token_id=0, **sizes
    )
    return hf.OPTForCausalLM(config)


# a tied and an untied head with rotary positions, learned positions, learned positions with an offset and a projection
MODELS = {
    "llama": lambda: _seeded(lambda: _llama(tie_word_embeddings=True)),
    "llama_untied": lambda: _seeded(_llama),
    "gpt2": lambda: _seeded(_gpt2),
    "opt": lambda: _seeded(_opt),
}
