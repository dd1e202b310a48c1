"""The README's tables say what the program says."""

from pathlib import Path

from zotune.cli.display import method_rows
from zotune.rules import RULES, make_rule

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def rows_of(heading):
    """Cells of the table that begins with this heading."""
    lines = README[README.index(heading) :].splitlines()[2:]
    table = [line for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("|"))]]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table]


def test_the_table_of_methods_is_that_of_the_command():
    table = rows_of("| method |")
    assert [row[0].split("](")[0].strip("[`") for row in table] == [row[0] for row in method_rows()]
    for row, (name, paper, forwards, memory, needs) in zip(table, method_rows(), strict=True):
        assert row[1:] == [paper, forwards, memory, needs], name


def test_the_table_of_rules_is_that_of_the_command():
    assert [row[:2] for row in rows_of("| rule |")] == [[name, make_rule(name).extra_state] for name in RULES]


def test_every_method_has_its_page_and_the_links_lead_somewhere():
    for name, *_ in method_rows():
        assert f"(docs/methods/{name}.md)" in README
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file(), name
