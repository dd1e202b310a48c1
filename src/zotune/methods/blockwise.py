"""Block-wise: one pair of probes per block of the model.

The block-wise (module-wise) perturbation of Zhang, Li, Hong, Li, Zhang, Zheng et al., "Revisiting Zeroth-Order
Optimization for Memory-Efficient LLM Fine-Tuning: A Benchmark", ICML 2024, arXiv 2402.11592:

    z ~ N(0, I),   z_b = z on the tensors of block b and 0 elsewhere
    rho_b = [ L(theta + eps z_b) - L(theta - eps z_b) ] / (2 eps)        for each block b
    g = sum_b rho_b z_b

Forwards per step: 2 for each block (86 for OPT-13B's 40 layers, 2 embeddings and final norm). Extra memory: none.

E[g] = grad L, and E|g|^2 = sum_b (d_b + 2) |grad_b L|^2: with B blocks of equal size about B times less than MeZO's
(d + 2) |grad L|^2, at B times the forwards; the same as MeZO with n = B to leading order.

`update`: "together" probes all blocks at the same weights. "each" is block-coordinate descent: a block is probed where the
earlier ones have moved already,

    rho_b = [ L(theta - lr g_{<b} + eps z_b) - L(theta - lr g_{<b} - eps z_b) ] / (2 eps),

which needs a rule that can be tried. The released code does that by default; the order here is that of the blocks' names
(numbers counted), not that of the model. The logged loss is the mean of all probes, or of the first pair with "each",
since later ones are asked elsewhere. The released code seeds all blocks of a step alike, so blocks of one shape share
their noise, and it logs the mean of the plus sides.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from zotune.core.context import Context, Estimate
from zotune.core.direction import HERE, Combination, Scaled
from zotune.core.site import Site
from zotune.methods.base import Base

_LAYER = re.compile(r"((?:.*?\.)?\d+)\.")  # model.layers.3. or transformer.h.3. or 3.


@dataclass(frozen=True)
class Blockwise(Base):
    """Central differences block by block."""

    level: str = "layer"  # "layer", "module" (attention, mlp, each norm of a layer) or "tensor"
    update: str = "together"  # "together": all blocks are probed at the same weights; "each": one after the other

    name: ClassVar[str] = "blockwise"
    paper: ClassVar[str] = "Zhang et al. 2024, arXiv 2402.11592"

    def __post_init__(self) -> None:
        """Check the ranges."""
        self.check("level", self.level in _LEVELS, f"one of {', '.join(map(repr, _LEVELS))}")
        self.check("update", self.update in ("together", "each"), "'together' or 'each'")

    @property
    def needs(self) -> frozenset[str]:
        """Blocks after the first are probed where the rule has moved the earlier ones."""
        return frozenset({"trial"}) if self.update == "each" else frozenset()

    @property
    def forwards(self) -> float:
        """Queries per block; `forwards_for` knows how many blocks there are."""
        return 2

    def forwards_for(self, sites: Sequence[Site]) -> float:
        """Queries per step."""
        return 2 * len(blocks_of(sites, self.level))

    def estimate(self, ctx: Context) -> Estimate:
        """The sum of the blocks' slopes times their parts of one direction."""
        # Noise is keyed by tensor, so the blocks' parts of one stream are independent. The part of a block does not depend on
        # which other blocks there are.
        g, eps, z = Combination(), ctx.eps, ctx.gaussian()
        rhos, losses = [], []
        for names in blocks_of(ctx.sites, self.level).values():
            z_b = Scaled(z, dict.fromkeys(names, 1.0), otherwise=0.0)
            moved = ctx.trial(g) if self.update == "each" and g else HERE
            plus, minus = ctx.loss([moved + eps * z_b, moved - eps * z_b])
            rho = (plus - minus) / (2 * eps)
            g += rho * z_b
            rhos.append(rho)
            losses.append((plus + minus) / 2)
        loss = losses[0] if self.update == "each" else sum(losses) / len(losses)
        slopes = torch.stack(rhos)
        return Estimate(g, loss, {"rho": slopes[slopes.abs().argmax()]})


def blocks_of(sites: Sequence[Site], level: str) -> dict[str, list[str]]:
    """The blocks: name -> names of their tensors, in an order that does not depend on the order of the sites.

    A tensor whose name has no layer number belongs to the block of its module: each embedding, the final norm, the head.

    Args:
        sites: the trained tensors.
        level: "layer", "module" or "tensor".
    """
    blocks: dict[str, list[str]] = {}
    for site in sites:
        blocks.setdefault(_LEVELS[level](site.name), []).append(site.name)
    return {name: sorted(blocks[name]) for name in sorted(blocks, key=_natural)}


def _layer(name: str) -> str:
    found = _LAYER.match(name)
    return found[1] if found else name.rpartition(".")[0] or name


def _module(name: str) -> str:
    found = _LAYER.match(name)
    if not found:
        return _layer(name)
    child, _, rest = name[found.end() :].partition(".")
    return f"{found[1]}.{child}" if rest else found[1]


def _tensor(name: str) -> str:
    return name


def _natural(name: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


_LEVELS = {"layer": _layer, "module": _module, "tensor": _tensor}
