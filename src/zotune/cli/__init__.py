"""The command line: `zotune train | evaluate | compare | replay | learn | import-finetuner | methods | tasks | doctor`."""

import sys


def main() -> None:
    """Run the command line; zotune's own errors become one readable message and exit code 2."""
    from zotune.allocator import keep_freed_memory
    from zotune.cli.app import app
    from zotune.errors import ZotuneError

    try:
        keep_freed_memory()
        app()
    except ZotuneError as error:
        from rich.console import Console
        from rich.text import Text

        message = Text.assemble((type(error).__name__, "bold red"), f": {error}")  # brackets in it are no markup
        Console(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on where this one stopped")
