"""Engines: how queries are answered. A method never knows which one it runs on."""

from zotune.core.errors import ConfigError
from zotune.core.step import Engine, Method, Rule
from zotune.core.weights import Weights
from zotune.engines.in_place import InPlace
from zotune.engines.layerwise import Layerwise

ENGINES: dict[str, type] = {
    "layerwise": Layerwise,
    "in_place": InPlace,
}


def make_engine(engine: str, weights: Weights, method: Method, rule: Rule) -> Engine:
    """An engine by name. "auto" is layerwise: it works for every closure, since what hooks miss is perturbed in place."""
    if engine != "auto" and engine not in ENGINES:
        raise ConfigError(f"engine must be 'auto', {', '.join(map(repr, ENGINES))}; got {engine!r}.")
    made: Engine = ENGINES["layerwise" if engine == "auto" else engine](weights)
    if "trial" in method.needs - rule.offers:
        raise ConfigError(
            f"Method {method.name!r} tries what the rule would do before it does it. Rule {rule.name!r} cannot be tried: it "
            "remembers earlier steps, so that the opposite step does not undo a step. Use rule 'sgd' or 'sign'."
        )
    missing = method.needs - made.offers - {"trial"}
    if missing:
        raise ConfigError(
            f"Method {method.name!r} needs {', '.join(sorted(missing))}, which engine {made.name!r} does not offer."
        )
    return made
