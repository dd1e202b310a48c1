"""When a run is stopped whose losses are no numbers any more."""

import warnings

from zotune.core.step import Outcome
from zotune.errors import ClosureError

PATIENCE = 10  # steps in a row whose numbers are not finite before the run is stopped


class Patience:
    """Counts steps that were refused in a row."""

    def __init__(self) -> None:
        self.in_a_row = 0

    def count(self, outcome: Outcome, step: int) -> None:
        """What became of a step: warns if it was refused.

        Raises:
            ClosureError: it was one too many.
        """
        self.in_a_row = 0 if outcome.accepted else self.in_a_row + 1
        if self.in_a_row >= PATIENCE:
            raise ClosureError(
                f"The loss has not been a finite number for {PATIENCE} steps in a row (last: {outcome.losses}); those steps "
                "left the weights alone. Lower lr or eps, or run the forward pass in bf16 or fp32 instead of fp16."
            )
        if not outcome.accepted:
            warnings.warn(f"Step {step} was refused: its losses are {outcome.losses}.", stacklevel=5)

    def forgive(self) -> None:
        """The next PATIENCE steps are taken again before the run is stopped."""
        self.in_a_row = 0
