"""Rows of a .csv or .csv.gz file: every cell is text, as it stands there, with errors that name the line.

Readers that guess types make the answer "42" a number, "N/A" nothing and "2024-01-01" a date. Here only the columns that
are asked for as `numbers` become numbers, and an empty cell None.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import IO, Any

from .text_files import check_text, open_text

Row = dict[str, Any]


def read_csv_rows(files: list[str], numbers: Sequence[str] = ()) -> Iterator[Row]:
    """Every row of the files, one after another. A file begins with the names of its columns."""
    _allow_long_cells()
    for file in files:
        with open_text(file) as text:
            cells = csv.reader(_checked_lines(file, text), strict=True)
            try:
                header = _header(file, next(cells, []))
                for row in cells:
                    if row:  # not a blank line
                        yield _row(header, row, numbers, f"{file}, line {cells.line_num}")
            except csv.Error as error:
                raise ValueError(
                    f"{file}, line {cells.line_num}: not valid CSV ({error}). Put texts that hold quotes, commas or line "
                    'breaks between quotes, and write a quote inside them twice: "".'
                ) from error


def csv_columns(file: str) -> list[str]:
    """The names in the first line."""
    _allow_long_cells()
    with open_text(file) as text:
        return _header(file, next(csv.reader(_checked_lines(file, text)), []))


def _allow_long_cells() -> None:
    """The module's limit of 128 KiB per cell holds for the process, and is below a long conversation."""
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))


def _checked_lines(file: str, text: IO[str]) -> Iterator[str]:
    for number, line in enumerate(text, start=1):
        check_text(line, file, number)
        yield line


def _header(file: str, names: list[str]) -> list[str]:
    if not any(name.strip() for name in names):
        raise ValueError(f"{file} has no names of columns. Its first line must be such as: prompt,chosen,rejected.")
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(f"{file}: the column {double[0]!r} stands twice in the first line. Rename one of them.")
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        raise ValueError(
            f"{file}: the first line is one column, {names[0]!r}. Separate columns by commas, not by semicolons or tabs."
        )
    return names


def _row(header: list[str], cells: list[str], numbers: Sequence[str], where: str) -> Row:
    if len(cells) != len(header):
        raise ValueError(
            f"{where}: {len(cells)} cells, and the first line names {len(header)} columns. Put texts that hold commas or "
            "line breaks between quotes, and give every row all cells."
        )
    row: Row = {name: cell or None for name, cell in zip(header, cells, strict=True)}
    for name in numbers:
        if row.get(name) is not None:
            row[name] = _number(row[name], name, where)
    return row


def _number(cell: str, column: str, where: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(
            f"{where}, column {column!r}: a number is needed, got {cell!r:.60}. Write one, or leave the cell empty."
        ) from None
