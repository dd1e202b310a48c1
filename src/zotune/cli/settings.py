"""Options of a command, made from the fields of `TrainConfig`, so that settings are declared once."""

import inspect
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from zotune.errors import ConfigError
from zotune.runs.config import TrainConfig

OPTIONS = {  # given as name=value, several times
    "mode_options": "--mode-option",
    "method_options": "--method-option",
    "rule_options": "--rule-option",
}


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option per field of `TrainConfig`, so that settings are declared once.

    The command gets the recipe, a dict of the settings that were given, and its further parameters as its own options.
    """

    own = list(inspect.signature(command).parameters.values())[2:]

    def wrapper(recipe: Path | None = None, **options: Any) -> None:
        others = {parameter.name: options.pop(parameter.name) for parameter in own}
        given = {key: value for key, value in options.items() if value not in (None, [])}
        for key in OPTIONS.keys() & given.keys():
            given[key] = dict(_pair(OPTIONS[key], text) for text in given[key])
        command(recipe, given, **others)

    parameters = [
        inspect.Parameter(
            "recipe",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=None,
            annotation=Annotated[Path | None, typer.Argument(help="YAML recipe; options below override it.")],
        )
    ]
    for setting in fields(TrainConfig):
        kind: Any = {"int": int, "float": float}.get(_plain(setting.type), str)
        several = setting.name in OPTIONS
        flag, kind = (OPTIONS[setting.name], list[str]) if several else (_flag(setting.name), kind)
        default = "" if several or setting.default is None else f" [default: {setting.default}]"
        option = typer.Option(flag, help=setting.metadata["help"] + default, show_default=False)
        parameters.append(
            inspect.Parameter(
                setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
            )
        )
    parameters += [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
    wrapper.__name__ = command.__name__
    wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    wrapper.__doc__ = command.__doc__
    return wrapper


def _plain(kind: Any) -> str:
    return (kind.__name__ if isinstance(kind, type) else str(kind)).replace(" | None", "")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _pair(flag: str, text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator:
        raise ConfigError(f"{flag} takes name=value, got {text!r}.")
    return key.strip(), yaml.safe_load(value)
