"""The dataset of a run, or the several of a mixture, and their rows by number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, IterableDataset

from ..cli import ScriptArguments
from ..cli.data import load_data
from ..data.images.image_columns import undecoded
from ..data.prepare import row_numbers
from ..data.rows.column_kinds import kinds_of_features
from ..data.rows.column_names import check_columns


class NumberedRow(NamedTuple):
    number: int  # in the file; in a mixture, after the rows of the datasets before it
    where: str  # its name in errors
    row: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One dataset. Its rows are numbered from `first` on."""

    name: str
    dataset: Dataset | IterableDataset
    first: int = 0

    def numbers(self) -> np.ndarray:
        """Of the rows of a table, in the file: a split that was selected from it has gaps."""
        own = row_numbers(self.dataset)
        return self.first + (np.arange(len(self.dataset)) if own is None else own)

    def rows(self, take: np.ndarray | None) -> Iterator[NumberedRow]:
        """All rows, or those at the places `take` of a table."""
        if self.dataset.column_names is not None:
            check_columns(self.dataset.column_names, self.name, kinds_of_features(self.dataset.features))
        rows: Any = undecoded(self.dataset.with_format(None), self.name)
        if isinstance(rows, IterableDataset):
            numbers: Any = range(self.first, 2**62)
        else:
            numbers = self.numbers() if take is None else self.numbers()[take]
            rows = rows if take is None else rows.select(take)
        for number, row in zip(numbers, rows):
            yield NumberedRow(int(number), f"Row {number - self.first} of {self.name}", row)


def load_parts(script: ScriptArguments, seed: int) -> list[Part]:
    """What the run would train on."""
    train, _ = load_data(script, seed)
    loaded = train if isinstance(train, list) else [train]
    return in_order([dataset.info.dataset_name or "train" for dataset in loaded], loaded)


def in_order(names: Sequence[str], loaded: Sequence[Dataset | IterableDataset]) -> list[Part]:
    """Rows count on from one dataset to the next; streams, whose length is not known, are a billion apart."""
    parts: list[Part] = []
    first = 0
    for name, dataset in zip(names, loaded, strict=True):
        parts.append(Part(name=name, dataset=dataset, first=first))
        table = isinstance(dataset, Dataset) and len(dataset)
        first = int(parts[-1].numbers().max()) + 1 if table else first + 10**9
    return parts


def size_of(parts: Sequence[Part]) -> int | None:
    """Rows in all; None where one is a stream."""
    datasets = [part.dataset for part in parts]
    return sum(map(len, datasets)) if all(isinstance(d, Dataset) for d in datasets) else None


def read_parts(parts: Sequence[Part], max_rows: int | None, seed: int) -> Iterator[NumberedRow]:
    """All rows; or `max_rows` random ones in their order, of streams the first ones."""
    size = size_of(parts)
    if max_rows is None or (size is not None and max_rows >= size):
        for part in parts:
            yield from part.rows(None)
        return
    if size is None:
        yield from islice((row for part in parts for row in part.rows(None)), max_rows)
        return
    taken = np.sort(np.random.default_rng(seed).permutation(size)[:max_rows])
    start = 0
    for part in parts:
        end = start + len(part.dataset)
        yield from part.rows(taken[(start <= taken) & (taken < end)] - start)
        start = end
