"""Methods: one paper per file. The registry is a plain dict; add a line for a new method."""

from dataclasses import MISSING, fields
from typing import Any

from zotune.core.registry import check_name, make
from zotune.core.step import Method
from zotune.methods.adaptive_scales import AdaptiveScales
from zotune.methods.blockwise import Blockwise
from zotune.methods.conservative import Conservative
from zotune.methods.es import ES
from zotune.methods.forward_grad import ForwardGrad
from zotune.methods.fzoo import FZOO
from zotune.methods.grzo import GRZO
from zotune.methods.jaguar import Jaguar
from zotune.methods.kerzoo import KerZOO
from zotune.methods.ldsd import LDSD
from zotune.methods.lozo import LOZO
from zotune.methods.mezo import MeZO
from zotune.methods.pgap import PGAP
from zotune.methods.pizo import Pizo
from zotune.methods.sparse import Sparse
from zotune.methods.subzero import SubZero
from zotune.methods.zo_finetuner import ZOFineTuner

METHODS: dict[str, type] = {
    "mezo": MeZO,
    "kerzoo": KerZOO,
    "pgap": PGAP,
    "pizo": Pizo,
    "ldsd": LDSD,
    "zo_finetuner": ZOFineTuner,
    "adaptive_scales": AdaptiveScales,
    "subzero": SubZero,
    "lozo": LOZO,
    "es": ES,
    "fzoo": FZOO,
    "grzo": GRZO,
    "jaguar": Jaguar,
    "forward_grad": ForwardGrad,
    "conservative": Conservative,
    "sparse": Sparse,
    "blockwise": Blockwise,
}


def make_method(method: "str | Method", options: dict[str, Any] | None = None) -> Method:
    """A method from its name and options, or the method itself.

    Raises:
        ConfigError: unknown name or option (the nearest known one is suggested), or an option out of range.
    """
    made: Method = make("method", METHODS, method, options)
    return made


def defaults(method: str) -> dict[str, Any]:
    """A method's options and their default values."""
    check_name("method", method, METHODS)
    return {f.name: f.default for f in fields(METHODS[method]) if f.default is not MISSING}
