"""Rows that are token ids already, among them those that this pipeline prepared: checked, and otherwise left as they are."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from ...types import ONE_PAIR, PairIds, Preferred, Span
from ..errors import bad
from .column_names import TOKENIZED
from .ranking import is_number


def ids_from_row(row: Mapping[str, Any], where: str) -> PairIds:
    prompt, *completions = (_token_ids(row[column], where, column) for column in TOKENIZED)
    more = _list_of(row, "more_ids", where)
    completions += [_token_ids(ids, where, f"more_ids[{number}]") for number, ids in enumerate(more)]
    pairs, unscored = _pairs(row, len(completions), where), _unscored_spans(row, completions, where)
    ids = PairIds(prompt, completions, pairs, unscored)
    if not all(map(ids.scored, range(len(completions)))):
        raise bad(where, "unscored", "leaves a completion without a scored token", "Leave such rows out")
    return ids


def _list_of(row: Mapping[str, Any], column: str, where: str) -> list | tuple:
    """An optional list."""
    value = row.get(column)
    if value is not None and not isinstance(value, list | tuple):
        raise bad(where, column, f"is {value!r:.40}", "Give a list, or leave it out")
    return value or ()


def _integers(value: Any, count: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == count and all(type(number) is int for number in value)


def example_id_from_row(row: Mapping[str, Any], where: str) -> int | None:
    """The id that the row brings along."""
    example_id = row.get("example_id")
    if example_id is not None and (type(example_id) is not int or not -(2**63) <= example_id < 2**63):
        raise bad(where, "example_id", f"is {example_id!r:.40}", "Give an integer of 64 bits, or remove the column")
    return example_id


def _token_ids(value: Any, where: str, column: str) -> list[int]:
    """A non-empty list of ids, checked as an array: a row may hold thousands."""
    remedy = "Give at least one token id, each an integer of at least 0"
    if value is None or not isinstance(value, list | tuple) or not len(value):
        raise bad(where, column, "is None" if value is None else f"is {value!r:.40}", remedy)
    kinds = set(map(type, value))
    if kinds & {list, tuple}:
        raise bad(where, column, "is nested", remedy)
    ids = np.asarray(value) if kinds == {int} else np.empty(0)  # of objects, where an integer is beyond 64 bits
    if not ids.size or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise bad(where, column, f"holds something else than token ids: {value!r:.60}", remedy)
    return list(value)


def _pairs(row: Mapping[str, Any], count: int, where: str) -> tuple[Preferred, ...]:
    numbers = _list_of(row, "pairs", where)
    if row.get("pairs") is not None and not numbers:
        raise bad(where, "pairs", "is an empty list", "Give at least one pair, or leave the row out")
    numbers = numbers or [(pair.chosen, pair.rejected) for pair in ONE_PAIR]
    for pair in numbers:
        if not _integers(pair, 2) or not all(0 <= number < count for number in pair) or pair[0] == pair[1]:
            raise bad(where, "pairs", f"holds {pair!r:.40} for {count} completions", "Give two numbers, chosen first")
    if len(set(map(tuple, numbers))) < len(numbers):
        raise bad(where, "pairs", "names a pair twice", "Give each pair once, and its weight in 'weight'")
    margins = _margins(row.get("margin"), len(numbers), where)
    return tuple(Preferred(pair[0], pair[1], margin) for pair, margin in zip(numbers, margins, strict=True))


def _margins(value: Any, count: int, where: str) -> list[float | None]:
    margins = list(value) if isinstance(value, list | tuple) else [value] * count
    margins = margins or [None] * count
    if len(margins) != count or not all(margin is None or is_number(margin) for margin in margins):
        raise bad(where, "margin", f"is {value!r} for {count} pairs", "Give one finite number per pair")
    return margins


def _unscored_spans(row: Mapping[str, Any], completions: list[list[int]], where: str) -> tuple[Span, ...]:
    """In order, none into another: each completion's are checked against the end of the one before."""
    value = _list_of(row, "unscored", where)
    for span in value:
        known = _integers(span, 3) and 0 <= span[0] < len(completions)
        if not known or not 0 <= span[1] < span[2] <= len(completions[span[0]]):
            raise bad(where, "unscored", f"holds {span!r:.40}", "Give (number of the completion, start, end)")
    spans = tuple((number, start, end) for number, start, end in sorted(value))
    for (number, _, end), (following, start, _) in pairwise(spans):
        if number == following and start < end:
            raise bad(where, "unscored", f"has stretches of completion {number} that overlap", "Join them")
    return spans
