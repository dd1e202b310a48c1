"""Whether the weights stand at a step, or between two: then no more steps are taken and no state is saved."""

from collections.abc import Iterator
from contextlib import contextmanager

from zotune.errors import StateError


class Standing:
    """What breaks off while weights move (Ctrl-C in a notebook, no memory left) leaves some tensors moved and others not."""

    def __init__(self) -> None:
        self._cut: str | None = None

    @contextmanager
    def moving(self, what: str) -> Iterator[None]:
        """Weights move inside the block; they stand at a step again if it comes to its end."""
        self._cut = what
        yield
        self._cut = None

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """No weight has moved yet inside the block: what fails there (a full disk) can be tried again."""
        try:
            yield
        except Exception:
            self._cut = None
            raise

    def check(self) -> None:
        """Raise a StateError if a move broke off."""
        if self._cut is not None:
            raise StateError(
                f"{self._cut} broke off while it moved the weights: some have moved and others have not. Load the weights "
                "of an earlier step and its state (load_state_dict), or rebuild this one from the ledger (zotune.replay)."
            )

    def restored(self) -> None:
        """Weights and state of one moment were loaded."""
        self._cut = None
