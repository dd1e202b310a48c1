"""One made-up row of every task, in each form in which its set is distributed, as golden strings."""

import os
from pathlib import Path

import pytest

from zotune.errors import DataError
from zotune.tasks.catalogue import TASKS
from zotune.tasks.rows import load_rows
from zotune.tasks.task import calibration_example, make_example, make_examples

# name: (row, prompt, options, numbers of the right options, calibration: prompt and first option)
GOLDEN = {
    "sst2": (
        {"sentence": " a quiet joy . ", "label": 1},
        "a quiet joy . It was",
        (" terrible", " great"),
        (1,),
        ("It was", " terrible"),
    ),
    "sst2_empty": (
        {"sentence": "a quiet joy . ", "label": 0},
        "a quiet joy .",
        (" terrible", " great"),
        (0,),
        ("", "terrible"),
    ),
    "vader_movie": (
        {"sentence": "dull", "label": 0},
        "dull It was",
        (" terrible", " great"),
        (0,),
        ("It was", " terrible"),
    ),
    "rte": (
        {"premise": "Ana sold the mill.", "hypothesis": "The mill was sold.", "label": "entailment", "idx": 3},
        'Ana sold the mill.\nDoes this mean that "The mill was sold." is true? Yes or No?\n',
        ("Yes", "No"),
        (0,),
        ("", "Yes"),
    ),
    "rte_empty": (
        {"premise": "Ana sold the mill.", "hypothesis": "The mill burnt.", "label": 1},
        "Ana sold the mill.\nThe mill burnt.\n",
        ("Yes", "No"),
        (1,),
        ("", "Yes"),
    ),
    "cb": (
        {"premise": "Do you think it rained?", "hypothesis": "it rained", "label": "neutral"},
        'Suppose Do you think it rained? Can we infer that "it rained"? Yes, No, or Maybe?\n',
        ("Yes", "No", "Maybe"),
        (2,),
        ("", "Yes"),
    ),
    "boolq": (
        {"passage": "Tea -- A drink.", "question": "is tea a drink", "label": True, "idx": 1},
        "Tea -- A drink. Is tea a drink?\n",
        ("Yes", "No"),
        (0,),
        ("", "Yes"),
    ),
    "wsc": (
        {
            "text": "Ben met Max. He waved.",
            "label": False,
            "target": {"span1_index": 2, "span1_text": "Max", "span2_index": 3, "span2_text": "He"},
        },
        'Ben met Max. He waved.\nIn the previous sentence, does the pronoun "he" refer to Max? Yes or No?\n',
        ("No", "Yes"),
        (0,),
        ("", "No"),
    ),
    "wic": (
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A savings bank.", "label": False, "start1": 8},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\nA savings bank.\n',
        ("No", "Yes"),
        (0,),
        ("", "No"),
    ),
    "multirc": (
        {"paragraph": "Ana ran. ", "question": "Who ran?", "answer": "Ana", "label": 1},
        'Ana ran. \nQuestion: Who ran?\nI found this answer "Ana". Is that correct? Yes or No?\n',
        ("No", "Yes"),
        (1,),
        ("", "No"),
    ),
    "copa": (
        {
            "premise": "The cup fell. ",
            "question": "effect",
            "choice1": "I swept the floor.",
            "choice2": "It was late.",
            "label": 0,
        },
        "The cup fell so ",
        ("I swept the floor.", "it was late."),
        (0,),
        ("so ", "I swept the floor."),
    ),
    "copa_empty": (
        {"premise": "The cup fell.", "question": "cause", "choice1": "I hit it.", "choice2": "It was late.", "label": 1},
        "The cup fell. ",
        ("I hit it.", "It was late."),
        (1,),
        ("", "I hit it."),
    ),
    "record": (
        {
            "passage": "Ana and Bo met in Rome.\n@highlight\nAna won\n@highlight\nBo lost",
            "query": "The prize went to @placeholder.",
            "entities": ["Ana", "Bo", "Rome"],
            "answers": ["Rome", "Ana"],
        },
        "Ana and Bo met in Rome.\n- Ana won\n- Bo lost\n-",
        (" The prize went to Ana.", " The prize went to Bo.", " The prize went to Rome."),
        (2, 0),
        ("-", " The prize went to Ana."),
    ),
    "winogrande": (
        {"sentence": "Ann thanked Eve because _ had helped.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        "Ann thanked Eve because ",
        ("Ann had helped.", "Eve had helped."),
        (1,),
        ("", "Ann had helped."),
    ),
    "squad": (
        {"title": "Tea", "context": "Tea is a drink.", "question": " What is tea? ", "answers": {"text": ["a drink", "drink"]}},
        "Title: Tea\nContext: Tea is a drink.\nQuestion: What is tea?\nAnswer:",
        (" a drink\n",),
        ("a drink", "drink"),
        None,
    ),
    "drop": (
        {"passage": "They won 3-1.", "question": " How many? ", "answers_spans": {"spans": ["3", "three"]}},
        "Passage: They won 3-1.\nQuestion: How many?\nAnswer:",
        (" 3\n",),
        ("3", "three"),
        None,
    ),
    "agnews": (
        {"text": "Shares fell. ", "label": 2},
        "Shares fell.\nTopic:",
        (" World", " Sports", " Business", " Technology"),
        (2,),
        ("Topic:", " World"),
    ),
    "trec": (
        {"text": "Where is Rome ?", "coarse_label": 4, "fine_label": "LOC:city"},
        "Where is Rome ?\nThe answer is a",
        (" expression", " entity", " description", " human", " location", " number"),
        (4,),
        ("The answer is a", " expression"),
    ),
    "countdown": (
        {"nums": [3, 5, 2], "target": 16, "solution": "(3 + 5) * 2"},
        "Numbers: 3, 5, 2\nTarget: 16\nUse every number exactly once, with +, -, * and /, to reach the target.\nAnswer:",
        (" (3 + 5) * 2\n",),
        ("(3 + 5) * 2",),
        None,
    ),
}  # fmt: skip

# (task, row in another form, field -> value of the rows it unfolds to)
OTHER_FORMS = {
    "boolq, hub": ("boolq", {"passage": "Tea.", "question": "is it?", "answer": False}, [{"label": False}]),
    "wsc, hub": (
        "wsc",
        {"text": "t", "span1_text": "Max", "span2_text": "He", "span1_index": 1, "span2_index": 2, "label": 0},
        [{"span1_text": "Max"}],
    ),
    "multirc, SuperGLUE": (
        "multirc",
        {
            "passage": {
                "text": "Ana ran.",
                "questions": [{"question": "Who?", "answers": [{"text": "Ana", "label": 1}, {"text": "Bo", "label": 0}]}],
            }
        },
        [
            {"paragraph": "Ana ran.", "question": "Who?", "answer": "Ana", "label": 1},
            {"paragraph": "Ana ran.", "question": "Who?", "answer": "Bo", "label": 0},
        ],
    ),
    "record, SuperGLUE": (
        "record",
        {
            "passage": {
                "text": "Bo met Ana. Bo won.",
                "entities": [{"start": 7, "end": 9}, {"start": 0, "end": 1}, {"start": 12, "end": 13}],
            },
            "qas": [
                {"query": "@placeholder won", "answers": [{"start": 12, "end": 13, "text": "Bo"}]},
                {"query": "@placeholder lost", "answers": [{"text": "Ana"}]},
            ],
        },
        [
            {"entities": ["Ana", "Bo"], "answers": ["Bo"], "query": "@placeholder won"},
            {"entities": ["Ana", "Bo"], "answers": ["Ana"], "query": "@placeholder lost"},
        ],
    ),
}  # fmt: skip
FOLDERS = {"sst2_empty": "sst2", "rte_empty": "rte", "copa_empty": "copa", "record": "record_few"}
YES_IS_ONE = [(0, 0), (1, 1), (False, 0), (True, 1)]
LABELS = [
    ("rte", {"premise": "a", "hypothesis": "b"}, [(0, 0), (1, 1), ("entailment", 0), ("not_entailment", 1)]),
    (
        "cb",
        {"premise": "a", "hypothesis": "b"},
        [(0, 0), (1, 1), (2, 2), ("entailment", 0), ("contradiction", 1), ("neutral", 2)],
    ),
    ("boolq", {"passage": "a", "question": "b"}, [(0, 1), (1, 0), (False, 1), (True, 0)]),
    ("wic", {"word": "a", "sentence1": "b", "sentence2": "c"}, YES_IS_ONE),
    ("wsc", {"text": "a", "span1_text": "b", "span2_text": "c"}, YES_IS_ONE),
    ("multirc", {"paragraph": "a", "question": "b", "answer": "c"}, YES_IS_ONE),
]


def test_every_task_has_a_golden_row():
    assert set(GOLDEN) == set(TASKS)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name):
    task = TASKS[name]
    row, prompt, options, right, calibration = GOLDEN[name]
    unfolded = task.unfold(row) if task.unfold else [row]
    example = make_example(task, *unfolded)
    assert example.prompt == prompt
    assert example.options == options
    if task.kind == "generation":
        assert example.answers == right
        return
    assert (example.right or (example.label,)) == right
    assert example.label == right[0]
    bare = calibration_example(task, example)
    assert (bare.prompt, bare.options[0]) == calibration
    assert (bare.label, bare.right) == (example.label, example.right)


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_unfold_to_the_same_fields(form):
    name, row, wanted = OTHER_FORMS[form]
    task = TASKS[name]
    found = task.unfold(row)
    assert len(found) == len(wanted)
    for new, fields in zip(found, wanted, strict=True):
        assert {key: new[key] for key in fields} == fields
        assert task.unfold(new) == [new], "what has been unfolded stays as it is"
    make_examples(task, found)


