"""How a comparison looks while it runs."""

from typing import Any

from zotune.cli.console import console
from zotune.cli.display import Display
from zotune.comparison.turns import CompareListener


class ComparisonDisplay(Display, CompareListener):
    """A display whose bar begins anew with each contestant."""

    def __init__(self) -> None:
        super().__init__(0)

    def contestant(self, what: str, steps: int) -> None:
        """See `CompareListener.contestant`."""
        if self._training is not None:
            self._progress.remove_task(self._training)
        self._training, self._steps = None, steps
        self.say(f"{what}: {steps} step{'s' * (steps > 1)}" if steps else what)

    def finished(self, entry: dict[str, Any]) -> None:
        """See `CompareListener.finished`."""
        if "failed" in entry:
            console.print(f"{entry['what']} broke off: {entry['failed']}", highlight=False, soft_wrap=True)
            return
        value = f"{entry[entry['metric']]:.3f} ± {entry['standard_error']:.3f}"
        console.print(f"{entry['what']}: held-out {entry['metric']} {value}, loss {entry['loss']:.3f}", highlight=False)
