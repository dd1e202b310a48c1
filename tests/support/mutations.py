"""A fault put in on purpose must turn a check red that was green before."""

import pytest
import torch


def sees(monkeypatch, put_in, check):
    """`check()` passes, and fails once `put_in(monkeypatch)` has broken the code."""
    torch.manual_seed(0)
    check()
    put_in(monkeypatch)
    torch.manual_seed(0)
    with pytest.raises(AssertionError):
        check()
