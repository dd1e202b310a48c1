"""A classification loss against the usual way, and a whole training step against the literal loop with it.

    python benchmarks/classification.py [--model smollm2-135m] [--dtype bf16] [--rounds 5] [--threads 1] [--clock cpu]
    python benchmarks/classification.py --step --threads 2 --clock wall     # the end-to-end one

The usual way is that of the papers' code (`train_as_classification`): each option is a full padded row of prompt and
option, the model gives logits at all positions, and log-softmax of all of them is taken, in fp32 as in transformers' own
losses. Ours is the closure that `zotune train` makes. Both run under `torch.inference_mode`, interleaved, in rotating
order; a ratio is taken inside each round; the table shows the median and the range over rounds. Lengths are fixed, so
nothing is gained from padding, unless `--ragged` draws them about as of real rows, or `--data FOLDER` takes real rows from
FOLDER/<task>/train.jsonl.

With `--step`, a training step of zotune.ZO (default engine, our closure) against the literal four-pass loop (the usual
closure), on the first shape; both take two forwards.

`cpu` is the time of the process on all its threads; `wall` needs a machine where nothing else runs. Freed memory is kept
(`zotune.allocator`) for all candidates alike, or for none with ZOTUNE_ALLOCATOR=system, as in a plain script: the usual
way, with its larger tensors, then takes longer.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import DTYPES, load, machine, write
from literal_mezo import LiteralMeZO
from torch.nn import functional as F

import zotune
from zotune.allocator import keep_freed_memory
from zotune.models import load_model
from zotune.tasks.catalogue import find_task
from zotune.tasks.encoding import Encoded, encode_all, special_tokens
from zotune.tasks.objectives import Classification, closure_for
from zotune.tasks.rows import choose_rows, load_rows
from zotune.tasks.scoring import OptionScorer
from zotune.tasks.task import make_examples

# name: (options, tokens of the prompt, tokens of an option, the ratio aimed at in bf16)
SHAPES = {
    "sst2": (2, 40, 1, 0.33),
    "trec": (6, 40, 1, 0.14),
    "cb": (3, 160, 1, 0.19),
    "choice": (4, 96, 12, 0.24),
    "copa": (2, 20, 8, 0.55),
}
# tokens of prompts and of options from .. to, about as of real rows
RAGGED = {
    "sst2": ((6, 58), (1, 1)),
    "trec": ((8, 30), (1, 1)),
    "cb": ((40, 240), (1, 1)),
    "choice": ((40, 150), (5, 20)),
    "copa": ((8, 24), (4, 10)),
}
STEP_AIM = 8.0
LR = 1e-7  # not 0: an update that moves nothing is left out, and bf16 weights then carry no low-order bits
CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
Closure = Callable[[], torch.Tensor]


def batch_of(shape: str, model: Any, arguments: argparse.Namespace) -> list[Encoded]:
    """Examples of fixed or drawn lengths, or of real rows."""
    if not arguments.data:
        return drawn_examples(shape, arguments.batch, model.config.vocab_size, arguments.ragged)
    task, (_, tokenizer) = find_task(shape), load_model(arguments.model, dtype=torch.bfloat16)
    rows = choose_rows(load_rows(task, data_folder=Path(arguments.data) / shape)["train"], arguments.batch, seed=0)
    return encode_all(make_examples(task, rows, where="train"), tokenizer, 2048, **special_tokens(tokenizer))


def drawn_examples(shape: str, count: int, vocabulary: int, ragged: bool) -> list[Encoded]:
    options, *fixed_lengths = SHAPES[shape][:3]
    prompt, option = RAGGED[shape] if ragged else ((length, length) for length in fixed_lengths)
    generator = torch.Generator().manual_seed(0)

    def ids(between: tuple[int, int]) -> list[int]:
        length = int(torch.randint(between[0], between[1] + 1, (), generator=generator))
        return torch.randint(4, vocabulary, (length,), generator=generator).tolist()

    words = torch.randperm(vocabulary - 4, generator=generator)[:options].tolist()
    fixed = tuple([4 + word] for word in words)  # options of one token are the same for all examples
    made = []
    for number in range(count):
        text = ids(prompt)
        made.append(
            Encoded(text, fixed if option == 1 else tuple(ids(option) for _ in range(options)), number % options)
        )
    return made


def usual_closure(model: Any, batch: Sequence[Encoded], pad: int = 0) -> Closure:
    """The loss as the papers' code computes it: B * K full rows, all logits, log-softmax of all of them."""
    options = len(batch[0].option_ids)
    rows = [example.prompt_ids + option for example in batch for option in example.option_ids]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    taught = torch.zeros(
        (len(rows), width - 1), dtype=torch.bool, device=model.device
    )  # predicts a token of the option
    for number, row in enumerate(rows):
        length = len(batch[number // options].option_ids[number % options])
        taught[number, len(row) - 1 - length : len(row) - 1] = True
    labels = torch.tensor([example.label for example in batch], device=model.device)

    def closure() -> torch.Tensor:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        predicted = F.log_softmax(logits[:, :-1].float(), dim=-1)
        chosen = predicted.gather(-1, ids[:, 1:, None]).squeeze(-1)
        scores = (chosen * taught).sum(-1) / taught.sum(-1)
        return F.cross_entropy(scores.view(len(batch), options), labels)

    return closure


def measure(made: dict[str, Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, in rotating order, after one call of each to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    names = list(made)
    for candidate in made.values():
        candidate()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = clock()
            made[name]()
            seconds[name].append(clock() - start)
    return seconds


def row_of(seconds: dict[str, list[float]], ours: str, usual: str) -> dict[str, float]:
    ratios = [mine / base for mine, base in zip(seconds[ours], seconds[usual], strict=True)]
    return {
        "usual_ms": 1e3 * median(seconds[usual]),
        "ours_ms": 1e3 * median(seconds[ours]),
        "ratio": median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


def losses(model: Any, arguments: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    scorer = OptionScorer(model)
    print(f"{scorer.loss_reason}\n{scorer.layout_reason}")
    print(
        f"{'shape':8} {'usual ms':>9} {'ours ms':>9} {'ratio':>6}  {'range':14} {'aim':>5}  loss, and ours minus usual"
    )
    result: dict[str, Any] = {}
    for shape in arguments.shapes:
        batch = batch_of(shape, model, arguments)
        made = {
            "usual": torch.inference_mode()(usual_closure(model, batch)),
            "ours": torch.inference_mode()(closure_for(Classification(scorer), batch, None)),
        }
        usual, ours = (float(candidate()) for candidate in made.values())
        row = row_of(measure(made, arguments.rounds, clock), "ours", "usual")
        row |= {"loss": usual, "difference": ours - usual, "aim": SHAPES[shape][3]}
        print(
            f"{shape:8} {row['usual_ms']:9.0f} {row['ours_ms']:9.0f} {row['ratio']:6.3f}  {row['low']:.3f} .. "
            f"{row['high']:.3f} {row['aim']:5.2f}  {usual:.4f} {ours - usual:+.1e}",
            flush=True,
        )
        result[shape] = row
    return result


def steps(model: Any, arguments: argparse.Namespace, clock: Callable[[], float]) -> dict[str, Any]:
    shape = arguments.shapes[0]
    batch = batch_of(shape, model, arguments)
    opt = zotune.ZO(model.named_parameters(), lr=LR, eps=1e-2)
    ours, usual = closure_for(Classification(OptionScorer(model)), batch, None), usual_closure(model, batch)
    literal = LiteralMeZO(model, lr=LR, eps=1e-2)
    opt.step(ours)  # looks at the model once
    made = {"usual": lambda: literal.step(usual), "ours": lambda: opt.step(ours)}
    row = row_of(measure(made, arguments.rounds, clock), "ours", "usual")
    row |= {"times_faster": 1 / row["ratio"], "aim": STEP_AIM}
    print(f"engine {opt.engine.name}: {opt.engine.reason}")
    print(
        f"step of {shape}, batch {arguments.batch}: literal loop, full rows {row['usual_ms']:.0f} ms; ours "
        f"{row['ours_ms']:.0f} ms; {1 / row['ratio']:.1f} times faster ({1 / row['high']:.1f} .. {1 / row['low']:.1f}), "
        f"aim {STEP_AIM:g}"
    )
    return {shape: row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", default="cpu", choices=CLOCKS)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--ragged", action="store_true", help="draw lengths about as of real rows")
    parser.add_argument("--data", help="folder of tasks: take their real rows")
    parser.add_argument("--step", action="store_true", help="training steps, of the first shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if arguments.data:
        arguments.shapes = [shape for shape in arguments.shapes if shape != "choice"]  # which is no task
    torch.set_num_threads(arguments.threads)
    memory = keep_freed_memory()
    print(f"{arguments.model} {arguments.dtype}, {arguments.threads} threads, {arguments.clock} time; {memory}")
    model = load(arguments.model, DTYPES[arguments.dtype], arguments.device)
    rows = (steps if arguments.step else losses)(model, arguments, CLOCKS[arguments.clock])
    write(
        arguments.json,
        {"command": " ".join(sys.argv), "machine": machine(), "clock": arguments.clock, "memory": memory, "rows": rows},
    )


if __name__ == "__main__":
    main()
