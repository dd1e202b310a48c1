"""What all commands print to. Text is text: brackets in names, paths and messages are no markup."""

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

console = Console(markup=False)


def facts_table(facts: Mapping[str, str]) -> Table:
    """Names in bold, and what is said of each."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), value)
    return table
