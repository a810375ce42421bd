"""What is kept of each row while a dataset is read: a few numbers, so that a million rows fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..data.content import stored_image
from ..types import Flag
from .measure import RowSizes
from .rows import Row
from .similar import Keys, content_key, similarity

NO_PREFERENCE = Flag.TIED | Flag.EMPTY_COMPLETION
"""Rows that compare nothing: their lengths are no sign of a preference."""


class RowFacts(NamedTuple):
    keys: Keys
    prompt: int  # tokens, before any limit
    completions: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]  # of `completions`: chosen, rejected; empty where nothing is compared
    similarity: tuple[float, ...]  # of each pair
    flags: int  # after the limits
    left_out: int  # pairs of a ranked row that are not used
    trained_pairs: int
    trained_prompt: int  # tokens after the limits
    trained: tuple[int, ...]  # tokens of each completion after the limits


def facts_of(row: Row) -> RowFacts:
    ids, cut = row.ids, row.cut
    pairs = () if ids.flags & NO_PREFERENCE else tuple((pair.chosen, pair.rejected) for pair in ids.pairs)
    return RowFacts(
        keys=_keys(row),
        prompt=len(ids.prompt),
        completions=tuple(map(len, ids.completions)),
        pairs=pairs,
        similarity=tuple(similarity(ids.completions[c], ids.completions[r]) for c, r in pairs),
        flags=int(cut.flags),
        left_out=cut.left_out,
        trained_pairs=len(cut.pairs),
        trained_prompt=len(cut.prompt),
        trained=tuple(map(len, cut.completions)),
    )


def _keys(row: Row) -> Keys:
    """Of the texts as the data has them; of token ids where a row is these."""
    source = row.ids if row.pair is None else row.pair
    prompt: Any = source.prompt
    if row.pair is not None:
        images = [stored_image(image).hex() for image in row.pair.images]
        prompt = [prompt, row.pair.tools, row.pair.chat_template_kwargs, images]
    return Keys(
        row=row.number,
        prompt=content_key(prompt),
        completions=tuple(map(content_key, source.completions)),
        pairs=tuple((pair.chosen, pair.rejected) for pair in source.pairs),
    )


class Columns(NamedTuple):
    """Token counts before any limit: of prompts [R], and of the two sides of each pair [P]."""

    prompt: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray


def columns_of(rows: Sequence[RowFacts]) -> Columns:
    pairs = [(row.completions[c], row.completions[r]) for row in rows for c, r in row.pairs]
    chosen, rejected = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return Columns(np.array([row.prompt for row in rows], dtype=np.int64), chosen, rejected)


def sizes_of(rows: Sequence[RowFacts]) -> RowSizes:
    """Of rows that are trained on."""
    return RowSizes(
        prompt=np.array([row.trained_prompt for row in rows], dtype=np.int64),
        completions=np.array([sum(row.trained) for row in rows], dtype=np.int64),
        longest=np.array([max(row.trained) for row in rows], dtype=np.int64),
        count=np.array([len(row.trained) for row in rows], dtype=np.int64),
    )
