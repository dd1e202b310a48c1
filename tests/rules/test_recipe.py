"""Directions written down and read again add the same bits; what cannot be written is refused by name before weights move."""

import io

import pytest
import torch
from tests.checks.rules import estimate, noise
from tests.support.models import CASES

from zotune.core.direction import HERE, Combination, Scaled, Stored
from zotune.core.masked import Masked
from zotune.core.noise import stream
from zotune.core.recipe import from_recipe, to_recipe
from zotune.core.site import Site
from zotune.errors import ConfigError
from zotune.optim.optimizer import ZO
from zotune.rules import make_rule

SITES = [Site("a.weight", (9, 70)), Site("b.bias", (13,))]
DIRECTIONS = {
    "noise": noise(0),
    "gaussian": noise(0, "gaussian"),
    "combination": (1 / 3) * noise(0) - 1e-30 * noise(1, "rademacher"),
    "tensor coefficient": torch.tensor(0.1, dtype=torch.float64) * noise(0),
    "scaled": Scaled(noise(0), {"a.weight": 0.1, "b.bias": torch.tensor(1 / 3, dtype=torch.float64)}, otherwise=0.0),
    "masked": Masked(noise(0), stream(1, "mask"), {"b.bias": 0.9}, 0.25),
    "nested": 0.7
    * Scaled(Combination() + 2.0 * noise(1) + Masked(noise(0), stream(1, "m"), {}, 0.5), {"a.weight": 3.0}),
    "nothing": HERE,
}


@pytest.mark.parametrize("name", DIRECTIONS)
def test_the_same_bits_after_writing_and_reading(name):
    direction, saved = DIRECTIONS[name], io.BytesIO()
    torch.save(to_recipe(direction), saved)
    saved.seek(0)
    recipe = torch.load(saved, weights_only=True)
    read = from_recipe(recipe)
    for site in SITES:
        for dtype in (torch.float32, torch.float64):
            assert torch.equal(direction.realise(site, dtype), read.realise(site, dtype))
        assert direction.touches(site) == read.touches(site)
    assert to_recipe(read) == recipe


def test_directions_of_tensors_are_refused_by_name():
    with pytest.raises(ConfigError, match=r"kind Stored .* rule 'momentum'"):
        to_recipe(1.0 * Stored({"a": torch.zeros(2)}))


@pytest.mark.parametrize("method", ["subzero", "lozo", "pgap", "grzo", "ldsd"])
def test_a_rule_that_keeps_recipes_is_refused_at_once(method):
    case = CASES["bare"](torch.float32)
    with pytest.raises(ConfigError, match=rf"those of method '{method}' hold tensors\. Use rule 'momentum'"):
        ZO(case.named, method, rule="momentum_replayed")


def test_without_a_mean_ldsd_has_recipes():
    case = CASES["bare"](torch.float32)
    opt = ZO(case.named, "ldsd", method_options={"lr_mu": 0}, rule="momentum_replayed", lr=1e-2)
    opt.step(case.closure)
    assert opt.last.accepted


def test_a_loaded_window_is_a_copy():
    rule = make_rule("momentum_replayed", {"window": 2})
    for k in range(3):
        rule.prepare(estimate(noise(k)))
    state = rule.state_dict()
    other = make_rule("momentum_replayed", {"window": 2})
    other.load_state_dict(state)
    state["past"][0]["key"][0] = 0
    state["past"].clear()
    assert other.state_dict() == rule.state_dict()


def test_windows_survive_a_change_of_their_length():
    rule = make_rule("momentum_replayed", {"window": 5})
    for k in range(5):
        rule.prepare(estimate(noise(k)))
    shorter = make_rule("momentum_replayed", {"window": 2})
    shorter.load_state_dict(rule.state_dict())
    assert shorter.state_dict()["past"] == rule.state_dict()["past"][-2:]
