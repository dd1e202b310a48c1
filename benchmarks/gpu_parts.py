"""The parts of `gpu.py`. A module of its own, because triton looks at TRITON_INTERPRET when kernels are imported."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from statistics import median
from typing import Any

import torch
import transformers
import triton
from common import make_closure

import zotune
from zotune.engines import ENGINES
from zotune.kernels.contract import Addition, Run, Term
from zotune.kernels.reference import ReferenceBackend
from zotune.kernels.triton_many import Triton

triton_version = triton.__version__
GOALS = {"step": 1.15, "low_rank": 1.0, "memory": 0.01}
LLAMA = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "tiny": (64, 128, 2, 4, 2, 512),
    "1.3b": (2048, 5504, 24, 16, 16, 50304),
    "8b": (4096, 14336, 32, 32, 8, 128256),
}

# ----------------------------------------------------------------------------------------------------------------------
# Bits


BOOKS = (["normal"], ["rademacher"], ["normal", "rademacher", "normal"])


def check(arguments: argparse.Namespace) -> dict[str, int]:
    """Kernels against the CPU: updates and both signs, runs and chosen rows."""
    count, width = (3000, 64) if arguments.dry else (1_000_003, 577)
    rows = torch.randint(0, 50_000, (count // width,), generator=torch.Generator().manual_seed(1))
    runs = [Run(3 << 40, start, count) for start in (0, 12_345, (1 << 41) + 8)] + [Run(3 << 40, 0, 0, rows, width)]
    compared = 0
    for dtype, books, run in product((torch.float32, torch.bfloat16, torch.float16), BOOKS, runs[2 * arguments.dry :]):
        ours = moved(Triton(), arguments.device, dtype, books, run)
        theirs = moved(ReferenceBackend(), "cpu", dtype, books, run)
        for mine, other in zip(ours, theirs, strict=True):
            compared += mine.numel()
            if not torch.equal(mine, other):
                share = float((mine != other).double().mean())
                sys.exit(f"The kernels differ from the CPU in {share:.1%} of the numbers: {dtype}, {books}, {run}.")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compared += check_many(arguments.device, dtype)
    print(f"{compared:,} numbers have the CPU's bits")
    return {"numbers": compared}


def check_many(device: str, dtype: torch.dtype) -> int:
    """One launch for several tensors against an update of each on the CPU."""
    sets = []
    for place in (device, "cpu"):
        items = []
        for k, size in enumerate((4096, 20_000, 33, 16)):
            stored = torch.randn(size, generator=torch.Generator().manual_seed(k)).to(place, dtype)
            carried = None if dtype == torch.float32 else torch.zeros(size, dtype=torch.int16, device=place)
            items.append(Addition(stored, carried, k, [Term((1, 2), "normal", 1e-3)]))
        sets.append(items)
    Triton().update_many(sets[0])
    for mine, other in zip(*sets, strict=True):
        ReferenceBackend().update(other.stored, other.carried, Run(other.site, 0, other.stored.numel()), other.terms)
        if not torch.equal(mine.stored.cpu(), other.stored):
            sys.exit(f"The launch for many tensors differs from the CPU: {dtype}, {other.stored.numel()} numbers.")
    return sum(item.stored.numel() for item in sets[0])


def moved(backend: Any, device: str, dtype: torch.dtype, books: list[str], run: Run) -> list[torch.Tensor]:
    """What is stored and carried after an update, and both perturbed tensors."""
    terms = [Term((k, 77), book, (1e-3, -0.5, 3e-4)[k]) for k, book in enumerate(books)]
    size = run.count if run.rows is None else run.rows.numel() * run.width
    stored = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    carried = None if dtype == torch.float32 else torch.zeros(size, dtype=torch.int16, device=device)
    run = run if run.rows is None else replace(run, rows=run.rows.to(device))
    outs = [(torch.empty_like(stored), sign) for sign in (1.0, -1.0)]
    backend.update(stored, carried, run, terms)
    backend.perturb(outs, stored, carried, run, terms)
    return [tensor.cpu() for tensor in (stored, carried, *(out for out, _ in outs)) if tensor is not None]


# ----------------------------------------------------------------------------------------------------------------------
# Kernels


def kernels(arguments: argparse.Namespace) -> dict[str, Any]:
    """GB/s of each kernel, and its share of a copy's."""
    count, device = arguments.numbers, arguments.device
    backend, run = Triton(), Run(3 << 40, 0, count)
    table: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.float32):
        stored, size = torch.zeros(count, dtype=dtype, device=device), dtype.itemsize
        plus, minus = torch.empty_like(stored), torch.empty_like(stored)
        carried = torch.zeros(count, dtype=torch.int16, device=device) if size == 2 else None
        low = 0 if carried is None else 2
        made: dict[str, tuple[int, Callable[[], Any]]] = {"copy": (2 * size, lambda a=plus, b=stored: a.copy_(b))}
        for book in ("normal", "rademacher"):
            one = [Term((1, 2), book, 1e-3)]
            both = [(plus, 1.0), (minus, -1.0)]
            made |= {
                f"{book}, in place": (2 * size, lambda s=stored, t=one: backend.perturb([(s, 1.0)], s, None, run, t)),
                f"{book}, both signs": (3 * size, lambda s=stored, t=one, o=both: backend.perturb(o, s, None, run, t)),
                f"{book}, update": (2 * (size + low), lambda s=stored, c=carried, t=one: backend.update(s, c, run, t)),
            }
        four = [Term((k, 2), "normal", 1e-3) for k in range(4)]
        items = [
            Addition(tensor, low_bits, k, four[:1])
            for k, (tensor, low_bits) in enumerate(cut(stored, carried, 2 if arguments.dry else 256))
        ]
        many = backend.many
        made |= {
            "normal, update of 4 streams": (
                2 * (size + low),
                lambda s=stored, c=carried, t=four: backend.update(s, c, run, t),
            ),
            f"normal, update of {len(items)} tensors": (2 * (size + low), lambda m=many, i=items: m.update(i)),
        }
        seconds = timed({name: call for name, (_, call) in made.items()}, arguments)
        rate = {name: bytes_ * count / median(seconds[name]) / 1e9 for name, (bytes_, _) in made.items()}
        for name in made:
            print(f"{str(dtype)[6:]:9} {name:28} {rate[name]:9.1f} GB/s {rate[name] / rate['copy']:6.2f} of a copy")
        table[str(dtype)[6:]] = {name: {"GB/s": rate[name], "of a copy": rate[name] / rate["copy"]} for name in made}
    return table


