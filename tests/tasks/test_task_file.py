"""Templates, and tasks from files."""

import json
import re
from pathlib import Path

import pytest

from zotune.errors import ConfigError, DataError
from zotune.tasks.catalogue import find_task
from zotune.tasks.task import Task, make_example
from zotune.tasks.template import CHANGES, fields_of, render

TASK = """
prompt: "{text:strip}\\nSpam?"
options:
  ham: " no"
  spam: " yes"
label_field: kind
label_names: {0: ham, 1: spam}
calibration: "Spam?"
hub: {path: someone/mails, validation: test}
note: mails
"""


@pytest.fixture
def write(tmp_path):
    def written(text, name="mails.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return written


def test_a_task_is_one_short_file(write):
    task = find_task(write(TASK))
    assert (task.name, task.kind, task.label_field, task.hub.validation) == ("mails", "classification", "kind", "test")
    example = make_example(task, {"text": " Win now ", "kind": "spam"})
    assert (example.prompt, example.options, example.label) == ("Win now\nSpam?", (" no", " yes"), 1)
    assert make_example(task, {"text": "x", "kind": 0}).label == 0


def test_the_files_of_the_documentation_work(write):
    text = (Path(__file__).parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
    write("def score(text, row):\n    return 0.5\n", "score.py")
    blocks = re.findall(r"```(yaml|python)\n(.*?)```", text, flags=re.DOTALL)
    tasks = [find_task(write(body, f"task.{'yaml' if kind == 'yaml' else 'py'}")) for kind, body in blocks]
    assert [task.kind for task in tasks] == ["classification", "choice", "generation", "choice"]
    assert make_example(tasks[0], {"text": " Hi ", "label": 1}).prompt == "Hi\nSpam?"
    row = {"premise": "It fell.", "question": "cause", "choice1": "Wind.", "choice2": "Rain.", "label": 1}
    assert make_example(tasks[1], row).prompt == "It fell because "
    assert tasks[2].reward("", {}) == 0.5
    assert make_example(tasks[3], {"text": "a bc de", "words": ["a", "bc", "de"]}).right == (1, 2)


def test_choice_and_generation_from_files(write):
    choice = find_task(write('prompt: "{a}:"\noptions: [" {x}", " {y:lower}"]\nwords: {a: {q: Why}}\n'))
    example = make_example(choice, {"a": "q", "x": "One", "y": "TWO", "label": 1})
    assert (choice.kind, example.prompt, example.options) == ("choice", "Why:", (" One", " two"))
    generation = find_task(write(json.dumps({"prompt": "{q}\nA:", "answers": "golds"}), "open.json"))
    example = make_example(generation, {"q": "Who?", "golds": ["Ana", "Bo"]})
    assert (generation.kind, example.options, example.answers) == ("generation", (" Ana\n",), ("Ana", "Bo"))
    assert make_example(generation, {"q": "Who?", "golds": "Ana"}).answers == ("Ana",)
    with pytest.raises(DataError, match="no field 'golds'"):
        make_example(generation, {"q": "Who?"})


def test_a_reward_beside_the_file(write):
    write("def score(text, row):\n    return len(text)\n", "mine.py")
    task = find_task(write('prompt: "{q}"\nanswers: a\nreward: mine.py:score\n'))
    assert task.reward("abc", {}) == 3


def test_a_python_file(write):
    code = 'from zotune.tasks.task import Task\nTASK = Task("mine", "{a} is", {0: " x", 1: " y"}, "me", "MIT")\n'
    path = write(code, "mine.py")
    assert find_task(path) == find_task(f"{path}:TASK")
    assert find_task(path).name == "mine"
    with pytest.raises(ConfigError, match="is a type; a zotune"):
        find_task(f"{path}:Task")
    with pytest.raises(ConfigError, match="has no 'OTHER'"):
        find_task(f"{path}:OTHER")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("options: {0: ' a', 1: ' b'}", "has no prompt"),
        ("prompt: '{a}'", r"0 option\(s\)"),
        ("prompt: '{a}'\noptions: {0: Yes, 1: No}", "put quotes around it"),  # YAML reads these as true and false
        ("prompt: '{a}'\noptions: 3", "has 3 as options"),
        ("prompt: '{a}'\noptins: {0: ' a', 1: ' b'}", "sets 'optins'.*Did you mean 'options'"),
        ("prompt: '{a}'\nunfold: x", "needs Python"),
        ("prompt: 7", "has 7 as 'prompt'"),
        ("prompt: '{a'\noptions: {0: ' a', 1: ' b'}", "cannot be read"),
        ("prompt: '{a.b}'\noptions: {0: ' a', 1: ' b'}", "plain field name"),
        ("prompt: '{a:upper}'\noptions: {0: ' a', 1: ' b'}", "asks for 'upper'; there are strip"),
        ("prompt: '{a:strip|list}'\noptions: {0: ' a', 1: ' b'}", "asks for 'list'"),
        ("prompt: '{a}'\noptions: {0: ' a', 1: ' b'}\nanswers: b", "both options and answers"),
        ("prompt: '{a}'\noptions: {0: ' a', 1: ' b'}\nhub: x", "has 'x' as hub"),
        ("prompt: '{a}'\noptions: {0: ' a', 1: ' b'}\ndev_rows: 0", "has 0 as dev_rows"),
        ("prompt: '{a}'\noptions: {0: ' a', 1: ' b'}\nwords: [1]", "a mapping is needed"),
        ("prompt: '{a}'\noptions: {0: ' a', 1: ' b'}\nname: sst2", "like one of zotune's"),
        ("prompt: '{a}'\nanswers: b\nreward: nowhere_at_all:f", "cannot be imported"),
        ("- a", "holds a list"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_files(write, text, message):
    with pytest.raises(ConfigError, match=message):
        find_task(write(text))


def test_missing_files():
    with pytest.raises(ConfigError, match="no task file"):
        find_task("nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be imported"):
        find_task("nowhere.py")


@pytest.mark.parametrize(
    ("change", "text", "wanted"),
    [
        ("strip", " a b ", "a b"),
        ("lower", "He", "he"),
        ("question", "is it", "Is it?"),
        ("question", "Is it?", "Is it?"),
        ("no_period", "It fell. ", "It fell"),
        ("no_period", "It fell", "It fell"),
        ("first_lower", "The cup. Ah", "the cup. Ah"),
        ("first_lower", "I fell", "I fell"),
        ("first_lower", "Fell", "fell"),
        ("before_blank", "a _ b", "a "),
        ("after_blank", "a _ b", " b"),
        ("highlights", "x\n@highlight\ny\n@highlight\nz", "x\n- y\n- z"),
    ],
)
def test_changes(change, text, wanted):
    assert render(f"<{{a:{change}}}>", {"a": text}, {}, "a row") == f"<{wanted}>"


def test_every_change_is_tested():
    tested = {mark.args[1][n][0] for mark in test_changes.pytestmark for n in range(len(mark.args[1]))}
    assert tested == set(CHANGES)


def test_values_that_are_no_texts():
    assert render("{n:number} of {l:list}", {"n": 3, "l": [1, 2]}, {}, "a row") == "3 of 1, 2"
    for template, row in (
        ("{n:number}", {"n": True}),
        ("{n:number}", {"n": "3"}),
        ("{l:list}", {"l": []}),
        ("{n}", {"n": 3}),
    ):
        with pytest.raises(DataError, match="a row has"):
            render(template, row, {}, "a row")


def test_literal_braces_and_fields():
    assert render("{{x}} {a}", {"a": "{b}"}, {}, "a row") == "{x} {b}"
    assert fields_of("{{x}} {a} {b:strip} {a}") == ("a", "b")
    task = Task("n", "{a}", (" {b}", " {c}"), "s", "l", calibration="{d}", fields=("e", "a"))
    assert task.needed_fields == ("a", "b", "c", "d", "e")
