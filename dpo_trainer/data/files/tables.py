"""Rows that a reader yields -> a `Dataset` on disk, written once per content of the files."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset

from ...storage.folders import atomic_write, damage, is_sealed
from ..errors import row_name
from ..rows.column_names import PREPARED, TOKENIZED
from .column_types import JSON, as_array, column_type, has_floats, holds_nan, wider

logger = logging.getLogger(__name__)

BLOCK = 256
"""Rows in memory at a time: few enough for rows of 2 MB."""

INTEGERS = {*TOKENIZED, *PREPARED}
"""Columns that hold nothing but integers, if they are right."""

VERSION = 1
"""Part of the cache key: raise it when the same files give other tables."""


def table_of_rows(read: Callable[[], Iterator[dict[str, Any]]], files: list[str], key: str) -> Dataset:
    """The rows of `read`, which come from `files`. `key` tells apart ways of reading the same files.

    The files are read twice: once to find types that hold every row, however late a column first has a value, and once
    to write. The table lies in the cache of `datasets` under a hash of the files' content, which is its fingerprint too:
    a second run, or the same file in another place, reads that, and all that was computed from it. One that is not what was
    written is made anew, with a warning.
    """
    fingerprint = _fingerprint(files, key)
    path = Path(datasets.config.HF_DATASETS_CACHE).expanduser() / "dpo_trainer" / fingerprint / "rows.arrow"
    if not _is_whole(path):
        logger.info("Reading %s into %s.", ", ".join(files), path)
        types = _types_of_columns(read())
        if not types:
            raise ValueError(no_rows(files))
        _write(read(), types, path, files)
    dataset = Dataset.from_file(str(path))
    dataset._fingerprint = fingerprint  # its own would depend on the time when the table was written
    return dataset


def _is_whole(path: Path) -> bool:
    if not path.is_file() or not is_sealed(path):  # by a release that wrote no checksum
        return False
    reason = damage(path)
    if reason is not None:
        logger.warning("The cached table %s is damaged (%s): it is built again from the files.", path, reason)
    return reason is None


def no_rows(files: list[str]) -> str:
    return f"{', '.join(files)}: there are no rows. Write one preference pair per row."


def _fingerprint(files: list[str], key: str) -> str:
    digest = hashlib.blake2b(f"{VERSION}:{key}".encode(), digest_size=8)
    for file in files:
        content = hashlib.blake2b()
        try:
            with open(file, "rb") as data:
                while chunk := data.read(1 << 20):
                    content.update(chunk)
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror}). Check that you may read it.") from error
        digest.update(content.digest())
    return digest.hexdigest()


def _blocks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while block := list(islice(rows, BLOCK)):
        yield block


def _types_of_columns(rows: Iterator[dict[str, Any]]) -> dict[str, pa.DataType]:
    """In the order in which the columns first appear. A row that lacks a column has None there."""
    types: dict[str, pa.DataType] = {}
    for block in _blocks(rows):
        for name in dict.fromkeys(name for row in block for name in row):
            found = column_type([row.get(name) for row in block])
            types[name] = wider(types[name], found) if name in types else found
    for name in INTEGERS & set(types):
        if has_floats(types[name]):  # one fraction would make fractions of the ids in every row
            types[name] = JSON
    return types


def _write(rows: Iterator[dict[str, Any]], types: dict[str, pa.DataType], path: Path, files: list[str]) -> None:
    """Under another name first: a run that is killed, or runs at the same time, leaves no half of a table behind."""
    schema = pa.schema(list(types.items()))
    about: dict[str, int] = {"rows": 0}
    try:
        with (
            atomic_write(path, about) as part,
            pa.OSFile(str(part), "wb") as stream,
            pa.ipc.new_stream(stream, schema) as writer,
        ):
            for block in _blocks(rows):
                writer.write_table(_table(block, about["rows"], types, schema, files))
                about["rows"] += len(block)
    except OSError as error:
        raise ValueError(
            f"The dataset cache {path.parent} cannot be written ({error.strerror or error}). Make room there, or point "
            "the environment variable HF_DATASETS_CACHE to another folder."
        ) from error


def _table(
    block: list[dict[str, Any]], first_row: int, types: dict[str, pa.DataType], schema: pa.Schema, files: list[str]
) -> pa.Table:
    columns = []
    for name, dtype in types.items():
        values = [row.get(name) for row in block]
        for row, value in enumerate(values, start=first_row) if dtype == JSON else ():
            if holds_nan(value):
                raise ValueError(
                    f"{row_name(row, ', '.join(files))}, column {name!r}: NaN cannot stand in a column of different types. "
                    "Give a number, or null."
                )
        try:
            columns.append(as_array(values, dtype))
        except pa.ArrowInvalid as error:  # integers above 2**53 in a column of floats
            raise ValueError(
                f"{', '.join(files)}: the column {name!r} has values that do not go together: {error}. Write them as "
                "strings, or remove the column."
            ) from error
    return pa.table(columns, schema=schema)
