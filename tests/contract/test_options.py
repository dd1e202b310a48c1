"""Options of a wrong kind are refused with a sentence that names them, before any work starts."""

from dataclasses import FrozenInstanceError, dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch

from zotune import ZO
from zotune.core.options import check_kinds
from zotune.core.registry import make
from zotune.errors import ConfigError
from zotune.methods import METHODS
from zotune.methods.mezo import MeZO
from zotune.methods.sources import SOURCES
from zotune.rules import RULES
from zotune.tuning import MODES

KNOWN = {"method": METHODS, "rule": RULES, "source": SOURCES, "mode": MODES}
ALL = [
    (kind, name, field.name) for kind, known in KNOWN.items() for name, cls in known.items() for field in fields(cls)
]


def zo(**settings):
    return ZO(list(torch.nn.Linear(3, 2).named_parameters()), **settings)


@pytest.mark.parametrize(("kind", "name", "option"), ALL)
def test_no_option_takes_a_list(kind, name, option):
    with pytest.raises(ConfigError, match=rf"{option} must be .*got \[1\] \({kind} '{name}'\)"):
        make(kind, KNOWN[kind], name, {option: [1]})


@pytest.mark.parametrize("value", ["three", 1.5, True, None, float("nan")])
def test_whole_numbers(value):
    with pytest.raises(ConfigError, match="n must be a whole number"):
        zo(method_options={"n": value})


def test_an_object_is_checked_too():
    with pytest.raises(ConfigError, match=r"n must be a whole number; got 1.5 \(method 'mezo'\)"):
        zo(method=MeZO(n=1.5))


@pytest.mark.parametrize("value", [np.int64(3), 3])
def test_numbers_of_other_libraries_will_do(value):
    assert zo(method_options={"n": value}).method.n == 3
    assert zo(method="kerzoo", method_options={"scale": np.float32(2)}).method.scale == 2


def test_none_where_none_may_stand_and_a_whole_number_where_a_number_may():
    assert zo(method="pgap", method_options={"horizon": None}).method.horizon is None
    assert zo(method="lozo", method_options={"momentum": 0}).method.momentum == 0
    with pytest.raises(ConfigError, match="horizon must be a whole number or none; got 'x'"):
        zo(method="pgap", method_options={"horizon": "x"})


def test_fields_that_are_annotated_otherwise_are_the_users_own():
    @dataclass
    class Own:
        table: list[int]
        anything: Any
        late: "NotDefinedHere"  # noqa: F821

    check_kinds("method 'own'", Own, {"table": 3, "anything": 3, "late": 3})

    @dataclass
    class Mixed:
        table: list[int] | int
        n: int

    check_kinds("method 'own'", Mixed, {"table": "x"})
    with pytest.raises(ConfigError, match="n must be a whole number"):
        check_kinds("method 'own'", Mixed, {"n": "x"})


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        *(("seed", value) for value in (1.5, "1", None)),
        *(("fold_every", value) for value in (1.5, "1", None)),
        *(("lr", value) for value in ("1e-6", None, float("nan"), torch.ones(2))),
        *(("eps", value) for value in ("1e-3", float("inf"), [1e-3])),
        *(("weight_decay", value) for value in ("0", -1.0)),
    ],
)
def test_settings(setting, value):
    with pytest.raises(ConfigError, match=f"{setting} must be"):
        zo(**{setting: value})


def test_a_learning_rate_may_be_a_tensor():
    """As in torch.optim, for schedules that are compiled."""
    opt = zo(lr=torch.tensor(1e-3), seed=np.int64(3))
    assert opt.seed == 3
    assert "lr must" not in str(opt)


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, known in KNOWN.items() for name in known])
def test_options_are_fixed_once_made(kind, name):
    """They are checked once and written into the ledger's header; what is made of them would not follow."""
    made = make(kind, KNOWN[kind], name, {"networks": "untrained"} if name == "zo_finetuner" else {})
    for field in fields(made):
        with pytest.raises(FrozenInstanceError):
            setattr(made, field.name, getattr(made, field.name))
