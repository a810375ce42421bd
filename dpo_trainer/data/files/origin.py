"""Where rows came from, for error messages: kept in `dataset.info.dataset_name`."""

from __future__ import annotations

from typing import TypeVar

from datasets import Dataset, IterableDataset

from ...printable import printable

T = TypeVar("T", Dataset, IterableDataset)


def named(dataset: T, name: str) -> T:
    """The dataset, which must not be shared yet, with a name of its own. No fingerprint depends on it."""
    dataset._info = dataset.info.copy()  # splits of one dataset may share theirs
    dataset._info.dataset_name = printable(name)
    return dataset


def name_of(dataset: Dataset | IterableDataset) -> str:
    return dataset.info.dataset_name or "the dataset"
