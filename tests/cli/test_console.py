"""Brackets in names, paths and messages reach the reader."""

import sys

import pytest

from zotune.cli import main
from zotune.cli.console import console, facts_table
from zotune.cli.display import Display


def test_an_error_message_keeps_its_brackets(monkeypatch, capsys, tmp_path):
    """ "[/x]" is a closing tag in rich's markup, which fails; "[nan, nan]" is one that vanishes."""
    folder = tmp_path / "[nan, nan]" / "[" / "x]"
    monkeypatch.setattr(sys, "argv", ["zotune", "evaluate", str(folder)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("ConfigError: No recipe at ")
    assert str(folder) in said


def test_what_a_run_says_keeps_its_brackets():
    with console.capture() as printed:
        display = Display(0)
        display.say("the losses are [nan, nan] in [/x]")
        display.plan({"run folder": "[a]"})
        console.print(facts_table({"[b]": "[/c]"}))
    assert "the losses are [nan, nan] in [/x]" in printed.get()
    for part in ("[a]", "[b]", "[/c]"):
        assert part in printed.get()
