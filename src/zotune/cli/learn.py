"""`zotune learn`: train the networks of a ZO Fine-tuner."""

import inspect
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zotune.cli.settings import kind_name
from zotune.errors import ConfigError
from zotune.learn.config import LearnConfig
from zotune.runs.config import read_pair

if TYPE_CHECKING:
    from rich.table import Table

_KINDS: dict[str, Any] = {"int": int, "float": float, "bool": bool}
_OPTIONS = {"mode_options": "--mode-option"}  # given as name=value, several times
_NONE = ("none", "None", "null")


def learn(**given: Any) -> None:
    """Learn an optimizer for a base model on some tasks. The same command resumes a killed run."""
    config = LearnConfig(**_settings(given))
    from zotune.cli.console import console
    from zotune.cli.display import Display
    from zotune.learn.learning import learn as run

    with Display(0) as display:
        facts = run(config, display)
    console.print(_summary(facts, config.out))


def _settings(given: dict[str, Any]) -> dict[str, Any]:
    """What was given, `none` as None, options as a dict."""
    held = {key: value for key, value in given.items() if value not in (None, [])}
    for key, flag in _OPTIONS.items():
        if key in held:
            held[key] = dict(read_pair(flag, text) for text in held[key])
    for key, kind in _numbers_or_none().items():
        if key in held:
            held[key] = None if held[key] in _NONE else _number(key, held[key], kind)
    return held


def _numbers_or_none() -> dict[str, Any]:
    """Settings that may be switched off by `none`: they are read as text first."""
    return {f.name: _KINDS[kind_name(f.type)] for f in fields(LearnConfig) if _optional_number(f.type)}


def _optional_number(kind: Any) -> bool:
    return "None" in str(kind) and kind_name(kind) in _KINDS


def _number(key: str, text: str, kind: Any) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise ConfigError(f"{key} must be of type {kind.__name__}, or none; got {text!r}.") from error


def _parameters() -> list[inspect.Parameter]:
    """One option per setting, so that settings are declared once."""
    made = []
    for f in fields(LearnConfig):
        flag = "--" + f.name.replace("_", "-")
        kind: Any = _KINDS.get(kind_name(f.type), str)
        if _optional_number(f.type):
            kind = str
        if f.name in _OPTIONS:
            flag, kind = _OPTIONS[f.name], list[str]
        elif kind is bool:
            flag = f"{flag}/--no-{f.name.replace('_', '-')}"
        shown = f.name not in _OPTIONS and f.default not in (None, "")
        text = f.metadata["help"] + (f" [default: {f.default}]" if shown else "")
        option = typer.Option(flag, help=text, show_default=False)
        annotation = Annotated[kind | None, option]
        made.append(inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    return made


learn.__signature__ = inspect.Signature(_parameters())  # type: ignore[attr-defined]
learn.__annotations__ = {parameter.name: parameter.annotation for parameter in _parameters()}


def _summary(facts: dict[str, Any], out: str) -> "Table":
    """How far the networks came, and what they do."""
    from zotune.cli.console import facts_table

    found = facts["learned"]
    moved, squared = found["distance"], found["squared"]
    rows = {
        "networks": f"{len(facts['shapes'])}, one for every trained tensor of {facts['base_model']}",
        "moved": f"largest change of a network's numbers: median {moved['median']:.1e}, 95th percentile "
        f"{moved['p95']:.1e}, most {moved['most']:.1e} (first layers are drawn from +-0.447)",
        "never changed": f"{found['never_changed']} networks; {found['numbers_changed']:.0%} of all numbers changed",
        "scales squared": f"least {squared['least']:.2g}, 10 % {squared['p10']:.2g}, median {squared['median']:.2g}, "
        f"90 % {squared['p90']:.2g}, most {squared['most']:.2g} (MeZO: 1)",
        "noise energy": f"{found['energy_of_ten']:.0%} on ten tensors",
        "written": out,
        "use": f"zotune train ... --method zo_finetuner --method-option finetuner={out}",
    }
    return facts_table(rows)
