"""Data made fit to be shown: what a reader or a terminal would not see, or would obey, is written out."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text on one line, with every control, formatting and unassigned character as a backslash escape.

    Escape sequences (which drive a terminal), line breaks, direction marks (which reorder what is read), zero-width
    characters and lone surrogates (which no file can hold) all come out as what they are.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def with_white_space(text: str) -> str:
    """The same with spaces, line breaks and tabs as signs; a line break is kept after its sign."""
    return "".join(WHITE_SPACE.get(char) or printable(char) for char in text)


WHITE_SPACE = {" ": "·", "\n": "⏎\n", "\t": "⇥"}


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