def cut(stored: torch.Tensor, carried: torch.Tensor | None, pieces: int) -> list[Any]:
    """A tensor and its carried bits as many tensors."""
    size = max(16, stored.numel() // pieces)
    halves = [None] * pieces if carried is None else carried.split(size)
    return list(zip(stored.split(size), halves, strict=False))


# ----------------------------------------------------------------------------------------------------------------------
# Steps


def step(arguments: argparse.Namespace) -> dict[str, Any]:
    """Dense directions."""
    return steps(arguments, "step", (2, 8) if arguments.dry else (8, 256), {"method": "mezo"}, arguments.engines)


def low_rank(arguments: argparse.Namespace) -> dict[str, Any]:
    """Low-rank directions, both signs in one forward, moves folded into the weights every 50 steps."""
    shape = (2, 8) if arguments.dry else (16, 32)
    return steps(
        arguments, "low_rank", shape, {"method": "lozo", "method_options": {"rank": 4}, "fold_every": 50}, ["batched"]
    )


def steps(arguments: argparse.Namespace, part: str, shape: tuple[int, int], settings: Any, engines: list[str]) -> Any:
    table: dict[str, Any] = {}
    for size in arguments.sizes:
        model, closure = llama(size, shape, arguments.device)

        def two_forwards(closure: Callable[[], Any] = closure) -> None:
            with torch.inference_mode():
                closure().double() + closure().double()

        made: dict[str, Callable[[], Any]] = {"two forwards": two_forwards}
        reasons = {}
        for engine in engines:
            engine = engine if engine == "auto" or engine in ENGINES else "auto"
            opt = zotune.ZO(model.named_parameters(), lr=1e-9, eps=1e-2, engine=engine, **settings)
            made[f"zotune {engine}"] = lambda opt=opt, closure=closure: opt.step(closure)
            reasons[f"zotune {engine}"] = opt
        seconds = timed(made, arguments)
        for name, values in seconds.items():
            ratio = median(v / base for v, base in zip(values, seconds["two forwards"], strict=True))
            goal = "" if name == "two forwards" else f"  goal {GOALS[part]:.2f}"
            print(
                f"{size:5} {shape[0]} x {shape[1]}  {name:18} {1e3 * median(values):9.2f} ms {ratio:6.2f}{goal}",
                flush=True,
            )
            table.setdefault(size, {})[name] = {"ms": 1e3 * median(values), "ratio": ratio}
            if name in reasons:
                table[size][name]["reason"] = reasons[name].engine.reason
        del model, closure, made, reasons, opt, two_forwards
        empty(arguments)
    return table


def memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Peak of a step above what is held and above a forward's, as a share of the weights; the carried bits are held."""
    table: dict[str, Any] = {}
    for size in arguments.sizes:
        model, closure = llama(size, (2, 8) if arguments.dry else (8, 256), arguments.device)
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        with torch.inference_mode():
            closure()
            forward = peak_of(closure, arguments)
        before = held(arguments)
        opt = zotune.ZO(model.named_parameters(), lr=1e-9, eps=1e-2)
        for _ in range(2):
            opt.step(closure)
        between = held(arguments) - before
        peak = peak_of(lambda opt=opt, closure=closure: opt.step(closure), arguments)
        above = (peak - forward) / weights
        print(
            f"{size:5} weights {weights / 2**30:6.2f} GiB, forward's peak {forward / 2**30:6.2f}, held between steps "
            f"{between / weights:6.1%} of the weights, a step above the forward {above:6.2%}  goal {GOALS['memory']:.0%}"
        )
        table[size] = {"weights": weights, "forward": forward, "held": between, "peak": peak, "above": above}
        del model, closure, opt
        empty(arguments)
    return table


def llama(size: str, shape: tuple[int, int], device: str) -> tuple[Any, Callable[[], Any]]:
    """A random bf16 Llama and one forward on fixed random tokens: cross entropy of the last token."""
    hidden, intermediate, layers, heads, groups, vocabulary = LLAMA[size]
    config = transformers.LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = transformers.LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(default)
    return model, make_closure(model, shape, "last")


# ----------------------------------------------------------------------------------------------------------------------
# Measuring


def timed(made: dict[str, Callable[[], Any]], arguments: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each candidate in each round, after three calls of each to compile, allocate and look at the model."""
    for call in made.values():
        for _ in range(1 if arguments.dry else 3):
            call()
    names, seconds = list(made), {name: [] for name in made}
    for turn in range(arguments.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            wait(arguments)
            start = time.perf_counter()
            made[name]()
            wait(arguments)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(arguments: argparse.Namespace) -> None:

    if not arguments.dry:
        torch.cuda.synchronize()


def held(arguments: argparse.Namespace) -> int:

    return 0 if arguments.dry else torch.cuda.memory_allocated()


def peak_of(call: Callable[[], Any], arguments: argparse.Namespace) -> int:
    """Bytes that a call takes at most, above what is held before it."""
    if arguments.dry:
        call()
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = held(arguments)
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def empty(arguments: argparse.Namespace) -> None:

    if not arguments.dry:
        torch.cuda.empty_cache()
