"""Freed memory is kept by the command line, on glibc, unless somebody says otherwise."""

import os
import subprocess
import sys

import pytest

import zotune.allocator as allocator
from zotune.errors import ConfigError

GLIBC = allocator._left_alone() is None

FAULTS = """
import resource
import sys
from zotune.allocator import keep_freed_memory

print(keep_freed_memory())
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    bytearray(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):
    last = faults()
print(last)
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No variable that decides is set, and nothing is changed in this process."""
    for name in list(os.environ):
        if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD", allocator.SWITCH):
            monkeypatch.delenv(name)
    monkeypatch.setattr(allocator, "_raise_thresholds", lambda: True)


@pytest.mark.skipif(not GLIBC, reason="only Linux's glibc has these thresholds")
@pytest.mark.parametrize("wish", ["keep", "system"])
def test_memory_comes_back_without_page_faults(wish):
    environment = {**os.environ, allocator.SWITCH: wish}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=environment, capture_output=True, text=True, check=True)
    words, faults = done.stdout.splitlines()
    if wish == "keep":
        assert words.startswith("freed memory is kept")
        assert int(faults) < 100, "64 MB were mapped again"
    else:
        assert words == "freed memory goes back to the system: ZOTUNE_ALLOCATOR=system"
        assert int(faults) > 20, "the test must be able to fail; huge pages of 2 MB would give 32"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("ZOTUNE_ALLOCATOR", "system", "ZOTUNE_ALLOCATOR=system"),
        ("MALLOC_TRIM_THRESHOLD_", "1", "MALLOC_TRIM_THRESHOLD_ is set"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1", "GLIBC_TUNABLES is set"),
        ("LD_PRELOAD", "/usr/lib/libjemalloc.so", "another allocator is preloaded"),
    ],
)
@pytest.mark.skipif(not GLIBC, reason="only Linux's glibc has these thresholds")
def test_who_has_decided_already_is_left_alone(name, value, reason, monkeypatch):
    assert allocator.keep_freed_memory().startswith("freed memory is kept")
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(allocator, "_raise_thresholds", lambda: pytest.fail("thresholds were changed"))
    assert allocator.keep_freed_memory().startswith(f"freed memory goes back to the system: {reason}")


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(allocator, "_raise_thresholds", lambda: pytest.fail("thresholds were changed"))
    assert "only Linux's glibc" in allocator.keep_freed_memory()


def test_a_typing_error_is_an_error(monkeypatch):
    monkeypatch.setenv(allocator.SWITCH, "kep")
    with pytest.raises(ConfigError, match="'keep' or 'system'; got 'kep'"):
        allocator.keep_freed_memory()


def test_the_command_line_asks_for_it_and_the_library_does_not(monkeypatch):
    import zotune.cli

    asked = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: asked.append(None))
    monkeypatch.setattr(sys, "argv", ["zotune", "--version"])
    with pytest.raises(SystemExit):
        zotune.cli.main()
    assert asked == [None]
    loaded = "import sys, zotune; print('zotune.allocator' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
