"""Back ends of the noise kernels."""

import pytest
import torch

from zotune.kernels import native_packing
from zotune.kernels.native import MissingError, NativeBackend, compiled_file, load


@pytest.fixture(scope="session")
def native():
    """The compiled kernels; tests of them are skipped where the installation has none."""
    try:
        return NativeBackend(load(compiled_file()))
    except MissingError as error:
        pytest.skip(str(error))


@pytest.fixture
def every_setting(monkeypatch, native):
    """Calls wake threads however small they are; threads and instruction set are as before afterwards."""
    monkeypatch.setattr(native_packing, "WORTH_A_THREAD", 1)
    yield
    torch.set_num_threads(1)
    native.level()
    native.apart()
