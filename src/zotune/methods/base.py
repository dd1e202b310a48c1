"""What most methods share: nothing to remember, nothing to need, and ranges to check."""

from collections.abc import Sequence
from typing import Any, ClassVar

from zotune.core.context import Context, Estimate
from zotune.core.options import Options
from zotune.core.site import Site


class Base(Options):
    """A method without memory that every engine and rule can serve. Methods override what is different for them.

    A method is a dataclass. Its fields are its options: they are shown, checked, and written into the ledger's header, so
    they hold numbers, strings, booleans, None, and dicts of those. What a method remembers between steps is set in
    `__post_init__` as an ordinary attribute and goes through `state_dict`; caches that can be made again from the run
    seed and the step stay out of it.
    """

    part: ClassVar[str] = "method"
    paper: ClassVar[str]
    extra_state: ClassVar[str] = "none"

    @property
    def needs(self) -> frozenset[str]:
        """See `Method.needs`."""
        return frozenset()

    @property
    def low_rank(self) -> bool:
        """See `Method.low_rank`."""
        return False

    @property
    def has_recipe(self) -> bool:
        """See `Method.has_recipe`."""
        return not self.low_rank

    @property
    def forwards(self) -> float:
        """See `Method.forwards`."""
        raise NotImplementedError

    def forwards_for(self, sites: Sequence[Site]) -> float:
        """See `Method.forwards_for`."""
        return self.forwards

    def extra_bytes(self, sites: Sequence[Site]) -> int:
        """See `Method.extra_bytes`."""
        return 0

    def check_sites(self, sites: Sequence[Site]) -> None:
        """See `Method.check_sites`."""

    def observe(self, ctx: Context, estimate: Estimate) -> None:
        """See `Method.observe`."""

    def state_dict(self) -> dict[str, Any]:
        """See `Method.state_dict`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Method.load_state_dict`."""
