"""Columns of images in a dataset: read as files and bytes, and decoded where they are needed."""

from __future__ import annotations

from typing import Any, TypeVar

from datasets import Audio, Dataset, Image, IterableDataset, List, Video
from datasets.fingerprint import Hasher

from .columns import IMAGES, REFUSED

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


def image_columns(dataset: Dataset) -> list[str]:
    return [column for column in dataset.column_names if column in IMAGES]


def _inner(feature: Any) -> Any:
    """What a list is a list of."""
    while isinstance(feature, list | List):
        feature = feature[0] if isinstance(feature, list) else feature.feature
    return feature
