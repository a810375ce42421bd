"""Rows of a .json, .jsonl, .json.gz or .jsonl.gz file, exactly as they stand there, with errors that name the line.

One object per line, one array of objects, or objects over several lines one after another. Rejects what would not
come through unchanged: a key twice in one object, half of a surrogate pair, an integer above 64 bits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import IO, Any

from ..rows.column_names import READ
from .text_files import check_text, open_text

Row = dict[str, Any]
KNOWN = frozenset(READ)

SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""Half of a character outside the basic plane, most often one of a good pair."""

LEVELS = 200
"""How deep a row may be nested. What reads it later recurses, and real rows have fewer than ten levels."""

SPACE = re.compile(r"[ \t\r\n]*")


def read_json_rows(files: list[str]) -> Iterator[Row]:
    """Every row of the files, one after another."""
    for file in files:
        with open_text(file) as lines:
            start = _first_line(lines)
            if start.startswith("["):
                yield from _array_rows(file, lines.read())
            elif start == "{":
                yield from _object_rows(file, lines.read())
            else:
                yield from _line_rows(file, lines)


def _first_line(lines: IO[str]) -> str:
    """The first line that is not blank, stripped, at most 100 characters of it; the file is then at its beginning again."""
    start = ""
    while not start and (line := lines.readline(100)):
        start = line.strip()
    lines.seek(0)
    return start


def _line_rows(file: str, lines: IO[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        check_text(text, file, number)
        where = f"{file}, line {number}"
        try:
            value = DECODER.decode(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{where}: {_reason(error)}. A .jsonl file has one whole object on each line: mend or delete this one."
            ) from error
        yield _checked(value, text, where)


def _array_rows(file: str, text: str) -> Iterator[Row]:
    """The text is held whole, its rows one at a time."""
    check_text(text, file)
    at = _after_space(text, _after_space(text, 0) + 1)
    more = not text.startswith("]", at)
    number, line, counted = 0, 1, 0
    while more:
        value, end = _next_value(file, text, at, "The file starts as one array, [{...}, {...}]")
        line += text.count("\n", counted, at)
        yield _checked(value, text[at:end], f"{file}, row {number} of the array (line {line})")
        number, counted = number + 1, at
        at = _after_space(text, end)
        more = text.startswith(",", at)
        if more:
            at = _after_space(text, at + 1)
    if not text.startswith("]", at):
        _misplaced(file, text, at, "',' or ']' expected after a row of the array")
    if (rest := _after_space(text, at + 1)) < len(text):
        _misplaced(file, text, rest, "something follows the array")


def _object_rows(file: str, text: str) -> Iterator[Row]:
    check_text(text, file)
    at = _after_space(text, 0)
    line, counted = 1, 0
    while at < len(text):
        value, end = _next_value(file, text, at, "The file starts with an object over several lines")
        line += text.count("\n", counted, at)
        yield _checked(value, text[at:end], f"{file}, line {line}")
        counted = at
        at = _after_space(text, end)


# --- values ---


def _refuse_double_keys(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        double = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {double!r} stands twice in one object")
    return row


def _integer(digits: str) -> int:
    if len(digits) > 18 and (len(digits) > 20 or not -(2**63) <= int(digits) < 2**64):
        raise ValueError(f"the integer {digits:.30} does not fit into 64 bits: write it as a string")
    return int(digits)


DECODER = json.JSONDecoder(object_pairs_hook=_refuse_double_keys, parse_int=_integer)


def _next_value(file: str, text: str, at: int, kind: str) -> tuple[Any, int]:
    """The value that begins at `at`, and where it ends."""
    try:
        return DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else _line_of(text, at)
        raise ValueError(f"{file}, line {line}: {_reason(error)}. {kind}: mend it there.") from error


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON ({error.msg} at column {error.colno})"
    if isinstance(error, RecursionError):
        return "nested too deep"
    return str(error)


def _checked(row: Any, text: str, where: str) -> Row:
    """The row, if it is one and can be held as it is. `text` is what it was read from."""
    if not isinstance(row, dict) or not row:
        got = "an empty one" if row == {} else type(row).__name__
        raise ValueError(
            f"{where}: a row must be a JSON object with named columns, got {got}. Write "
            '{"prompt": ..., "chosen": ..., "rejected": ...}.'
        )
    if KNOWN.isdisjoint(row):
        _refuse_wrapped_rows(row, where)
    if text.count("[") + text.count("{") > LEVELS and _is_deep(row):
        raise ValueError(
            f"{where}: nested more than {LEVELS} levels deep. Remove what is nested so, or give it as text."
        )
    if "\\u" in text and SURROGATE.search(text):
        for column, value in row.items():
            _refuse_lone_surrogates([column, value], f"{where}, column {_shown(column)}")
    return row


def _refuse_wrapped_rows(row: Row, where: str) -> None:
    """`{"data": [rows]}` is no row, but a shell around rows."""
    for key, value in row.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and not KNOWN.isdisjoint(value[0]):
            raise ValueError(
                f"{where}: no row, but one object whose {key!r} holds the rows. Save the rows alone, for example with "
                f"`jq -c '.[\"{key}\"][]' file.json > file.jsonl`."
            )


def _is_deep(row: Row) -> bool:
    level: list[Any] = [row]
    for _ in range(LEVELS):
        inside = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
        level = [child for child in inside if isinstance(child, dict | list)]
        if not level:
            return False
    return True


def _refuse_lone_surrogates(value: Any, where: str) -> None:
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            _refuse_lone_surrogates(item, where)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {_shown(value[error.start])} is half of a character (a lone surrogate). Write the whole "
                "character, or remove it."
            ) from None


def _shown(text: str) -> str:
    return ascii(text) if len(text) < 60 else f"{text[:60]!a}..."


# --- places ---


def _after_space(text: str, at: int) -> int:
    found = SPACE.match(text, at)
    return found.end() if found else at


def _line_of(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1


def _misplaced(file: str, text: str, at: int, problem: str) -> None:
    column = at - text.rfind("\n", 0, at)
    raise ValueError(
        f"{file}, line {_line_of(text, at)}: not valid JSON ({problem}, at column {column}). The file starts as one array, "
        "[{...}, {...}]: mend it there."
    )
