"""Wording of data errors: which row and column, what is wrong, what to do."""

from __future__ import annotations

from ..printable import printable

LONGEST = 200


def row_name(number: int, name: str) -> str:
    """Return how errors name a row: "Row 7 of train"."""
    return f"Row {number} of {name}"


def bad(where: str, column: str, problem: str, remedy: str) -> ValueError:
    """`where` names the row ("Row 7 of train"), `remedy` is a whole sentence without its full stop."""
    return ValueError(f"{where}, column {clean(column)!r}: {clean(problem)}. {remedy}.")


def clean(text: object) -> str:
    """Return text from data made safe for a terminal: short, without control characters."""
    shown = str(text)
    if len(shown) > LONGEST:
        shown = f"{shown[:LONGEST]}..."
    return printable(shown)
