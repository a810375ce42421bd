"""Parquet files: what their library notices when a row is read, checked when the file is, and named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features

BLOCK = 256
"""Rows in memory at a time."""

AGAIN = "Download or write it again, and check that you may read it."


def parquet_features(files: list[str]) -> Features:
    """The types of all files, which must have the same columns. Reads only their ends, where they say what is in them."""
    schemas = [_schema(file) for file in files]
    for file, schema in zip(files, schemas, strict=True):
        if set(schema.names) != set(schemas[0].names):
            raise ValueError(
                f"{file} has the columns {', '.join(schema.names)}, and {files[0]} has {', '.join(schemas[0].names)}. Files "
                "of one dataset need the same: rename or remove some, or list the files as a mixture (datasets:)."
            )
    try:
        return Features.from_arrow_schema(schemas[0])
    except ValueError as error:
        raise ValueError(
            f"{files[0]} has a column of a type that datasets cannot hold: {str(error).rstrip('.')}. Remove or convert it."
        ) from error


def _schema(file: str) -> pa.Schema:
    try:
        metadata, schema = pq.read_metadata(file), pq.read_schema(file)
    except Exception as error:  # not a Parquet file, cut off, not to be read
        raise ValueError(f"{file} cannot be read as parquet: {str(error).rstrip('.')}. {AGAIN}") from error
    if not metadata.num_rows:
        raise ValueError(f"{file} cannot be read as parquet: it has no rows. Remove it, or write it again.")
    return schema


def read_parquet_rows(files: list[str]) -> Iterator[dict[str, Any]]:
    """Every row of the files, one after another."""
    for file in files:
        first = 0
        blocks = _blocks(file)
        while True:
            try:
                block = next(blocks, None)
            except Exception as error:  # a page that is damaged
                raise ValueError(f"{file}, near row {first}: damaged ({error}). {AGAIN}") from error
            if block is None:
                break
            check_utf8(pa.Table.from_batches([block]), f"{file}, after row {first}")
            yield from block.to_pylist()
            first += len(block)


def _blocks(file: str) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(file) as opened:
        yield from opened.iter_batches(batch_size=BLOCK)


def check_utf8(table: pa.Table, where: str) -> None:
    """Strings are read without a look at them; one that is none would stop the run with a bare UnicodeDecodeError."""
    for name in table.column_names:
        try:
            table.column(name).validate(full=True)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"{where}: the column {name!r} is damaged, or not UTF-8 text ({error}). Write it again as UTF-8."
            ) from error
