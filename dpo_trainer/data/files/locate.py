"""Where the name of a dataset leads: a file, a folder, what `save_to_disk` wrote, or the hub. All splits of it, by name.

Every dataset carries the name that the user gave it (origin.py), so that later errors can say where a row stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from datasets import DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetNotFoundError
from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

from ...registry import did_you_mean
from ...storage.hub import brief_without_network
from .local_files import AnyDataset, reader_of, splits_of_file, splits_of_folder
from .origin import named

NUMBERS = ("weight", "margin")
"""Our columns that are numbers. JSON and Parquet know that by themselves; in a CSV file all else is text."""


def load_splits(
    name_or_path: str, *, config: str | None = None, streaming: bool = False, numbers: Sequence[str] = NUMBERS
) -> dict[str, AnyDataset]:
    """All splits of a dataset by name. A single file, or a single saved `Dataset`, is the split "train".

    `numbers`: the columns of a CSV file that are numbers and not text.
    """
    splits = _find_splits(name_or_path, config, streaming, numbers)
    name = name_or_path if config is None else f"{name_or_path}, {config}"
    return {str(split): named(rows, name) for split, rows in splits.items()}


def _find_splits(name: str, config: str | None, streaming: bool, numbers: Sequence[str]) -> Mapping[str, AnyDataset]:
    try:
        path = Path(name).expanduser()
        is_here, is_folder, is_file, is_link = path.exists(), path.is_dir(), path.is_file(), path.is_symlink()
        is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    except (OSError, RuntimeError) as error:  # RuntimeError: the home folder of an unknown user
        raise ValueError(
            f"{name!r} cannot be read: {str(error).rstrip('.')}. Check the path, and that you may read it."
        ) from error
    if config is not None and (is_file or is_saved):
        raise ValueError(
            f"--dataset_config {config!r} is for datasets of the hub, and {name!r} is here: leave it out."
        )
    if not name.strip():
        raise ValueError("The name of the dataset is empty. Give a file, a folder, or a dataset of the hub.")
    if is_saved:
        return _saved_splits(path, streaming)
    if is_folder:
        return splits_of_folder(path, config=config, streaming=streaming, numbers=numbers)
    if is_file:
        return splits_of_file(path, streaming=streaming, numbers=numbers)
    if is_here:
        raise ValueError(f"{name!r} is neither a file nor a folder: save the rows to a file first.")
    if is_link:
        raise ValueError(
            f"{name!r} is a symbolic link that leads nowhere, or in a circle. Give what it should lead to."
        )
    if reader_of(path) or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"There is no dataset file or folder {name!r}.{did_you_mean(path.name, siblings)}")
    return _hub_splits(name, config, streaming)


def _saved_splits(folder: Path, streaming: bool) -> Mapping[str, AnyDataset]:
    try:
        saved = load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged file makes it stumble over; IndexError if it has no rows
        raise ValueError(
            f"The saved dataset {str(folder)!r} is empty or damaged: {error!r}. Save it again."
        ) from error
    splits = saved if isinstance(saved, DatasetDict) else {"train": saved}
    return {name: rows.to_iterable_dataset() for name, rows in splits.items()} if streaming else splits


def _hub_splits(name: str, config: str | None, streaming: bool) -> Mapping[str, AnyDataset]:
    if name in _PACKAGED_DATASETS_MODULES:  # `datasets` would read whatever lies in the current folder
        raise ValueError(
            f"There is no file or folder {name!r}, and on the hub no dataset can have that name: it is one of a reader. Give "
            "a file, a folder, or a dataset of the hub."
        )
    try:
        with brief_without_network(name):
            return load_dataset(name, config, streaming=streaming)
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"There is no file or folder {name!r}, and the dataset of that name on the hub cannot be had: {error}. Check "
            "the spelling; without a network, give a local file (.jsonl, .jsonl.gz, .json, .csv, .parquet) or folder."
        ) from error
    except Exception as error:  # its files are as untrusted as local ones
        raise ValueError(
            f"The dataset {name!r} of the hub cannot be read: {error.__cause__ or error} Check --dataset_config, or "
            "download its files and give their folder."
        ) from error
