"""Keep freed memory for the next forward pass instead of giving it back to the operating system.

A forward pass frees and asks for the same activations layer after layer. glibc hands blocks above its thresholds straight
back to the kernel, which has to map and clear the pages again at the next use: a tenth to a third of a forward pass of a
thousand tokens on two cores. With higher thresholds the pages stay with the process. The price: memory that was freed still
counts as the process's own until it ends, so the command line does this and a library that is merely imported does not.

ZOTUNE_ALLOCATOR=system leaves the allocator alone; so do glibc's own variables (MALLOC_TRIM_THRESHOLD_ and others), if one
of them is set.
"""

import ctypes
import os
import sys

from zotune.errors import ConfigError

SWITCH = "ZOTUNE_ALLOCATOR"
KEEPS, SYSTEM = "keep", "system"
THRESHOLD = 1 << 30  # bytes; the parameter is a C int
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed_memory() -> str:
    """Raise glibc's thresholds for this process, unless the environment says otherwise.

    Returns:
        what was done and why, as a sentence for people.

    Raises:
        ConfigError: the environment variable is neither "keep" nor "system".
    """
    reason = _left_alone()
    if reason is None and not _raise_thresholds():
        reason = "glibc refused the thresholds"
    if reason is not None:
        return f"freed memory goes back to the system: {reason}"
    return f"freed memory is kept for the next forward pass; {SWITCH}={SYSTEM} switches that off"


def _left_alone() -> str | None:
    """Why nothing should be changed, or None."""
    wish = os.environ.get(SWITCH, KEEPS)
    if wish == SYSTEM:
        return f"{SWITCH}={SYSTEM}"
    if wish != KEEPS:
        raise ConfigError(f"the environment variable {SWITCH} must be {KEEPS!r} or {SYSTEM!r}; got {wish!r}.")
    if not sys.platform.startswith("linux") or not _is_glibc():
        return "only Linux's glibc has these thresholds"
    own = sorted(name for name in os.environ if name.startswith("MALLOC_") and name.endswith("_"))
    tuned = own or ["GLIBC_TUNABLES"] * ("glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""))
    if tuned:
        return f"{tuned[0]} is set, and is left to decide"
    if "malloc" in os.environ.get("LD_PRELOAD", ""):
        return "another allocator is preloaded"
    return None


def _is_glibc() -> bool:
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") is not None
    except (ValueError, OSError):
        return False


def _raise_thresholds() -> bool:
    library = ctypes.CDLL(None)
    return all(library.mallopt(which, THRESHOLD) == 1 for which in (MMAP_THRESHOLD, TRIM_THRESHOLD))
