"""Text from outside (data, file names, servers), made fit for a terminal, a log line, or a page."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text on one line, with every control, formatting and unassigned character as a backslash escape.

    Escape sequences (which drive a terminal), line breaks, direction marks (which reorder what is read), zero-width
    characters and lone surrogates (which no file can hold) all come out as what they are.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
