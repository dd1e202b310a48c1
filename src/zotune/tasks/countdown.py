"""Countdown: reach a target from given numbers with + - * /, each number exactly once. The reward can be computed.

A text is read up to the first line break and up to an equals sign, as an expression of whole numbers, the four
operations and brackets, by Python's parser but never by its evaluator; arithmetic is exact (fractions).
"""

import ast
import operator
import random
from collections import Counter
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

FORMAT_CREDIT = 0.1
"""What an expression that uses the right numbers earns although it misses the target."""
LONGEST = 200
"""Characters; what is longer is not parsed."""

OPERATIONS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def reward(text: str, row: Mapping[str, Any]) -> float:
    """Score a text: 1 if it solves the row, ``FORMAT_CREDIT`` if it is an expression of the row's numbers, else 0.

    The credit for the form is there because a score of only 0 and 1 is flat nearly everywhere for a model that does
    not solve any row yet; ``solved`` is the score without it.

    Args:
        text: what the model wrote.
        row: with ``nums``, the numbers, and ``target``.
    """
    value = evaluate_with(text, list(row["nums"]))
    if value is None:
        return 0.0
    return 1.0 if value == Fraction(row["target"]) else FORMAT_CREDIT


def solved(text: str, row: Mapping[str, Any]) -> float:
    """1 if the text is an expression that uses each number of the row exactly once and reaches its target, else 0."""
    return float(reward(text, row) == 1.0)


def evaluate_with(text: str, numbers: list[int]) -> Fraction | None:
    """The value of the expression in a text, or None if it is none, or does not use exactly these numbers."""
    lines = text.strip().splitlines()
    expression = lines[0].partition("=")[0].strip() if lines else ""
    if not expression or len(expression) > LONGEST:
        return None
    used: list[int] = []
    try:
        value = _value(ast.parse(expression, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value if Counter(used) == Counter(numbers) else None


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS:
        return OPERATIONS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError("not an expression of whole numbers, the four operations and brackets")


NUMBERS, TRAIN_ROWS, VALIDATION_ROWS = 4, 2000, 1000
SIGNS = ("+", "-", "*", "/")


def load(say: Callable[[str], None]) -> dict[str, list[dict[str, Any]]]:
    """Make rows, the same ones every time: four numbers to 99, a whole target from 10 to 100, no problem twice."""
    say(f"making {TRAIN_ROWS + VALIDATION_ROWS} rows of countdown")
    draw, seen = random.Random(0), set()
    rows: list[dict[str, Any]] = []
    while len(rows) < TRAIN_ROWS + VALIDATION_ROWS:
        row = _make_row(draw)
        if row is not None and (problem := (tuple(sorted(row["nums"])), row["target"])) not in seen:
            seen.add(problem)
            rows.append(row)
    return {"train": rows[:TRAIN_ROWS], "validation": rows[TRAIN_ROWS:]}


def _make_row(draw: random.Random) -> dict[str, Any] | None:
    """Join random parts by random signs until one is left; a row if its value is whole and in the range."""
    numbers = [draw.randint(1, 99) for _ in range(NUMBERS)]
    parts = [str(number) for number in numbers]
    while len(parts) > 1:
        left, right = parts.pop(draw.randrange(len(parts))), parts.pop(draw.randrange(len(parts)))
        parts.append(f"({left} {draw.choice(SIGNS)} {right})")
    solution = parts[0][1:-1]  # without the outermost brackets
    value = evaluate_with(solution, numbers)
    if value is None or value.denominator != 1 or not 10 <= value <= 100:
        return None
    return {"nums": numbers, "target": int(value), "solution": solution}
