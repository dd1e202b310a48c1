"""Kernels and steps on a CUDA device, as one command.

    python benchmarks/gpu.py [--sizes 1.3b 8b] [--rounds 7] [--parts check kernels step low_rank memory] [--json FILE]
    python benchmarks/gpu.py --dry        # tiny sizes on the CPU, kernels interpreted: tries the benchmark itself

First the Triton kernels are compared with the CPU, bit for bit; if they differ, nothing is timed. Then:

* kernels: bytes that a kernel must move over the time it takes, and that rate over the rate of a plain copy;
* step: a step over two plain forwards of the same batch with the same loss code, random Llama models, 2k tokens;
* low_rank: the same with low-rank directions, both signs in one forward, 16 x 32 tokens;
* memory: the peak of a step above what is held between steps and above the forward's own peak, as a share of the weights.

Candidates run interleaved in rotating order; a ratio is taken inside each round, and the median is printed, with the goal
beside it.
"""

import argparse
import os
import sys
from typing import Any

PARTS = ("check", "kernels", "step", "low_rank", "memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--sizes", nargs="+", default=["1.3b", "8b"], choices=["tiny", "1.3b", "8b"])
    parser.add_argument("--engines", nargs="+", default=["auto", "layerwise"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--numbers", type=int, default=1 << 30, help="elements of the tensors that kernels are timed on"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU; its times mean nothing")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if arguments.dry:
        os.environ["TRITON_INTERPRET"] = "1"
        arguments.sizes, arguments.rounds, arguments.numbers = ["tiny"], 1, 1 << 13
    run(arguments)


def run(arguments: argparse.Namespace) -> None:
    import gpu_parts as parts  # noqa: PLC0415 - after the environment is set
    from common import machine, torch, write  # noqa: PLC0415

    if not (arguments.dry or torch.cuda.is_available()):
        sys.exit("No CUDA device: nothing can be measured here. `--dry` tries the benchmark itself on the CPU.")
    arguments.device = "cpu" if arguments.dry else "cuda"
    result: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "dry": arguments.dry,
        "machine": {**machine(), "triton": parts.triton_version},
        "goals": parts.GOALS,
    }
    for part in PARTS:
        if part in arguments.parts or part == "check":
            print(f"\n{part}" + (" (dry: the times mean nothing)" if arguments.dry else ""), flush=True)
            result[part] = getattr(parts, part)(arguments)
    write(arguments.json, result)


if __name__ == "__main__":
    main()
