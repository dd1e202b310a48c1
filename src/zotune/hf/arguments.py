"""ZOArguments: TrainingArguments of a forward-only run; and any TrainingArguments turned into them."""

import logging
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, TypeVar

from zotune.extras import require
from zotune.hf.settings import ZOSettings

transformers = require("transformers", extra="hf", purpose="train with transformers.Trainer")
require("accelerate", extra="hf", purpose="train with transformers.Trainer")
Parent: Any = transformers.TrainingArguments
logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments", bound=ZOSettings)


@dataclass
class ZOArguments(ZOSettings, Parent):  # type: ignore[misc]
    """transformers.TrainingArguments with the settings of `ZOSettings`."""


def settle_arguments(given: Any, wanted: type[Arguments]) -> Arguments:
    """Arguments of the wanted class: these if they are already, else made of whatever was set in them.

    A script's `TrainingArguments(...)` or `SFTConfig(...)` thus works as it is. What stands at its default there takes
    the default here: nobody chose the learning rate 5e-5 by leaving it out.
    """
    if isinstance(given, wanted):
        return given
    if given is None:
        return wanted()
    known = {each.name for each in fields(wanted) if each.init}
    chosen = {name: value for name, value in _chosen(given).items() if name in known}
    made = wanted(**chosen)
    for each in fields(given):  # of a script's own class
        if not hasattr(made, each.name):
            setattr(made, each.name, getattr(given, each.name))
    if not isinstance(given, ZOSettings):
        replaced = sorted(
            f"{name} {getattr(given, name)} -> {getattr(made, name)}"
            for name in {each.name for each in fields(ZOSettings)} & {each.name for each in fields(given)}
            if getattr(given, name) != getattr(made, name)
        )
        logger.warning(
            "%s was given where forward-only training takes %s; what was not set there takes its defaults: %s",
            type(given).__name__, wanted.__name__, ", ".join(replaced) or "no difference",
        )  # fmt: skip
    return made


def _chosen(given: Any) -> dict[str, Any]:
    """The fields that somebody set: those that differ from their default, as written or as transformers completes it."""
    # not bf16: SFTConfig turns it on where it is left out, which fails on a machine without it
    completed = type(given)(output_dir=given.output_dir, use_cpu=given.use_cpu, bf16=False)
    chosen = {"output_dir": given.output_dir, "use_cpu": given.use_cpu}
    for each in fields(given):
        value = getattr(given, each.name, None)
        if not each.init or value in (_default(each), getattr(completed, each.name, None)):
            continue
        if each.name == "bf16" and each.default is None:
            continue  # SFTConfig's own default
        chosen[each.name] = value
    return chosen


def _default(each: "Field[Any]") -> Any:
    if each.default is not MISSING:
        return each.default
    return each.default_factory() if each.default_factory is not MISSING else MISSING
