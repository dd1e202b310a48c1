"""Back ends of the noise kernels."""

import pytest

from zotune.kernels.native import MissingError, NativeBackend, compiled_file, load


@pytest.fixture(scope="session")
def native():
    """The compiled kernels; tests of them are skipped where the installation has none."""
    try:
        return NativeBackend(load(compiled_file()))
    except MissingError as error:
        pytest.skip(str(error))
