"""Text that is not ours, made fit to be shown: what a reader or a terminal would not see, or would obey, is written out."""

from __future__ import annotations


def printable(text: object) -> str:
    """The text on one line, with every control, formatting and unassigned character as a backslash escape.

    Escape sequences (which drive a terminal), line breaks, direction marks (which reorder what is read), zero-width
    characters and lone surrogates (which no file can hold) all come out as what they are.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(char if char.isprintable() else _escaped(char) for char in shown)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
