"""Rows that are token ids already, among them those that this pipeline prepared: checked, and otherwise left as they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..batch import ONE_PAIR, Preferred, Stretch
from .columns import TOKENIZED
from .errors import bad
from .ranking import is_number
from .truncate import PairIds


def ids_from_row(row: Mapping[str, Any], where: str) -> PairIds:
    prompt, *completions = (_token_ids(row[column], where, column) for column in TOKENIZED)
    more = row.get("more_ids") or ()
    completions += [_token_ids(ids, where, f"more_ids[{number}]") for number, ids in enumerate(more)]
    unscored = _stretches(row.get("unscored") or (), completions, where)
    ids = PairIds(prompt, completions, _pairs(row, len(completions), where), unscored)
    if not all(map(ids.scored, range(len(completions)))):
        raise bad(where, "unscored", "leaves a completion without a scored token", "Leave such rows out")
    return ids


def example_id_from_row(row: Mapping[str, Any], where: str) -> int | None:
    """The id that the row brings along."""
    example_id = row.get("example_id")
    if example_id is not None and (isinstance(example_id, bool) or not isinstance(example_id, int)):
        raise bad(where, "example_id", f"is {example_id!r}", "Give an integer, or remove the column")
    return example_id


def _token_ids(value: Any, where: str, column: str) -> list[int]:
    """A non-empty list of ids, checked as an array: a row may hold thousands."""
    remedy = "Give at least one token id, each an integer of at least 0"
    if value is None or not isinstance(value, list | tuple) or not len(value):
        raise bad(where, column, "is None" if value is None else f"is {value!r:.40}", remedy)
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):
        raise bad(where, column, "is nested, or beyond all integers", remedy) from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise bad(where, column, f"holds something else than token ids: {value!r:.60}", remedy)
    return list(value)


def _pairs(row: Mapping[str, Any], count: int, where: str) -> tuple[Preferred, ...]:
    numbers = [tuple(pair) for pair in row.get("pairs") or [pair[:2] for pair in ONE_PAIR]]
    margins = row.get("margin")
    if margins is None or (isinstance(margins, list | tuple) and not margins):
        margins = [None] * len(numbers)
    elif not isinstance(margins, list | tuple):
        margins = [margins] * len(numbers)
    if len(margins) != len(numbers) or not all(margin is None or is_number(margin) for margin in margins):
        raise bad(where, "margin", f"is {row['margin']!r} for {len(numbers)} pairs", "Give one finite number per pair")
    for pair in numbers:
        if (
            len(pair) != 2
            or not all(type(number) is int and 0 <= number < count for number in pair)
            or pair[0] == pair[1]
        ):
            raise bad(where, "pairs", f"holds {pair!r} for {count} completions", "Give two numbers, chosen first")
    return tuple(Preferred(pair[0], pair[1], margin) for pair, margin in zip(numbers, margins, strict=True))


def _stretches(value: Any, completions: list[list[int]], where: str) -> tuple[Stretch, ...]:
    for stretch in value:
        number, start, end = stretch if len(stretch) == 3 else (-1, 0, 0)
        if not 0 <= number < len(completions) or not 0 <= start < end <= len(completions[number]):
            remedy = "Give (number of the completion, start, end)"
            raise bad(where, "unscored", f"holds {stretch!r}", remedy)
    return tuple((number, start, end) for number, start, end in value)
