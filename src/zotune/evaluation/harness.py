"""Evaluation by lm-evaluation-harness: the benchmark tasks that papers report, asked as that library asks them.

Its prompts are not those of `zotune.tasks`, so numbers of the two differ: say which one a table shows. The harness takes
the folders that zotune writes as they are, so its own command works as well:

    lm_eval --model hf --model_args pretrained=runs/mine/model --tasks sst2
    lm_eval --model hf --model_args pretrained=BASE,peft=runs/adapters/model --tasks sst2
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from zotune.core.common_random import common_random_numbers
from zotune.errors import ConfigError, DataError, ModelError
from zotune.extras import require
from zotune.tasks.catalogue import TASKS, find_task
from zotune.tasks.module_modes import kept_modes
from zotune.tasks.task import refuse_overlap
from zotune.version import __version__

PURPOSE = "evaluate with lm-evaluation-harness"
LEFT_OUT = ("pretty_env_info", "git_hash", "upper_git_hash")  # of the machine and the folder that it ran in
Spec = str | dict[str, Any]


def evaluate_harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[Spec],
    *,
    limit: int | None = None,
    shots: int | None = None,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    trained_on: str | None = None,
) -> dict[str, Any]:
    """Ask a causal language model tasks of lm-evaluation-harness. No global generator is disturbed, no mode changed.

    Args:
        model: of transformers, or a PEFT model around one.
        tokenizer: its tokenizer.
        tasks: names of the harness's tasks, groups or tags; YAML files of tasks; or tasks as dicts.
        limit: rows per task; None for all. For trying out: with few rows the numbers mean little.
        shots: solved examples before each question; None for what each task says.
        batch_size: rows per forward pass.
        autocast: dtype of the forwards' matrix products, if another than the weights'.
        trained_on: the task of zotune that the model was trained on, so that tasks that share its rows are refused.

    Returns:
        The harness's results as JSON values, without what it knows of this machine.

    Raises:
        MissingExtraError: lm-eval is not installed.
        ConfigError: no such task, or a limit or number of shots out of range.
        ModelError: a model that is not a causal one.
        DataError: the rows of a task cannot be had, or are those that the model was trained on.
    """
    lm_eval = require("lm_eval", extra="eval", purpose=PURPOSE)
    HFLM = require("lm_eval.models.huggingface", extra="eval", purpose=PURPOSE).HFLM
    _check(model, limit, shots)
    with _quiet(), kept_modes(model), common_random_numbers(0, {p.device for p in model.parameters()}), torch.no_grad():
        manager, found = _load(tasks, trained_on)
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, mixed_precision_dtype=autocast)
        results = lm_eval.simple_evaluate(
            model=lm, tasks=found, num_fewshot=shots, limit=limit, log_samples=False, task_manager=manager
        )
    kept = {key: value for key, value in results.items() if key not in LEFT_OUT} | {"zotune_version": __version__}
    plain = require("lm_eval.utils", extra="eval", purpose=PURPOSE).handle_non_serializable
    values: dict[str, Any] = json.loads(json.dumps(kept, default=plain))
    return values


def harness_table(results: Mapping[str, Any]) -> str:
    """The harness's own table of results, and that of groups if there are any, as Markdown."""
    make_table = require("lm_eval.utils", extra="eval", purpose=PURPOSE).make_table
    tables = [make_table(results, column) for column in ("results", "groups") if results.get(column)]
    return "\n".join(tables)


def _check(model: Any, limit: int | None, shots: int | None) -> None:
    wrong = []
    if limit is not None and limit < 1:
        wrong.append(f"limit must be at least 1 row, got {limit}")
    if shots is not None and shots < 0:
        wrong.append(f"shots must be at least 0, got {shots}")
    if wrong:
        raise ConfigError("; ".join(wrong) + ".")
    kinds: list[str] = list(getattr(model.config, "architectures", None) or [])
    if any(kind.endswith("ForMaskedLM") for kind in kinds):
        raise ModelError(
            f"{kinds[0]} is a masked language model; lm-evaluation-harness asks for the likelihood of continuations, which "
            "such a model does not give. Evaluate it without --harness: zotune's tasks have templates for it."
        )


def _load(tasks: Sequence[Spec], trained_on: str | None) -> tuple[Any, list[Any]]:
    """The harness's task manager, and its tasks and groups with their rows."""
    if not tasks:
        raise ConfigError("No task was named. Give names of lm-evaluation-harness's tasks, or YAML files of tasks.")
    named = [task for task in tasks if isinstance(task, str) and not Path(task).is_file()]
    manager = require("lm_eval.tasks", extra="eval", purpose=PURPOSE).TaskManager(include_defaults=bool(named))
    for name in named:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=3)
            raise ConfigError(
                f"lm-evaluation-harness has no task {name!r}, and there is no such file."
                + (f" Near: {', '.join(near)}." if near else "")
                + f" `lm_eval ls tasks` lists its {len(manager.all_tasks)} tasks and groups."
            )
    found: list[Any] = []
    for task in tasks:
        try:
            loaded = manager.load(task)
        except Exception as error:  # of the hub, of files, of the task's own library: each raises its own kinds
            raise DataError(
                f"the rows of {_name(task)} cannot be had ({type(error).__name__}: {error}). The harness fetches them from "
                "the hub, and finds them in its cache afterwards; some tasks need a library of their own."
            ) from error
        _refuse_overlaps(loaded["tasks"], trained_on)
        groups = loaded.get("groups") or {}
        found += [groups[_name(task)]] if _name(task) in groups else list(loaded["tasks"].values())
    return manager, found


def _name(task: Spec) -> str:
    return str(task.get("task") or task.get("group")) if isinstance(task, dict) else task


def _refuse_overlaps(names: Mapping[str, Any], trained_on: str | None) -> None:
    for name in names:
        if trained_on is not None and name in TASKS:
            refuse_overlap(find_task(trained_on), TASKS[name])


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that a model was handed over loaded, which is meant."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
