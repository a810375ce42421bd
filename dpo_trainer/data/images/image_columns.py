"""Columns of images in a dataset: read as files and bytes, and decoded where they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from datasets import Audio, Dataset, Image, IterableDataset, List, Value, Video, concatenate_datasets
from datasets.fingerprint import Hasher

from ..caching import flattened
from .source import IMAGES, REFUSED

AnyDataset = TypeVar("AnyDataset", Dataset, IterableDataset)


def undecoded(dataset: AnyDataset, where: str) -> AnyDataset:
    """The same rows; `datasets.Image` columns give what is stored, and not pixels.

    Raises:
        ValueError: for a column that is declared as video or audio.
    """
    for column, feature in dict(dataset.features or {}).items():
        kind = _inner(feature)
        if column in REFUSED and isinstance(kind, Video | Audio):
            raise ValueError(
                f"{where} has a column {column!r}, which cannot be trained on here: take it out with "
                f"dataset.remove_columns({column!r}), or give frames as images."
            )
        if column in IMAGES and isinstance(kind, Image) and kind.decode:
            plain: Any = Image(decode=False)
            dataset = _declared(dataset, column, plain if kind is feature else List(plain))
    return dataset


def _declared(dataset: Any, column: str, feature: Any) -> Any:
    """The column under another name for what it holds. `Dataset.cast_column` would write a list of images anew."""
    if isinstance(dataset, IterableDataset):
        return dataset.cast_column(column, feature)
    info = dataset.info.copy()
    info.features[column] = feature
    fingerprint = Hasher.hash([dataset._fingerprint, column, str(feature)])
    return Dataset(
        dataset.data, info=info, split=dataset.split, indices_table=dataset._indices, fingerprint=fingerprint
    )


def beside(rows: Dataset, images: Dataset) -> Dataset:
    """The columns of both. Images are not copied, for they may be larger than all the rest by far: of rows that were selected
    from a table, the others come along unseen. (Where those are more than half, the selected ones are copied.)
    """
    chosen = None if images._indices is None else images._indices.column(0).to_numpy()
    if chosen is None or 2 * len(chosen) < len(images.data) or len(np.unique(chosen)) < len(chosen):
        return concatenate_datasets([rows, flattened(images)], axis=1)
    place = np.zeros(len(images.data), dtype=np.int64)  # what stands beside an unseen image is unseen, too
    place[chosen] = np.arange(len(chosen))
    fingerprint = Hasher.hash([images._fingerprint, "whole"])
    full = Dataset(images.data, info=images.info.copy(), split=images.split, fingerprint=fingerprint)
    return concatenate_datasets([flattened(rows.select(place)), full], axis=1).select(chosen)


def same_image_types(datasets: Sequence[Dataset]) -> list[Dataset]:
    """The same rows, fit for one table: where parts hold images in other forms, as paths or one by one, `datasets.Image`."""
    out = [
        dataset.remove_columns([c for c in image_columns(dataset) if _holds_none(dataset.features[c])])
        for dataset in datasets
    ]
    for column in reversed(IMAGES):
        if len({str(dataset.features[column]) for dataset in out if column in dataset.column_names}) > 1:
            out = [_as_images(dataset, column) if column in dataset.column_names else dataset for dataset in out]
    return out


def _holds_none(feature: Any) -> bool:
    kind = _inner(feature)
    return isinstance(kind, Value) and kind.dtype == "null"


def _as_images(dataset: Dataset, column: str) -> Dataset:
    several, plain = isinstance(dataset.features[column], list | List), Image(decode=False)
    dataset = dataset.cast_column(column, List(plain) if several else plain)
    return dataset if several or "image" in dataset.column_names else dataset.rename_column(column, "image")


def image_columns(dataset: Dataset) -> list[str]:
    return [column for column in dataset.column_names if column in IMAGES]


def _inner(feature: Any) -> Any:
    """What a list is a list of."""
    while isinstance(feature, list | List):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature
