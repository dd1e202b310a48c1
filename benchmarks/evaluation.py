"""What an evaluation saves by sorting, by needed logits only, and by shared prompts, against the usual way.

    python benchmarks/evaluation.py [--model proportions] [--rounds 3] [--threads 1] [--json FILE]

The usual way: every option is a full row (prompt and option), rows come in the order of the examples, and the model gives
logits for all tokens. Candidates add one thing at a time; all score the same examples and are checked to agree. Shapes are
those of tasks (random tokens; lengths as of real rows). The model `proportions` is random, with the ratio of body to head
of SmolLM2-135M; other names are loaded. Candidates of a shape run interleaved; the table shows medians and ratios inside
each round.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
import transformers
from common import load, machine, write

from zotune.evaluation.evaluate import evaluate
from zotune.tasks.encoding import Encoded
from zotune.tasks.scoring import OptionScorer

# name: (examples, options, tokens of prompts from .. to, tokens of options from .. to)
SHAPES = {
    "sst2": (32, 2, (6, 58), (1, 1)),
    "trec": (32, 6, (8, 30), (1, 1)),
    "copa": (32, 2, (6, 15), (4, 9)),
    "record": (2, 24, (180, 280), (15, 35)),
}
BATCH = 16


def proportions() -> Any:
    """A tied Llama of 5.6 million parameters, a fifth of them the head's, as in SmolLM2-135M."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=192, intermediate_size=512, num_hidden_layers=10, num_attention_heads=6, num_key_value_heads=2,
        vocab_size=6144, tie_word_embeddings=True, max_position_embeddings=1024, initializer_range=0.1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def examples_of(shape: str, vocabulary: int) -> list[Encoded]:
    count, options, prompt, option = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)

    def ids(between: tuple[int, int]) -> list[int]:
        length = int(torch.randint(between[0], between[1] + 1, (), generator=generator))
        return torch.randint(4, vocabulary, (length,), generator=generator).tolist()

    fixed = tuple(ids(option) for _ in range(options))  # a classification's options are the same for all rows
    made = []
    for _ in range(count):
        text = ids(prompt)
        made.append(Encoded(text, fixed if option[1] == 1 else tuple(ids(option) for _ in range(options)), 0))
    return made


@torch.no_grad()
def full_rows(model: Any, examples: Sequence[Encoded], in_order: bool) -> torch.Tensor:
    """Scores (N, K): a row per option, all logits."""
    pairs = [(n, k) for n, example in enumerate(examples) for k in range(len(example.option_ids))]
    if not in_order:
        pairs.sort(key=lambda pair: len(examples[pair[0]].prompt_ids) + len(examples[pair[0]].option_ids[pair[1]]))
    found = torch.zeros(len(examples), len(examples[0].option_ids))
    for start in range(0, len(pairs), BATCH):
        chosen = pairs[start : start + BATCH]
        rows = [examples[n].prompt_ids + examples[n].option_ids[k] for n, k in chosen]
        width = max(map(len, rows))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        predicted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float().log_softmax(-1)
        for place, (n, k) in enumerate(chosen):
            option, first = examples[n].option_ids[k], len(examples[n].prompt_ids)
            found[n, k] = predicted[place, torch.arange(first - 1, first - 1 + len(option)), option].mean()
    return found


def own_rows(scorer: OptionScorer, examples: Sequence[Encoded]) -> torch.Tensor:
    """Scores (N, K): a row per option, only the logits asked for, sorted by length."""
    options = len(examples[0].option_ids)
    single = [Encoded(example.prompt_ids, (option,), 0) for example in examples for option in example.option_ids]
    order = sorted(range(len(single)), key=lambda index: single[index].length)
    found = torch.zeros(len(single))
    with torch.no_grad():
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            found[chosen] = scorer.scores([single[index] for index in chosen])[:, 0]
    return found.view(len(examples), options)


def candidates(model: Any, scorer: OptionScorer, examples: list[Encoded]) -> dict[str, Callable[[], torch.Tensor]]:
    return {
        "usual": lambda: full_rows(model, examples, in_order=True),
        "+ sorted by length": lambda: full_rows(model, examples, in_order=False),
        "+ needed logits": lambda: own_rows(scorer, examples),
        "+ shared prompts (zotune)": lambda: evaluate(scorer, examples, batch_size=BATCH).scores,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="proportions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = proportions() if arguments.model == "proportions" else load(arguments.model, torch.float32, "cpu")
    scorer = OptionScorer(model)
    result: dict[str, Any] = {"command": " ".join(sys.argv), "machine": machine(), "shapes": {}}
    print(f"{'shape':7} {'candidate':26} {'ms/example':>10} {'usual/this':>10}  range")
    for shape in arguments.shapes:
        examples = examples_of(shape, model.config.vocab_size)
        made = candidates(model, scorer, examples)
        wanted = made["usual"]()
        for name, candidate in made.items():  # warm up, and agree: fp32 sums of log-probabilities near -10
            torch.testing.assert_close(candidate(), wanted, rtol=0, atol=1e-3, msg=name)
        seconds: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(arguments.rounds):
            for name, candidate in made.items():
                start = time.perf_counter()
                candidate()
                seconds[name].append(time.perf_counter() - start)
        rows = {}
        for name, values in seconds.items():
            ratios = [base / value for base, value in zip(seconds["usual"], values, strict=True)]
            row = {
                "ms": 1e3 * median(values) / len(examples),
                "ratio": median(ratios),
                "low": min(ratios),
                "high": max(ratios),
            }
            print(
                f"{shape:7} {name:26} {row['ms']:10.1f} {row['ratio']:10.2f}  {row['low']:.2f} .. {row['high']:.2f}",
                flush=True,
            )
            rows[name] = row
        result["shapes"][shape] = rows
    write(arguments.json, result)


if __name__ == "__main__":
    main()
