"""Engines: how queries are answered. A method never knows which one it runs on."""

from zotune.core.step import Engine, Method
from zotune.core.weights import Weights
from zotune.engines.batched import Auto, Batched
from zotune.engines.in_place import InPlace
from zotune.engines.layerwise import Layerwise
from zotune.errors import ConfigError

ENGINES: dict[str, type] = {
    "layerwise": Layerwise,
    "in_place": InPlace,
    "batched": Batched,
}
CHOICES: dict[str, type] = {"auto": Auto, **ENGINES}


def make_engine(engine: str, weights: Weights, method: Method, smooth: bool = True) -> Engine:
    """An engine by name. "auto" works for every closure: batched or layer by layer, by size; in place what hooks miss.

    Args:
        engine: one of CHOICES.
        weights: what it perturbs.
        method: whose queries it answers.
        smooth: whether two engines' losses can be compared; see `Layerwise.compares`.
    """
    if engine not in CHOICES:
        raise ConfigError(f"engine must be {', '.join(map(repr, CHOICES))}; got {engine!r}.")
    made: Engine = CHOICES[engine](weights)
    if isinstance(made, Layerwise):
        made.compares = smooth
    missing = method.needs - made.offers - {"trial"}
    if missing:
        raise ConfigError(
            f"Method {method.name!r} needs {', '.join(sorted(missing))}, which engine {made.name!r} does not offer."
        )
    return made
