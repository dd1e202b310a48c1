"""A default that moves is another method under the same name. Each is what the method's file says, and why it says so."""

from dataclasses import MISSING, fields

import pytest

from zotune.methods import METHODS
from zotune.methods.sources import SOURCES
from zotune.rules import RULES

ONE = {"n": 1, "sides": 2}
GAUSSIAN = {"source": "gaussian", "source_options": {}}
SUBSPACE = {"rank": 8, "interval": 1000, "reshape": "auto"}  # the released code's rank, the paper's interval
FACTORS = {"rank": 2, "interval": 50}  # LOZO's scripts for OPT-13B
MASK = {"density": 0.25, "interval": 1000}  # ours; ZO-Bench's masks leave out another share than they say
DEFAULTS = {
    "mezo": ONE,
    "kerzoo": {
        "n": 1, "order": 3, "scale": None, "radius": 1.0, "min_radius": 0.0, "variant": "theory", "horizon": 4000,
        **GAUSSIAN,
    },
    "pgap": {
        "rank": 8, "h": 10, "k": 100, "delta_start": 2.0, "delta_end": 0.0, "horizon": None, "xi": "matrix", "svd": "exact",
        "scale": "none", "basis": "estimate", "cap": False,
    },
    "pizo": {"variant": "guiding", "pool": 4, "alpha": 0.5, "reuse": True, **GAUSSIAN},
    "ldsd": {
        "k": 5, "sigma": 1.0, "lr_mu": 1e-3, "normalise": False, "decay": 0.0, "mean": "fp32", "reuse": True,
        "variant": "corrected", "ratio": 1.0,
    },
    "zo_finetuner": {
        "finetuner": None, "networks": "folder", "init_seed": 0, "shuffle": None, "missing": "error", "normalise": True,
        "batch": 16, "world_size": 1, "dtype": "fp32", "digest": None,
    },
    "adaptive_scales": {"level": "kind", "power": 1.0, "explore": 4, "memory": 8.0, "rounds": 2, "limit": 10.0},
    "subzero": {**SUBSPACE, **ONE},
    "lozo": {**FACTORS, "momentum": 0.0},
    "es": {"n": 5, "baseline": "leave_one_out", "shaping": "none", **GAUSSIAN},
    "fzoo": {"n": 8, "normalise": True, "variant": "theory", "source": "rademacher", "source_options": {}},
    "grzo": {"normalise": True},
    "jaguar": {"ratio": 0.1, "n": 1, "unbiased": False},
    "forward_grad": {"n": 1, **GAUSSIAN},
    "conservative": {},
    "sparse": {**MASK, "kind": "random", "n": 1},
    "blockwise": {"level": "layer", "update": "together"},
}  # fmt: skip
OF_SOURCES = {"gaussian": {}, "rademacher": {}, "subzero": SUBSPACE, "lozo": FACTORS, "sparse": MASK}
OF_RULES = {
    "sgd": {},
    "sign": {},
    "momentum": {"beta": 0.9},
    "momentum_replayed": {"beta": 0.9, "window": 32},
    "adam": {"beta1": 0.9, "beta2": 0.999, "delta": 1e-8},
    "adamm": {"beta1": 0.9, "beta2": 0.999, "delta": 1e-10},
    "jaguar": {"beta": 0.9},
}


def defaults(kind):
    """Options of a class, by name, as a user who gives none gets them."""
    found = {}
    for option in fields(kind):
        if option.init:
            found[option.name] = option.default if option.default is not MISSING else option.default_factory()
    return found


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [(METHODS, DEFAULTS), (SOURCES, OF_SOURCES), (RULES, OF_RULES)],
    ids=["methods", "sources", "rules"],
)
def test_defaults(kinds, expected):
    assert {name: defaults(kinds[name]) for name in kinds} == expected
