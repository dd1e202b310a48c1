"""One thread, reproducible hypothesis, and `tests` importable, so that checks can be shared between files."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[1]))
pytest.register_assert_rewrite("tests.checks", "tests.support")

torch.set_num_threads(1)  # the models are tiny: threads cost more than they bring
settings.register_profile("zotune", deadline=None, derandomize=True, max_examples=50, database=None)
settings.load_profile("zotune")


@pytest.fixture(autouse=True)
def _same_weights_each_time():
    """Models are made from torch's global generator; every test finds it in the same state."""
    torch.manual_seed(0)
