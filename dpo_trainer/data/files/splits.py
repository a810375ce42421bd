"""Which rows are trained on and which are evaluated on: a split by name, rows held out, a share of the rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from ...registry import did_you_mean
from .local_files import AnyDataset
from .origin import name_of, named


def pick(splits: Mapping[str, AnyDataset], split: str, name: str, flag: str) -> AnyDataset:
    """The split of that name. `flag` is what asked for it."""
    if split not in splits:
        raise ValueError(
            f"{flag} {split!r}: {name!r} has no such split. It has: {', '.join(splits)}.{did_you_mean(split, splits)}"
        )
    rows = splits[split]
    if isinstance(rows, Dataset) and len(rows) == 0:
        raise ValueError(f"The split {split!r} of {name!r} ({flag}) has no rows.")
    return rows


def hold_out(train: Any, size: float, seed: int) -> tuple[AnyDataset, AnyDataset]:
    """(rows to train on, rows to evaluate on): `size` of them, a share below 1 (of few rows at least one) or a count, drawn
    by `seed`.

    Both keep the order that the rows have. A stream gives its first rows.
    """
    if isinstance(train, IterableDataset):
        if size < 1 or size != int(size):
            raise ValueError(
                f"--test_split_size {size}: a stream has no known length to take a share of. Give a count (1 or more): "
                "its first rows are then held out."
            )
        n_eval = int(size)
        return named(train.skip(n_eval), f"{name_of(train)} after {n_eval} rows"), train.take(n_eval)
    n_eval = max(round(size * len(train)), 1) if 0 < size < 1 else int(size)
    if size <= 0 or (size >= 1 and size != n_eval) or not 0 < n_eval < len(train):
        raise ValueError(
            f"--test_split_size {size} must be a share between 0 and 1 or a whole number of rows, and leave rows on both "
            f"sides of a split of {len(train)} ({name_of(train)})."
        )
    order = np.random.default_rng(seed).permutation(len(train))
    return _rows(train, order[n_eval:]), _rows(train, order[:n_eval])


def use_share(dataset: Any, fraction: float, seed: int) -> AnyDataset:
    """The dataset with about `fraction` of its rows, in their order: drawn by `seed`, never by what else there is.

    Of a table exactly that share, rounded. Of a stream each row by a hash of its content and `seed`: row numbers would
    depend on how the stream is dealt out to workers, the content is the same for all of them and after a resume.
    """
    if fraction == 1:
        return dataset
    if isinstance(dataset, IterableDataset):
        kept = dataset.filter(KeptByHash(fraction=fraction, seed=seed))
        return named(kept, f"{fraction:g} of {name_of(dataset)}")
    count = round(fraction * len(dataset))
    if not count:
        raise ValueError(
            f"fraction {fraction:g} of {name_of(dataset)}, which has {len(dataset)} rows, is not one row. Raise it."
        )
    return _rows(dataset, np.random.default_rng(seed).permutation(len(dataset))[:count])


def _rows(dataset: Dataset, numbers: np.ndarray) -> Dataset:
    """In their order. `datasets` remembers which rows they were, except for neighbours: then the name says it."""
    numbers = np.sort(numbers)
    rows = dataset.select(numbers)
    if numbers[0] and numbers[-1] - numbers[0] + 1 == len(numbers):
        named(rows, f"{name_of(dataset)} after {numbers[0]} rows")
    return rows


@dataclass(frozen=True, kw_only=True)
class KeptByHash:
    """Whether a row is among the share of a stream that is used. Equal rows are kept or left together."""

    fraction: float
    seed: int

    def __call__(self, row: Mapping[str, Any]) -> bool:
        content = json.dumps([self.seed, dict(row)], sort_keys=True, default=str)
        digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.fraction * 2**64
