"""How the pipeline refuses a value: where it stands, what is wrong, what to do."""

from __future__ import annotations


def bad(where: str, column: str, problem: str, remedy: str) -> ValueError:
    """`where` names the row ("Row 7 of train"), `remedy` is a whole sentence without its full stop."""
    return ValueError(f"{where}, column {column!r}: {problem}. {remedy}.")
