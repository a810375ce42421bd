"""Splits from the files of this machine: .json, .jsonl, .csv (each also .gz), .parquet, and folders of them.

JSON and CSV are read by our own readers, streamed or not: the libraries' guess types from the first megabytes, and turn
the answer "2024-01-01" into a date, "N/A" into nothing, a late list into its JSON text. Parquet has its types written down.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, Features, IterableDataset, Value, load_dataset, load_dataset_builder
from datasets.data_files import EmptyDatasetError

from ...storage.folders import listing
from .csv_rows import csv_columns, read_csv_rows
from .json_rows import read_json_rows
from .parquet_rows import check_utf8, parquet_features, read_parquet_rows
from .tables import no_rows, table_of_rows

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = "Dataset | IterableDataset"
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
NOT_ROWS = {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
"""Files that describe a dataset, and lie beside its rows."""


def reader_of(path: Path) -> str | None:
    """Which reader a file name asks for, if any."""
    if path.suffix == ".gz":
        path = path.with_suffix("")
        return None if path.suffix == ".parquet" else READERS.get(path.suffix)
    return READERS.get(path.suffix)


def splits_of_file(path: Path, *, streaming: bool, numbers: Sequence[str]) -> Mapping[str, AnyDataset]:
    """A file is the split "train". `numbers`: the columns of a CSV file that are not text."""
    reader = reader_of(path)
    if reader is None:
        raise ValueError(
            f"The dataset file {str(path)!r} ends in none of {', '.join(READERS)} (or .json.gz, .jsonl.gz, .csv.gz): "
            "rename or convert it."
        )
    return _read(reader, {"train": [str(path.resolve())]}, streaming, numbers)


def splits_of_folder(
    folder: Path, *, config: str | None, streaming: bool, numbers: Sequence[str]
) -> Mapping[str, AnyDataset]:
    """`datasets` finds the split of a file from its name, or from the README of a dataset that the hub knows."""
    try:
        # Absolute: a folder named "csv" is not the reader "csv".
        builder = load_dataset_builder(str(folder.resolve()), config)
    except EmptyDatasetError as error:
        raise ValueError(
            f"The folder {str(folder)!r} has no dataset in it ({listing(folder)}). Put files there that end in one of {', '.join(READERS)}."
        ) from error
    except Exception as error:  # a README that is no YAML, one with several configurations, a folder without files ...
        reason = " ".join(str(error).partition("\nExample of usage")[0].split()).rstrip(".")
        raise ValueError(
            f"The folder {str(folder)!r} cannot be read as a dataset: {reason}. Give one of its files; or mend its README, "
            "and where that names configurations, give one of them as --dataset_config."
        ) from error
    if builder.name not in (*READERS.values(), "arrow"):
        raise ValueError(
            f"The folder {str(folder)!r} holds no rows ({listing(folder)}). They must be in files that end in one of "
            f"{', '.join(READERS)}."
        )
    files = {str(split): list(paths) for split, paths in (builder.config.data_files or {}).items()}
    if config is None:
        _say_what_is_not_read(folder, files)
    return _read(builder.name, files, streaming, numbers)


def _say_what_is_not_read(folder: Path, files: Mapping[str, list[str]]) -> None:
    """One kind of file makes a dataset: a table beside lines of JSON would go unnoticed."""
    read = {Path(path) for paths in files.values() for path in paths}
    rows = (path for path in sorted(folder.resolve().rglob("*")) if reader_of(path) and path.name not in NOT_ROWS)
    left = [path.name for path in rows if path not in read and path.is_file()]
    if left:
        logger.warning(
            "Not read from the folder %s: %s. A folder is one dataset with files of one kind, and if one of them is named "
            "after a split (train, test ...), all are.",
            folder,
            ", ".join(left[:6]) + (f" and {len(left) - 6} more" if len(left) > 6 else ""),
        )


def _read(
    reader: str, files: Mapping[str, list[str]], streaming: bool, numbers: Sequence[str]
) -> Mapping[str, AnyDataset]:
    if reader == "json":
        return {split: _json(paths, streaming) for split, paths in files.items()}
    if reader == "csv":
        return {split: _csv(paths, streaming, tuple(numbers)) for split, paths in files.items()}
    paths = [path for of_split in files.values() for path in of_split]
    if reader == "parquet":
        features = parquet_features(paths)
        if streaming:
            return {split: _parquet_stream(paths, features) for split, paths in files.items()}
    try:
        splits = load_dataset(reader, data_files=dict(files), streaming=streaming)
    except Exception as error:  # whatever the libraries below say to a file of untrusted content
        raise ValueError(
            f"{', '.join(paths)} cannot be read as {reader}: {error.__cause__ or error or 'it has no rows'}. "
            "It needs at least one row, and the same columns in every file."
        ) from error
    if not streaming:
        for split, rows in splits.items():
            check_utf8(rows.data.table, f"{', '.join(paths)} (split {split!r})")
    return splits


def _json(paths: list[str], streaming: bool) -> AnyDataset:
    _check_kind(paths, "json")
    if streaming:
        _check_first_row(read_json_rows(paths), paths)
        return IterableDataset.from_generator(read_json_rows, gen_kwargs={"files": paths})
    return table_of_rows(partial(read_json_rows, paths), paths, "json")


def _csv(paths: list[str], streaming: bool, numbers: tuple[str, ...]) -> AnyDataset:
    _check_kind(paths, "csv")
    if not streaming:
        return table_of_rows(partial(read_csv_rows, paths, numbers), paths, f"csv:{','.join(sorted(numbers))}")
    _check_first_row(read_csv_rows(paths, numbers), paths)
    names = dict.fromkeys(name for path in paths for name in csv_columns(path))
    return IterableDataset.from_generator(
        read_csv_rows,
        gen_kwargs={"files": paths, "numbers": numbers},
        features=Features({name: Value("float64" if name in numbers else "string") for name in names}),
    )


def _check_kind(paths: list[str], reader: str) -> None:
    """A folder may hold files in compressions that our readers do not know."""
    for path in paths:
        if reader_of(Path(path)) != reader:
            raise ValueError(
                f"{path} is not a plain {reader} file, nor one with .gz: unpack it, or compress it with gzip."
            )


def _check_first_row(rows: Iterator[dict[str, Any]], paths: list[str]) -> None:
    """A file that is nothing at all shall not be found out at the first step."""
    if next(rows, None) is None:
        raise ValueError(no_rows(paths))


def _parquet_stream(paths: list[str], features: Features) -> IterableDataset:
    return IterableDataset.from_generator(read_parquet_rows, gen_kwargs={"files": paths}, features=features)
