"""Rows of a .json, .jsonl, .json.gz or .jsonl.gz file, with errors that name the line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def read_json_rows(files: list[str]) -> Iterator[dict[str, Any]]:
    """Every row of the files, one after another: one JSON object per line, or one array of objects."""
    for file in files:
        try:
            with _open(Path(file)) as lines:
                yield from _array_rows(file, lines.read()) if _starts_an_array(lines) else _line_rows(file, lines)
        except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{file}: damaged, or not UTF-8 text ({error}). Download or compress it again."
            ) from error


def _open(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _starts_an_array(lines: IO[str]) -> bool:
    start = lines.read(1)
    while start and start.isspace():
        start = lines.read(1)
    lines.seek(0)
    return start == "["


def _line_rows(file: str, lines: IO[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{file}, line {number}: not valid JSON ({error.msg} at column {error.colno}). A .jsonl file has one "
                "whole object on each line: mend or delete this one."
            ) from error
        yield _checked(row, f"{file}, line {number}")


def _array_rows(file: str, text: str) -> Iterator[dict[str, Any]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file}, line {error.lineno}: not valid JSON ({error.msg} at column {error.colno}). The file starts as one "
            "array, [{...}, {...}]: mend it there."
        ) from error
    for number, row in enumerate(rows):
        yield _checked(row, f"{file}, row {number} of the array")


def _checked(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row must be a JSON object with named columns, got {type(row).__name__}.")
    return row
