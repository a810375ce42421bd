"""Text from outside (data, file names, servers), made fit for a terminal, a log line, or a page."""

from __future__ import annotations

import logging
from typing import Any


def printable(text: str) -> str:
    """The text on one line, with every control, formatting and unassigned character as a backslash escape.

    Escape sequences (which drive a terminal), line breaks, direction marks (which reorder what is read), zero-width
    characters and lone surrogates (which no file can hold) all come out as what they are.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escaped(char) for char in text)


def printable_lines(text: str) -> str:
    """The same, with its line breaks and tabs."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def keep_logs_printable(package: str) -> None:
    """From here on, what loggers of `package` write is `printable_lines`, whichever handlers show it."""
    make = logging.getLogRecordFactory()
    if getattr(make, "package", None) == package:
        return

    def make_printable(name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(name, *args, **kwargs)
        if name == package or name.startswith(f"{package}."):
            said = record.getMessage()
            shown = printable_lines(said)
            if shown != said:
                record.msg, record.args = shown, ()
        return record

    make_printable.package = package  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_printable)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
