"""The command line: `zotune train | evaluate | compare | replay | learn | import-finetuner | methods | tasks | doctor`."""

import io
import os
import signal
import sys

INTERRUPTED = 130  # what typer makes of Ctrl-C
RESUMED = ("train", "compare", "learn")  # commands that go on where they were stopped


def main() -> None:
    """Run the command line; zotune's own errors become one readable message and exit code 2."""
    from zotune.allocator import keep_freed_memory
    from zotune.cli.app import app
    from zotune.errors import ZotuneError

    for name in ("SIGTERM", "SIGHUP"):  # as for Ctrl-C, progress bars give the cursor back
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) is signal.SIG_DFL:
            signal.signal(getattr(signal, name), lambda number, frame: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without ± still gets the number
    goes_on = " The same command goes on where this one stopped." if set(sys.argv[1:2]) & set(RESUMED) else ""
    try:
        keep_freed_memory()
        app()
    except ZotuneError as error:
        from rich.console import Console
        from rich.text import Text

        message = Text.assemble((type(error).__name__, "bold red"), f": {error}")  # brackets in it are no markup
        Console(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        if os.environ.get("ZOTUNE_TRACEBACK"):
            raise
        print(f"{type(error).__name__}: {error}.{goes_on} (ZOTUNE_TRACEBACK=1 shows where.)", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code == INTERRUPTED and goes_on:
            print(f"interrupted.{goes_on}", file=sys.stderr)
        raise
