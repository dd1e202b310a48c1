"""How much of a released ZO Fine-tuner was learned: docs/methods/zo_finetuner.png.

    python docs/plots/zo_finetuner.py llama1B_finetuner.pth          # or ZOTUNE_RELEASED_FINETUNER=... without argument

The file belongs to the released code and is not part of this project.
"""

import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from zotune.finetuner.fingerprint import cuda_networks, fingerprint
from zotune.finetuner.importer import read_released
from zotune.finetuner.networks import BOUNDS, from_flat

PICTURE = Path(__file__).parents[1] / "methods" / "zo_finetuner.png"
# mean, variance, losses, last sigma: weights of deviation 0.02 and a loss of 0.5
ASKED = (0.0, 4e-4, 0.5, 0.5, 1.0)


def main(path: str) -> None:
    """Print the numbers of the page and draw the picture."""
    released, _ = read_released(path)
    found = fingerprint(released)
    if found is None:
        sys.exit(f"{path} did not begin with CUDA's numbers of seed 42, so there is nothing to compare it with.")
    initial = from_flat(released.names, cuda_networks(found.number, found.seed, released.w1.dtype))
    features, all_of_them = torch.tensor([ASKED] * len(released.names)), range(len(released.names))
    before, after = initial.sigma(features, all_of_them), released.sigma(features, all_of_them)

    quantiles = [float(found.distance.double().quantile(q)) for q in (0.5, 0.95, 1.0)]
    print("largest change per network: median, 95 %, most", *(f"{q:.2e}" for q in quantiles))
    print("numbers unchanged", int((449 - found.changed).sum()), "of", 449 * len(released.names))
    print(
        "sigma: deviation between networks",
        f"{float(before.std()):.3f}",
        "range",
        *_range(before),
        "->",
        *_range(after),
    )
    print("median change of sigma", f"{float((after - before).abs().median()):.4f}")
    print("correlation", f"{float(torch.corrcoef(torch.stack([before, after]))[0, 1]):.3f}")
    order = (after - before).abs().argsort(descending=True)[:5].tolist()
    for i in order:
        print(f"  {released.names[i]}: {float(before[i]):.3f} -> {float(after[i]):.3f}")

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    left.semilogy(found.distance, ".", color="tab:blue")
    for bound, label in ((BOUNDS[0], "initial range of w1, b1"), (BOUNDS[2], "initial range of w2, b2")):
        left.axhline(bound, color="gray", linewidth=0.8)
        left.text(0, bound * 1.1, label, fontsize=8, color="gray")
    for start in found.runs[1:]:
        left.axvline(start - 0.5, color="lightgray", linewidth=0.8, linestyle="--")
    left.set(xlabel="network (dashed: next GPU)", ylabel="largest change of its 449 numbers", ylim=(3e-6, 1))
    right.plot([0, 1], [0, 1], color="gray", linewidth=0.8)
    right.plot(before, after, ".", color="tab:blue")
    right.set(xlabel="sigma of the initial network (random)", ylabel="sigma of the released network")
    right.set(xlim=(0, 0.8), ylim=(0, 0.8))
    figure.savefig(PICTURE, dpi=110)


def _range(values: torch.Tensor) -> tuple[str, str]:
    return f"{float(values.min()):.3f}", f"{float(values.max()):.3f}"


if __name__ == "__main__":
    named = sys.argv[1:2] or [os.environ.get("ZOTUNE_RELEASED_FINETUNER", "")]
    if not named[0]:
        sys.exit(__doc__)
    main(named[0])