@pytest.mark.parametrize(("name", "row", "labels"), LABELS)
def test_label_encodings(name, row, labels):
    for label, option in labels:
        assert make_example(TASKS[name], {**row, "label": label}).label == option, label
    for withheld in (-1, "", None, "yes", 0.0):
        with pytest.raises(DataError, match=r"has label .*allowed are"):
            make_example(TASKS[name], {**row, "label": withheld})


def test_winogrande_counts_its_options_from_one():
    row = {"sentence": "a _ b", "option1": "x", "option2": "y"}
    assert [make_example(TASKS["winogrande"], {**row, "answer": label}).label for label in ("1", "2", 1, 2)] == [
        0,
        1,
        0,
        1,
    ]
    with pytest.raises(DataError, match="withheld"):  # the test split
        make_example(TASKS["winogrande"], {**row, "answer": ""})
    with pytest.raises(DataError, match="one blank"):
        make_example(TASKS["winogrande"], {**row, "sentence": "no blank", "answer": "1"})


def test_rows_that_no_option_or_answer_fits():
    record = {"passage": "p", "query": "@placeholder", "entities": ["Ana"], "answers": ["Bo"]}
    with pytest.raises(DataError, match="one or more must be"):
        make_example(TASKS["record"], record)
    with pytest.raises(DataError, match=r"the answers \[\]"):
        make_example(TASKS["drop"], {"passage": "p", "question": "q", "answers_spans": {"spans": []}})
    with pytest.raises(DataError, match="'why' as 'question'; allowed are 'effect', 'cause'"):
        make_example(TASKS["copa"], {"premise": "a", "question": "why", "choice1": "b", "choice2": "c", "label": 0})


