"""Directions written down as numbers, strings, lists and dicts, and read again: for states that outlive the process.

Floats are kept exactly. Directions that hold whole tensors have no short recipe and are refused by name.
"""

from collections.abc import Callable
from typing import Any

from zotune.core.direction import Combination, Direction, Noise, Scaled
from zotune.core.masked import Masked
from zotune.core.noise import Stream
from zotune.errors import ConfigError

Recipe = dict[str, Any]


def to_recipe(direction: Direction) -> Recipe:
    """A direction in numbers and strings.

    Raises:
        ConfigError: a direction made of tensors, or of a kind that is not known here.
    """
    kind = type(direction).__name__
    if kind not in _KINDS:
        raise ConfigError(
            f"A direction of kind {kind} cannot be written down as a few numbers; it needs {', '.join(_KINDS)}. A rule that "
            "remembers estimates as recipes does not go with this method: use rule 'momentum', which keeps a buffer."
        )
    return {"is": kind, **_KINDS[kind][0](direction)}


def from_recipe(recipe: Recipe) -> Direction:
    """The direction that `to_recipe` wrote down: adds the same bits to any tensor."""
    return _KINDS[recipe["is"]][1](recipe)


def _write_noise(noise: Any) -> Recipe:
    return {"key": list(noise.source.key), "kind": noise.kind}


def _read_noise(recipe: Recipe) -> Direction:
    return Noise(_stream(recipe["key"]), recipe["kind"])


def _write_scaled(scaled: Any) -> Recipe:
    factors = {name: float(factor) for name, factor in scaled.factors.items()}
    return {"inner": to_recipe(scaled.inner), "factors": factors, "otherwise": float(scaled.otherwise)}


def _read_scaled(recipe: Recipe) -> Direction:
    return Scaled(from_recipe(recipe["inner"]), dict(recipe["factors"]), recipe["otherwise"])


def _write_masked(masked: Any) -> Recipe:
    densities = {name: float(density) for name, density in masked.densities.items()}
    return {
        "inner": to_recipe(masked.inner),
        "key": list(masked.source.key),
        "densities": densities,
        "otherwise": float(masked.otherwise),
    }


def _read_masked(recipe: Recipe) -> Direction:
    densities = dict(recipe["densities"])
    return Masked(from_recipe(recipe["inner"]), _stream(recipe["key"]), densities, recipe["otherwise"])


def _write_combination(combination: Any) -> Recipe:
    return {"terms": [[float(coefficient), to_recipe(inner)] for coefficient, inner in combination.terms]}


def _read_combination(recipe: Recipe) -> Direction:
    return Combination(tuple((coefficient, from_recipe(inner)) for coefficient, inner in recipe["terms"]))


def _stream(key: list[int]) -> Stream:
    return Stream((key[0], key[1]))


_KINDS: dict[str, tuple[Callable[[Any], Recipe], Callable[[Recipe], Direction]]] = {
    "Noise": (_write_noise, _read_noise),
    "Scaled": (_write_scaled, _read_scaled),
    "Masked": (_write_masked, _read_masked),
    "Combination": (_write_combination, _read_combination),
}
