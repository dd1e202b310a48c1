"""Options of a command, made from the fields of `TrainConfig`, so that settings are declared once."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from zotune.runs.config import TrainConfig, read_pair

OPTIONS = {  # given as name=value, several times
    "mode_options": "--mode-option",
    "method_options": "--method-option",
    "rule_options": "--rule-option",
}


def with_settings(command: Callable[..., None], hidden: Collection[str] = ()) -> Callable[..., None]:
    """Give a command one option per field of `TrainConfig`, so that settings are declared once.

    The command gets the recipe, a dict of the settings that were given, and its further parameters as its own options.
    Hidden ones are taken, so that a training command can be turned into another, and not shown in the help.
    """

    own = list(inspect.signature(command).parameters.values())[2:]

    def wrapper(recipe: Path | None = None, **options: Any) -> None:
        others = {parameter.name: options.pop(parameter.name) for parameter in own}
        given = {key: value for key, value in options.items() if value not in (None, [])}
        for key in OPTIONS.keys() & given.keys():
            given[key] = dict(read_pair(OPTIONS[key], text) for text in given[key])
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
        kind: Any = {"int": int, "float": float}.get(kind_name(setting.type), str)
        several = setting.name in OPTIONS
        flag, kind = flag_of(setting.name), list[str] if several else kind
        default = "" if several or setting.default is None else f" [default: {setting.default}]"
        option = typer.Option(
            flag, help=setting.metadata["help"] + default, show_default=False, hidden=setting.name in hidden
        )
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


def kind_name(kind: Any) -> str:
    """What a field's annotation is called, None left out."""
    return (kind.__name__ if isinstance(kind, type) else str(kind)).replace(" | None", "")


def flag_of(name: str) -> str:
    """The option that gives a setting."""
    return OPTIONS.get(name, "--" + name.replace("_", "-"))


def say_unused(command: str, given: Collection[str], unused: Collection[str]) -> None:
    """Say which of the settings that were given change nothing."""
    if idle := [flag_of(name) for name in given if name in unused]:
        typer.echo(f"{command} takes no notice of {', '.join(idle)}.", err=True)
