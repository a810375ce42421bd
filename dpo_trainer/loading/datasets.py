"""Datasets by hub id, file or folder: two splits, one to train on and one to evaluate on.

Files: .json (objects by line, or one array), .jsonl, .csv, .parquet, each also as .gz where that makes sense; a folder of
such files, or one that `save_to_disk` wrote. Only rows are read here; what they mean is for `data/` to say.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.data_files import EmptyDatasetError
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from ..registry import did_you_mean
from .json_rows import read_json_rows
from .names import listing

logger = logging.getLogger(__name__)

AnyDataset: TypeAlias = "Dataset | IterableDataset"
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_dataset_splits(
    name_or_path: str,
    *,
    config: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    test_split_size: float | None = None,
    eval_name_or_path: str | None = None,
    streaming: bool = False,
    seed: int = 42,
) -> tuple[AnyDataset, AnyDataset | None]:
    """The rows to train on, and those to evaluate on: None if there are none.

    Where evaluation rows come from: a dataset of their own (`eval_name_or_path`), a named split (`test_split`), rows taken
    away from the training split (`test_split_size`: a share below 1, or a count), or else a split called "test".
    A map-style split gives rows drawn by `seed`, in their old order; a stream gives its first rows.
    """
    _check_one_source_of_eval_rows(test_split, test_split_size, eval_name_or_path)
    splits = load_splits(name_or_path, config=config, streaming=streaming)
    train = _pick(splits, train_split, name_or_path, "--dataset_train_split")
    if eval_name_or_path is not None:
        return train, _eval_rows_of(eval_name_or_path, test_split, streaming)
    if test_split_size is not None:
        return _split_off(train, test_split_size, seed)
    if test_split is not None:
        return train, _pick(splits, test_split, name_or_path, "--dataset_test_split")
    if "test" in splits and train_split != "test":
        return train, _pick(splits, "test", name_or_path, "--dataset_test_split")
    logger.info(
        "%s has no split 'test' (it has: %s): nothing is held out for evaluation. --dataset_test_split or "
        "--test_split_size would.",
        name_or_path,
        ", ".join(splits),
    )
    return train, None


def load_splits(name_or_path: str, *, config: str | None = None, streaming: bool = False) -> Mapping[str, AnyDataset]:
    """All splits of a dataset by name. A single file, or a single saved `Dataset`, is the split "train"."""
    path = Path(name_or_path).expanduser()
    if path.exists() and config is not None:
        raise ValueError(
            f"--dataset_config {config!r} is for datasets of the hub, and {name_or_path!r} is here: leave it out."
        )
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved_splits(path, streaming)
    if path.is_dir():
        return _read_files(*_files_of_folder(path), streaming)
    if path.is_file():
        return _read_files(_reader_of(path), {"train": [str(path.resolve())]}, streaming)
    if _reader(path) or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or not name_or_path:
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f"There is no dataset file or folder {name_or_path!r}.{did_you_mean(path.name, siblings)}")
    return _hub_splits(name_or_path, config, streaming)


def _saved_splits(folder: Path, streaming: bool) -> Mapping[str, AnyDataset]:
    try:
        saved = load_from_disk(str(folder))
    except (OSError, ValueError, IndexError) as error:  # IndexError: it was saved without a row
        raise ValueError(
            f"The saved dataset {str(folder)!r} is empty or damaged: {error!r}. Save it again."
        ) from error
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    return {name: rows.to_iterable_dataset() for name, rows in splits.items()} if streaming else splits


def _hub_splits(name: str, config: str | None, streaming: bool) -> Mapping[str, AnyDataset]:
    try:
        return load_dataset(name, config, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"There is no file or folder {name!r}, and the dataset of that name on the hub cannot be had: {error}. Check "
            "the spelling; without a network, give a local file (.jsonl, .jsonl.gz, .json, .csv, .parquet) or folder."
        ) from error


# --- files ---


def _reader(path: Path) -> str | None:
    """Which reader a file name asks for, if any."""
    return READERS.get(path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix)


def _reader_of(path: Path) -> str:
    reader = _reader(path)
    if reader is None:
        raise ValueError(
            f"The dataset file {str(path)!r} ends in none of {', '.join(READERS)} (or these with .gz): rename or convert it."
        )
    return reader


def _files_of_folder(folder: Path) -> tuple[str, dict[str, list[str]]]:
    """The reader and the files of each split: `datasets` finds the split of a file from its name."""
    try:
        builder = load_dataset_builder(str(folder.resolve()))  # absolute: a folder named "csv" is not the reader "csv"
    except EmptyDatasetError as error:
        raise ValueError(f"The folder {str(folder)!r} has no dataset in it ({listing(folder)}).") from error
    return builder.name, {str(split): list(files) for split, files in builder.config.data_files.items()}


def _read_files(reader: str, files: dict[str, list[str]], streaming: bool) -> Mapping[str, AnyDataset]:
    if streaming and reader == "json":  # our own reader, as an error in mid-stream can then name its line
        return {
            split: IterableDataset.from_generator(read_json_rows, gen_kwargs={"files": paths})
            for split, paths in files.items()
        }
    try:
        return load_dataset(reader, data_files=files, streaming=streaming)
    except (DatasetGenerationError, StopIteration, ValueError, OSError, EOFError) as error:
        paths = [path for of_split in files.values() for path in of_split]
        if reader == "json":
            for _ in read_json_rows(paths):  # raises on the broken line
                pass
        raise ValueError(
            f"{', '.join(paths)} cannot be read as {reader}: {error.__cause__ or error or 'it has no rows'}. "
            "It needs at least one row, and the same columns in every row."
        ) from error


# --- splits ---


def _check_one_source_of_eval_rows(test_split: str | None, size: float | None, eval_name: str | None) -> None:
    if size is None:
        return
    for flag, value in {"--dataset_test_split": test_split, "--eval_dataset": eval_name}.items():
        if value is not None:
            raise ValueError(
                f"{flag} {value} and --test_split_size {size} both say where evaluation rows come from: choose one."
            )


def _pick(splits: Mapping[str, AnyDataset], split: str, name: str, flag: str) -> AnyDataset:
    if split not in splits:
        raise ValueError(
            f"{flag} {split!r}: {name!r} has no such split. It has: {', '.join(splits)}.{did_you_mean(split, splits)}"
        )
    rows = splits[split]
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise ValueError(f"The split {split!r} of {name!r} ({flag}) has no rows.")
    return rows


def _eval_rows_of(name: str, split: str | None, streaming: bool) -> AnyDataset:
    """The named split, else "test", else the only one."""
    splits = load_splits(name, streaming=streaming)
    only = next(iter(splits)) if len(splits) == 1 else "test"
    return _pick(splits, split or ("test" if "test" in splits else only), name, "--dataset_test_split")


def _split_off(train: Any, size: float, seed: int) -> tuple[AnyDataset, AnyDataset]:
    if isinstance(train, IterableDataset):
        if size < 1 or size != int(size):
            raise ValueError(
                f"--test_split_size {size}: a stream has no known length to take a share of. Give a count (1 or more): "
                "its first rows are then held out."
            )
        return train.skip(int(size)), train.take(int(size))
    n_eval = round(size * len(train)) if 0 < size < 1 else int(size)
    if size <= 0 or (size >= 1 and size != n_eval) or not 0 < n_eval < len(train):
        raise ValueError(
            f"--test_split_size {size} must be a share between 0 and 1 or a whole number of rows, and leave rows on both "
            f"sides of a split of {len(train)}."
        )
    order = np.random.default_rng(seed).permutation(len(train))
    return train.select(np.sort(order[n_eval:])), train.select(np.sort(order[:n_eval]))
