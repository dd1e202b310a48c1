"""What every method keeps, whatever its paper: the contracts of one step, replay, resume, memory and forwards."""

import re

import pytest
import torch
from tests.checks import methods as checks
from tests.support.methods import VARIANTS
from tests.support.models import CASES

from zotune.core.recipe import to_recipe
from zotune.core.step import Method
from zotune.errors import ConfigError
from zotune.methods import METHODS
from zotune.rules import RULES

EACH = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.id)
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def test_every_method_is_here():
    assert {variant.method for variant in VARIANTS} == set(METHODS)


@EACH
def test_it_is_a_method(variant):
    method = variant.method_object()
    assert isinstance(method, Method)
    assert method.name == variant.method
    assert re.search(r"(19|20)\d\d", method.paper)  # a year, and an arXiv number where there is one
    assert type(method).__doc__


@EACH
def test_whether_its_estimates_have_recipes(variant):
    """What `has_recipe` says before the first step is what `to_recipe` finds after it."""
    case = CASES["bare"](torch.float32)
    opt = variant.optimizer(case)
    opt.step(case.closure)
    try:
        to_recipe(opt.last.estimate.direction)
    except ConfigError:
        assert not opt.method.has_recipe
    else:
        assert opt.method.has_recipe


@pytest.mark.parametrize("name", RULES)
def test_rules_say_what_they_keep(name):
    rule = RULES[name]
    assert rule.name == name
    assert rule.extra_state


@EACH
@DTYPE
@pytest.mark.parametrize("engine", ["in_place", "layerwise"])
def test_standing_still(variant, dtype, engine):
    checks.check_standing_still(variant, dtype, engine)


@EACH
def test_engines_agree(variant):
    checks.check_engines_agree(variant)


@EACH
@DTYPE
@pytest.mark.parametrize("name", ["llama", "lora", "mlp"])
def test_replay(variant, tmp_path, name, dtype):
    checks.check_replay(variant, tmp_path / "ledger.jsonl", name, dtype)


@EACH
@DTYPE
def test_resume(variant, tmp_path, dtype):
    checks.check_resume(variant, tmp_path / "state", dtype)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.can_wait], ids=lambda v: v.id)
@DTYPE
def test_resume_with_moves_waiting(variant, tmp_path, dtype):
    checks.check_resume(variant, tmp_path / "state", dtype, fold_every=3)


@EACH
def test_saving_changes_nothing(variant):
    checks.check_saving_changes_nothing(variant)


@EACH
def test_order_of_tensors(variant):
    checks.check_order_of_tensors(variant)


@pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if not v.reads_weights and v.rule == "sgd"], ids=lambda v: v.id
)
def test_eps_of_groups(variant):
    checks.check_eps_of_groups(variant)


@EACH
def test_forwards(variant):
    checks.check_forwards(variant)


@EACH
def test_extra_memory(variant):
    checks.check_extra_memory(variant)


@EACH
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite(variant, tmp_path, bad):
    checks.check_nonfinite(variant, tmp_path / "ledger.jsonl", bad)


@EACH
def test_equal_shapes_share_nothing(variant):
    checks.check_equal_shapes_share_nothing(variant)