def test_space_before_the_whole_prompt_goes_and_space_inside_stays():
    row = {"premise": " \n Ana ran. ", "hypothesis": " She did ", "label": 0}
    assert make_example(TASKS["rte_empty"], row).prompt == "Ana ran. \n She did \n"


def test_squad_without_titles():
    row = {"context": "c", "question": "q", "answers": {"text": ["a"]}}
    assert make_example(TASKS["squad"], row).prompt == "Context: c\nQuestion: q\nAnswer:"


@pytest.mark.skipif(
    "ZOTUNE_DATA" not in os.environ, reason="ZOTUNE_DATA names no folder with a folder of rows per task"
)
@pytest.mark.parametrize("name", GOLDEN)
def test_real_rows(name):
    folder = Path(os.environ["ZOTUNE_DATA"]) / FOLDERS.get(name, name)
    if not folder.is_dir():
        pytest.skip(f"no rows in {folder}")
    task = TASKS[name]
    for split, rows in load_rows(task, data_folder=folder).items():  # puts every row into words
        examples = make_examples(task, rows, where=split)
        if task.kind != "generation":
            used = {option for example in examples for option in (example.right or (example.label,))}
            assert len(used) >= 2, "a label encoding that maps all rows to one option"
            for example in examples[:50]:
                calibration_example(task, example)
        elif task.reward is not None:
            assert all(task.reward(example.answers[0], example.row) == 1 for example in examples)
