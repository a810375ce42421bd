"""Hashes of token ids: what makes a row, or one completion of it, the same as another."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset, IterableDataset

from ..types import PairIds, Span, TokenizedPair
from .images.source import encoded


def content_id(pair: PairIds, images: Iterable[Any] = ()) -> int:
    """63 bits of a hash over the id lists, and over the images as they are stored."""
    digest = hashlib.blake2b(digest_size=8)
    for ids in (pair.prompt, *pair.completions):
        digest.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())
    for image in images:
        digest.update(stored_image(image))
    return int.from_bytes(digest.digest(), "little") >> 1


def stored_image(image: Any) -> bytes:
    """16 bytes of a hash over an image as it is stored: its file's bytes, or its path."""
    stored = encoded(image)
    return hashlib.blake2b(stored["bytes"] or str(stored["path"]).encode(), digest_size=16).digest()


def completion_keys(row: TokenizedPair) -> list[bytes]:
    """[K] 16 bytes for each completion: all that decides its log-prob, apart from the model.

    Those are the prompt, its images (pixels and how they are processed, so they must be loaded), the completion, and
    which tokens of it are scored: never the row, its other completions or how it came to be. The same completion of the
    same prompt has the same key in every dataset.
    """
    start = hashlib.blake2b(_bytes(row.prompt_ids), digest_size=16)
    for image in row.images:
        start.update(image.digest)
    keys = []
    for number, ids in enumerate(row.completions):
        digest = start.copy()
        digest.update(_bytes(ids))
        if unscored := sorted(_places(number, row.unscored)):
            digest.update(_bytes(unscored))
        keys.append(digest.digest())
    return keys


def _bytes(ids: Sequence[int]) -> bytes:
    """The length first, so that what ends one list cannot begin the next."""
    return array("i", [len(ids), *ids]).tobytes()


def _places(number: int, unscored: Iterable[Span]) -> set[int]:
    """Tokens of one completion that are not scored, however they are cut into stretches."""
    return {place for of, start, end in unscored if of == number for place in range(start, end)}


def dataset_digest(dataset: Dataset | IterableDataset) -> str | None:
    """Of the columns of a prepared table, in the order of its rows: 32 hex digits. None for a stream, which is not read."""
    if not isinstance(dataset, Dataset):
        return None
    digest = xxhash.xxh3_128()
    for table in dataset.with_format("arrow").iter(batch_size=1024):
        for batch in table.combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()
