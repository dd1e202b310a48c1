"""All weights."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from zotune.errors import ConfigError
from zotune.optim.parameters import default_eps
from zotune.tuning.base import BaseMode, Groups, Named


@dataclass(frozen=True)
class Full(BaseMode):
    """All weights.

    With `eps_by_scale`, norm weights and biases get an eps of their own: that of the matrices times the RMS of all norm
    weights (biases) over the RMS of all matrices, before training. Norm weights of 1 beside matrices of scale 0.05 are
    then probed 20 times as far, and move 20 * 20 = 400 times as fast at the same lr (the scale is in the probe and in
    the update). No source uses it and it has not been measured; it is off by default.
    """

    eps_by_scale: bool = False

    name: ClassVar[str] = "full"
    lr: ClassVar[float] = 1e-6
    eps: ClassVar[float | None] = None
    source: ClassVar[str] = "MeZO's for full tuning of OPT, Table 16"

    def __post_init__(self) -> None:
        """Check the type: `--mode-option eps_by_scale=0.1` would otherwise mean true."""
        self.check("eps_by_scale", isinstance(self.eps_by_scale, bool), "true or false")

    def attach(self, model: Any, seed: int) -> Any:
        """See `Mode.attach`."""
        return model

    def groups(self, named: Named, eps: float | None = None) -> Groups | None:
        """See `Mode.groups`. Matrices come first; a kind that is all zeros keeps their eps."""
        if not self.eps_by_scale:
            return None
        trained = [(name, tensor) for name, tensor in named if tensor.requires_grad]
        kinds: dict[str, list[tuple[str, Tensor]]] = {"matrix": [], "norm": [], "bias": []}
        for name, tensor in trained:
            kinds[kind_of(name, tensor)].append((name, tensor))
        if not kinds["matrix"]:
            raise ConfigError("eps_by_scale takes its measure from the model's matrices, and none is trained.")
        base = default_eps(tensor for _, tensor in trained) if eps is None else eps
        matrix = _rms(kinds["matrix"])
        made = []
        for pairs in kinds.values():
            ratio = _rms(pairs) / matrix if pairs and matrix else 1.0
            # three digits: another order of summation elsewhere must not change what the ledger's header says
            made.append({"params": pairs, "eps": float(f"{base * (ratio or 1.0):.3g}")})
        made[0]["eps"] = base
        return [group for group in made if group["params"]]


def kind_of(name: str, tensor: Tensor) -> str:
    """ "matrix" (two or more dimensions), "bias", or "norm" (the scale of a norm), by shape and canonical name."""
    if tensor.dim() >= 2:
        return "matrix"
    return "bias" if name.rsplit(".", 1)[-1] == "bias" else "norm"


def _rms(pairs: list[tuple[str, Tensor]]) -> float:
    total = sum(float(tensor.detach().double().square().sum()) for _, tensor in pairs)
    return math.sqrt(total / sum(tensor.numel() for _, tensor in pairs))
