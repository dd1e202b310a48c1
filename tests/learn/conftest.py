"""A tiny model folder with two data folders, and the command as `zotune learn` runs it."""

import shutil

import pytest
import typer
from tests.cli.conftest import tiny  # noqa: F401 - the tiny model and its data
from typer.testing import CliRunner

from zotune.cli.learn import learn
from zotune.learn.config import LearnConfig


@pytest.fixture(scope="session")
def folders(tiny, tmp_path_factory):  # noqa: F811
    """(model folder, folder of task folders)"""
    model, data = tiny
    root = tmp_path_factory.mktemp("tasks")
    for task in ("sst2", "sst2_empty"):
        shutil.copytree(data, root / task)
    return model, root


@pytest.fixture
def settings(folders, tmp_path):
    """Settings of a short run on two tasks."""

    def make(**changed):
        model, root = folders
        given = {
            "model": str(model), "tasks": "sst2,sst2_empty", "data": str(root), "out": str(tmp_path / "learned"),
            "epochs": 3, "epochs_per_restart": 2, "batch_size": 4, "train_rows": 8, "precision": "fp32",
            "device": "cpu", "snapshot_every": 3, "lr_llm": 0.05, **changed,
        }  # fmt: skip
        return LearnConfig(**given)

    return make


@pytest.fixture
def command():
    """Invoke the command in this process; zotune's errors are raised."""
    app = typer.Typer()
    app.command()(learn)

    def invoke(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke
