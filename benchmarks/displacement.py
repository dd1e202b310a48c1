"""What arrives in bf16 weights of the updates of a real run: a ledger is replayed under each way of keeping weights.

    python benchmarks/displacement.py --ledger runs/demo/ledger.jsonl [--layer 15] [--json FILE]

The losses are those of the ledger; the learning rate is scaled. For one layer's tensors the displacement of the stored
bf16 weights is compared with that of fp32 weights: cosine, and ratio of lengths. Noise depends on nothing but a tensor's
name, so one layer can be replayed without the others, and no forward pass is needed.
"""

import argparse
import sys
from dataclasses import replace
from typing import Any

import torch
from common import load, machine, write

import zotune
from zotune.core.ledger import Entry, LedgerFile, read_ledger

RATES = (3e-5, 1e-5, 3e-6, 1e-6)
STORAGES = ("carry", "plain", "stochastic")


def moved(
    base: dict[str, torch.Tensor], dtype: torch.dtype, storage: str, entries: list[Entry], seed: int
) -> torch.Tensor:
    """Where the stored weights end, minus where they began, as one fp32 vector."""
    parameters = {name: torch.nn.Parameter(tensor.to(dtype)) for name, tensor in base.items()}
    before = torch.cat([p.detach().float().view(-1) for p in parameters.values()])
    opt = zotune.ZO(list(parameters.items()), lr=0.0, eps=entries[0].groups[0]["eps"], seed=seed, low_precision=storage)
    zotune.replay(opt, entries)
    return torch.cat([p.detach().float().view(-1) for p in parameters.values()]) - before


def scaled(ledger: LedgerFile, rate: float) -> list[Entry]:
    """The ledger's steps with a constant learning rate."""
    return [replace(entry, groups=[{**entry.groups[0], "lr": rate}]) for entry in ledger.entries]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ledger", required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layer", type=int, default=15)
    parser.add_argument("--json")
    a = parser.parse_args()
    ledger = read_ledger(a.ledger)
    model = load(a.model, torch.float32, "cpu")
    inside = f".layers.{a.layer}."
    # bf16 starts from rounded weights; so does the fp32 run, or the rounding of the start would count as displacement
    base = {n: p.detach().bfloat16().float() for n, p in model.named_parameters() if inside in n}
    print(f"layer {a.layer}, {sum(t.numel() for t in base.values()):,} parameters, {len(ledger.entries)} steps")
    print(f"{'lr':>7} {'storage':11} {'cosine':>8} {'length':>8}")
    rows: list[dict[str, Any]] = []
    for rate in RATES:
        entries = scaled(ledger, rate)
        true = moved(base, torch.float32, "carry", entries, ledger.header["seed"])
        for storage in STORAGES:
            stored = moved(base, torch.bfloat16, storage, entries, ledger.header["seed"])
            cosine = float(torch.nn.functional.cosine_similarity(stored, true, dim=0))
            rows.append(
                {"lr": rate, "storage": storage, "cosine": cosine, "length": float(stored.norm() / true.norm())}
            )
            print(f"{rate:7.0e} {storage:11} {cosine:8.3f} {rows[-1]['length']:8.2f}", flush=True)
    write(a.json, {"command": " ".join(sys.argv), "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
