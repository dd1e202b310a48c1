"""A tiny model folder and a tiny data folder: the command line runs on them as on the real ones."""

import json

import pytest
from tests.support.tiny_folder import BAD, GOOD, save_tiny_model
from typer.testing import CliRunner

from zotune.cli.app import app


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """(model folder, data folder)"""
    model_folder, data = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("data")
    save_tiny_model(model_folder)
    for split, count in (("train", 24), ("validation", 12)):
        rows = [{"sentence": (GOOD if i % 2 else BAD)[i % 3], "label": i % 2} for i in range(count)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model_folder, data


@pytest.fixture
def arguments(tiny):
    """Options of a short run, without --out."""
    model, data = tiny
    options = {
        "model": model, "data": data, "task": "sst2", "steps": 12, "batch-size": 4, "lr": 1e-3, "eps": 1e-3,
        "train-rows": 24, "eval-rows": 12, "eval-every": 5, "snapshot-every": 4, "precision": "fp32", "device": "cpu",
    }  # fmt: skip
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


@pytest.fixture
def run():
    """Invoke the command line in this process; zotune's errors are raised."""

    def invoke(*words):
        result = CliRunner().invoke(app, [str(word) for word in words])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke
