"""From the forms in which a set is distributed (hub, SuperGLUE's files) to rows with the fields of the templates.

Each function takes a row in any of the known forms, or one that has been through it already, and leaves others alone:
what then does not fit is refused with the name of the field when it is put into words.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Unfolded = list[dict[str, Any]]


def boolq(row: Row) -> Unfolded:
    """The hub calls the label ``answer``."""
    return [{**row, "label": row["answer"]} if "answer" in row and "label" not in row else dict(row)]


def wsc(row: Row) -> Unfolded:
    """SuperGLUE's files keep the two spans one level down, in ``target``."""
    target = row.get("target")
    return [{**row, **target} if isinstance(target, Mapping) else dict(row)]


def multirc(row: Row) -> Unfolded:
    """SuperGLUE's files hold a paragraph with all its questions and answers in one row."""
    passage = row.get("passage")
    if not isinstance(passage, Mapping):
        return [dict(row)]
    return [
        {"paragraph": passage["text"], "question": question["question"], "answer": answer["text"]}
        | ({"label": answer["label"]} if "label" in answer else {})
        for question in passage["questions"]
        for answer in question["answers"]
    ]


def record(row: Row) -> Unfolded:
    """SuperGLUE's files hold a passage with all its queries in one row, and name entities by their place (end included)."""
    passage = row.get("passage")
    if not isinstance(passage, Mapping):
        return [dict(row)]
    text = passage["text"]
    entities = sorted({text[entity["start"] : entity["end"] + 1] for entity in passage["entities"]})
    return [
        {
            "passage": text,
            "query": query["query"],
            "entities": entities,
            "answers": sorted({answer["text"] for answer in query.get("answers", [])}),
        }
        for query in row["qas"]
    ]


def record_options(row: Row) -> Sequence[str]:
    """The query with each entity of the passage in its blank."""
    return [" " + row["query"].replace("@placeholder", entity) for entity in row["entities"]]


def record_right(row: Row) -> Sequence[int]:
    """The numbers of the entities that are answers, in the order of the answers."""
    entities = list(row["entities"])
    return [entities.index(answer) for answer in row["answers"] if answer in entities]


def squad_prompt(row: Row) -> str:
    """The title's line is left out where rows come without titles."""
    title = f"Title: {row['title']}\n" if row.get("title") else ""
    return f"{title}Context: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:"


def squad_answers(row: Row) -> Sequence[str]:
    """All reference answers, in their order."""
    return list(row["answers"]["text"])


def drop_answers(row: Row) -> Sequence[str]:
    """Every span counts as an answer of its own, as MeZO has it; the official metric of DROP is another."""
    return list(row["answers_spans"]["spans"])


def countdown_answers(row: Row) -> Sequence[str]:
    """One expression that is right; others may be as well."""
    return [row["solution"]]
