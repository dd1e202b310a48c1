"""The examples run, and do what they say."""

import importlib.util
from pathlib import Path


def load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_plain_torch_example_learns():
    """From chance (0.53) to 0.87 as recorded; 0.8 leaves room for other roundings of the forward pass, and chance is
    13 standard errors of 512 examples below it."""
    first, last = load("plain_torch").main()
    assert first < 0.6
    assert last > 0.8
