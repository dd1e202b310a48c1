"""Output layers behind the body: multiplied for all points that shared the body's forward, when the first one asks.

The closure is called for one point after the other, and what it does between the body and the output layer is its own. But
mostly it picks rows out of what the body returned: the last token's, those with a label. So the rows that the first point
asks for are looked up in the body's answer, and the same rows of the other points are multiplied with it: a pair of large
matrices is one draw of noise and one reading of the weights. A later call is answered from that only if its input is what
was expected, number for number; otherwise it is computed by itself, as always, and nothing is looked up any more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zotune.core.direction import Direction
from zotune.core.weights import Slot, Weights
from zotune.engines.batched_low_rank import Points, ThinProducts, thin_terms
from zotune.engines.batched_modules import AT_ONCE
from zotune.engines.batched_serving import Shared
from zotune.engines.swapping import IN_CACHE
from zotune.kernels.workspace import workspace

PROBE = 8  # numbers of a row by which it is looked up
FEW = 16  # the outputs of all points may be this part of the layer's own matrix: a sixteenth


@dataclass
class _Ahead:
    layer: nn.Module
    inputs: Tensor  # (C, n, in)
    outputs: Tensor  # (C, n, out)


class AheadOfTime:
    """What output layers give for several points."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._made: list[_Ahead] = []
        self._wrong = False  # the closure does something else for other points
        self._sides: dict[int, ThinProducts] = {}  # by layer

    def forget(self) -> None:
        """The wave is over."""
        self._made = []

    def output(self, layer: nn.Linear, slot: Slot, x: Tensor, shared: Shared | None) -> Tensor | None:
        """What the layer gives at the present point, or None: then it has to be asked by itself."""
        if self._wrong or shared is None or len(shared.points) < 2 or not _suits(layer, slot, x, shared):
            return None
        rows = x.reshape(-1, x.shape[-1])
        found = self._look_up(layer, rows, shared.copy)
        if found is None and shared.copy == 0 and (inputs := _expected(rows, shared)) is not None:
            made = self._outputs(layer, slot, inputs, shared.points)
            self._made.append(_Ahead(layer, inputs, made))
            found = made[0]
        return None if found is None else found.view(*x.shape[:-1], -1)

    def _look_up(self, layer: nn.Linear, rows: Tensor, copy: int) -> Tensor | None:
        mine = [made for made in self._made if made.layer is layer]
        for made in mine:
            if torch.equal(made.inputs[copy], rows):
                return made.outputs[copy]
        self._wrong = bool(mine) and copy > 0
        return None

    # ------------------------------------------------------------------------------------------------------------------

    def _outputs(self, layer: nn.Linear, slot: Slot, inputs: Tensor, points: Sequence[Direction]) -> Tensor:
        thin = thin_terms(Points(points), slot.site, transposed=False)
        if thin is None:
            return self._dense(slot, inputs, tuple(points))
        sides, rows = self._sides.setdefault(id(layer), ThinProducts()), inputs.reshape(-1, inputs.shape[2])
        sides.ready(thin, 0, len(points), slot.tensor, {})
        made = F.linear(rows, slot.tensor)
        sides.add(made, rows)
        sides.done()
        return made.view(*inputs.shape[:2], -1)

    def _dense(self, slot: Slot, inputs: Tensor, points: tuple[Direction, ...]) -> Tensor:
        """Perturb and multiply as many rows of the matrix as stay in the cache."""
        site, like = slot.site, slot.tensor
        made = like.new_empty(*inputs.shape[:2], like.shape[0])
        step = max(1, IN_CACHE // site.width)
        for start in range(0, len(points), AT_ONCE):
            group, own = points[start : start + AT_ONCE], slice(start, start + AT_ONCE)
            for first in range(0, like.shape[0], step):
                part = site.row_range(first, min(first + step, like.shape[0]))
                flat = workspace("pieces", len(group) * part.numel, like.dtype, like.device)
                pieces = flat.view(len(group), -1, site.width)
                self.weights.perturb_many(slot, part, group, pieces.unbind())
                made[own, :, first : first + step] = torch.bmm(inputs[own], pieces.transpose(1, 2))
        return made


def _suits(layer: nn.Linear, slot: Slot, x: Tensor, shared: Shared) -> bool:
    """On a GPU comparing inputs would wait for it; many rows are not worth the memory, and fill the machine alone."""
    like = slot.tensor
    outputs = len(shared.points) * x.numel() // x.shape[-1] * like.shape[0]
    return (
        x.is_cpu
        and x.dtype == like.dtype
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and layer._parameters.get("bias") is None
        and 0 < outputs <= like.numel() // FEW
        and all(point.touches(slot.site) for point in shared.points)
    )


def _expected(rows: Tensor, shared: Shared) -> Tensor | None:
    """(C, n, in): the input if the closure picks the same rows of the body's answer at each point; None if it picks none."""
    for leaf in shared.leaves:
        if leaf.dtype != rows.dtype or leaf.dim() < 2 or leaf.shape[-1] != rows.shape[1]:
            continue
        copies = leaf.reshape(len(shared.points), -1, leaf.shape[-1])
        alike = (copies[0, None, :, :PROBE] == rows[:, None, :PROBE]).all(2)  # (n, rows of a copy)
        places = alike.to(torch.uint8).argmax(1)
        if torch.equal(copies[0, places], rows):
            return copies[:, places]
    return None
