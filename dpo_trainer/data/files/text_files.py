"""Text files of untrusted content, line by line: plain or .gz, UTF-8 with or without a byte order mark."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO


@contextmanager
def open_text(file: str) -> Iterator[IO[str]]:
    """The file as text. What goes wrong while it is read becomes an error that names it.

    Bytes that are not UTF-8 come through, so that the reader knows their line: give each line to `check_text`.
    """
    opener = gzip.open if file.endswith(".gz") else open
    try:
        # newline="": a line break inside a quoted CSV cell stays as it is.
        with opener(file, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            yield text
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: damaged, or no gzip at all ({error}). Download or compress it again.") from error
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read ({error.strerror or error}). Check that it is a file and that you may read it."
        ) from error


def check_text(text: str, file: str, first_line: int = 1) -> None:
    """Refuse bytes that are not UTF-8, and null bytes. `first_line` is the number of the text's first line, from 1."""
    at, problem = text.find("\0"), "a null byte, which no text holds: remove it, or if the file is UTF-16"
    try:
        text.encode()
    except UnicodeEncodeError as error:  # at what `surrogateescape` left in the place of a byte
        at, problem = error.start, "not UTF-8 text:"
    if at >= 0:
        line = first_line + text.count("\n", 0, at)
        encoding = "UTF-16" if text[at] == "\0" or _starts_as_utf16(file) else "LATIN1"
        raise ValueError(
            f"{file}, line {line}: {problem} save it as UTF-8, for example with `iconv -f {encoding} -t UTF-8 old > new`, "
            "where -f names the encoding that it is in."
        )


def _starts_as_utf16(file: str) -> bool:
    with open(file, "rb") as data:
        return data.read(2) in (b"\xff\xfe", b"\xfe\xff")
