"""Rows as a program may hold them -> datasets: a list of dicts, a pandas DataFrame, a path, or datasets as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
from datasets import Dataset, IterableDataset

from ..rows.column_names import PAIR, PROMPTS, RANKED
from .column_types import as_array, column_type, holds_nan
from .local_files import AnyDataset
from .locate import load_splits

Rows: TypeAlias = "Dataset | IterableDataset | Sequence[Mapping[str, Any]] | str | Path | Any"
"""A dataset, or what `datasets_of` makes one of (Any: a `pandas.DataFrame`, which need not be installed)."""

PLAIN = (str, bool, int, float, list, dict, type(None))
WAYS = (
    "Give a datasets.Dataset or IterableDataset, a list of rows as dicts, a pandas DataFrame, a path, or a list of datasets "
    "(a mixture); rows of another kind become one by Dataset.from_list(rows) or IterableDataset.from_generator(function)."
)


def datasets_of(data: Any, name: str) -> list[AnyDataset]:
    """The datasets of a mixture; mostly one. `name` says in errors, and of a path in its splits, which data these are.

    Raises:
        ValueError: for anything else, with what would do.
    """
    if isinstance(data, list | tuple) and data and not any(isinstance(item, Mapping) for item in data):
        return [_dataset(item, name) for item in data]
    return [_dataset(data, name)]


def is_rows(data: Any) -> bool:
    """Whether this holds rows itself: a name (of one of several datasets, or a path) does not."""
    return isinstance(data, Dataset | IterableDataset | list | tuple | Path) or _is_frame(data)


def refuse_columns(data: Mapping[str, Any], name: str) -> None:
    """Raise for columns where datasets by name belong."""
    if set((*PAIR, *RANKED, *PROMPTS)) & set(data) and all(isinstance(v, list | tuple) for v in data.values()):
        raise ValueError(f"The {name} data are a dict of columns: make a dataset of it, Dataset.from_dict(columns).")


def _dataset(data: Any, name: str) -> AnyDataset:
    if isinstance(data, Dataset | IterableDataset):
        return data
    if isinstance(data, str | Path):
        return _of_path(str(data), name)
    if _is_frame(data):
        rows = data.to_dict("records")
        return _of_rows([{str(key): _plain(value) for key, value in row.items()} for row in rows], name)
    if isinstance(data, list | tuple) and all(isinstance(row, Mapping) for row in data):
        return _of_rows([dict(row) for row in data], name)
    if isinstance(data, list | tuple):
        kinds = " and of ".join(sorted({type(item).__name__ for item in data}))
        raise ValueError(f"The {name} data are a list of {kinds}. {WAYS}")
    if isinstance(data, Mapping):
        refuse_columns(data, name)
        splits = ", ".join(map(repr, data))
        raise ValueError(f"{name} is a {type(data).__name__}, not one dataset. Name one of its splits: {splits}.")
    raise ValueError(f"{name} is a {type(data).__name__}, not a dataset. {WAYS}")


def _of_path(path: str, name: str) -> AnyDataset:
    """The split that the data are for, or the only one."""
    splits = load_splits(path)
    wanted = "train" if name == "train" else "test"
    if len(splits) == 1:
        return next(iter(splits.values()))
    if wanted not in splits:
        raise ValueError(
            f"{path!r} has no split {wanted!r} for the {name} data (it has: {', '.join(splits)}): give one of them, "
            "load_dataset(path, split=...)."
        )
    return splits[wanted]


def _is_frame(data: Any) -> bool:
    return (
        type(data).__module__.partition(".")[0] == "pandas" and hasattr(data, "to_dict") and hasattr(data, "columns")
    )


def _plain(value: Any) -> Any:
    """A cell of a DataFrame: lists for arrays, None for what pandas calls missing."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    missing = type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, float) and value != value)
    return None if missing else value


def _of_rows(rows: list[dict[str, Any]], name: str) -> Dataset:
    """With the types that files get (column_types.py), so that every row comes out as it went in."""
    if not rows:
        raise ValueError(f"The {name} data have no rows: give at least one.")
    names = dict.fromkeys(key for row in rows for key in row)
    columns = {key: [row.get(key) for row in rows] for key in names}
    try:
        if not all(_is_plain(value) for values in columns.values() for value in values):
            return Dataset.from_list([{key: row.get(key) for key in names} for row in rows])  # images, arrays, dates
        types = {key: column_type(values) for key, values in columns.items()}
        arrays = [as_array(values, types[key]) for key, values in columns.items()]
        return Dataset(pa.table(arrays, names=list(types)))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(f"The {name} data cannot become a table: {error}. Give every column one type.") from error


def _is_plain(value: Any) -> bool:
    """Whether JSON has it: what a file can hold."""
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    return type(value) in PLAIN and not holds_nan(value)
