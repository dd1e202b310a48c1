"""Cache entries are whole or absent, whoever is killed and however many build at once."""

import os
import subprocess
import time

import pytest

from zotune import cache
from zotune.errors import ConfigError, DataError


def fill(folder):
    (folder / "data").write_text("whole")


def test_place(monkeypatch, tmp_path):
    monkeypatch.setenv("ZOTUNE_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache.cache_folder() == tmp_path / "a"
    monkeypatch.delenv("ZOTUNE_CACHE")
    assert cache.cache_folder() == tmp_path / "b" / "zotune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder() == tmp_path / ".cache" / "zotune"


def test_built_once(tmp_path):
    place = tmp_path / "cache" / "entry"
    assert cache.build_once(place, fill) == place
    assert (place / "data").read_text() == "whole"
    cache.build_once(place, lambda _: pytest.fail("built twice"))
    assert list(place.parent.iterdir()) == [place]


def test_interrupted_build_leaves_nothing(tmp_path):
    def interrupted(folder):
        (folder / "data").write_text("ha")
        assert not (tmp_path / "entry").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build_once(tmp_path / "entry", interrupted)
    assert not list(tmp_path.iterdir())


def test_slower_of_two_builders_takes_the_others_entry(tmp_path):
    place = tmp_path / "entry"

    def overtaken(folder):
        (folder / "data").write_text("late")
        cache.build_once(place, fill)

    cache.build_once(place, overtaken)
    assert (place / "data").read_text() == "whole"
    assert list(tmp_path.iterdir()) == [place]


def test_leftovers_of_killed_builds_are_swept_and_running_ones_kept(tmp_path):
    old, running = tmp_path / ".entry.abc.tmp", tmp_path / ".entry.def.tmp"
    for folder in (old, running):
        folder.mkdir()
    long_ago = time.time() - 2 * cache.LEFTOVER_AGE
    os.utime(old, (long_ago, long_ago))
    cache.build_once(tmp_path / "entry", fill)
    assert not old.exists()
    assert running.exists()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="ZOTUNE_CACHE"):
        cache.build_once(tmp_path / "file" / "entry", fill)


def test_failing_pip_says_why(tmp_path, monkeypatch):
    def no_network(command, **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route to host\n")

    monkeypatch.setattr(cache.subprocess, "run", no_network)
    with pytest.raises(DataError, match=r"could not download thing==1:(.|\n)*no route to host(.|\n)*ZOTUNE_CACHE"):
        cache.pip_download("thing==1", tmp_path, error=DataError)
