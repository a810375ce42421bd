"""How the pipeline refuses a value: where it stands, what is wrong, what to do."""

from __future__ import annotations

from ..printable import printable

LONGEST = 200


def bad(where: str, column: str, problem: str, remedy: str) -> ValueError:
    """`where` names the row ("Row 7 of train"), `remedy` is a whole sentence without its full stop."""
    return ValueError(f"{where}, column {clean(column)!r}: {clean(problem)}. {remedy}.")


def clean(text: object) -> str:
    """Words that come from data, fit for a terminal: short, and no character that steers it."""
    shown = str(text)
    if len(shown) > LONGEST:
        shown = f"{shown[:LONGEST]}..."
    return printable(shown)
