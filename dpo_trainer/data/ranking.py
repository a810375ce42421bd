"""Which completions of a row are preferred to which: one chosen against a list, or a list with scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..batch import Preferred
from .errors import bad

UnusableMargin: TypeAlias = "Callable[[float | None], str | None]"
"""What a loss says against a margin: why it cannot read it and the way out, or None."""


def against_each(row: Mapping[str, Any], count: int, where: str) -> tuple[Preferred, ...]:
    """The chosen completion (number 0) against each of `count` rejected ones, with the margins of the row."""
    margins = _margins(row.get("margin"), count, where)
    return tuple(Preferred(0, number + 1, margin) for number, margin in enumerate(margins))


def ranked(row: Mapping[str, Any], where: str) -> tuple[list[int], tuple[Preferred, ...]]:
    """(order, pairs) of a row with `completions` and `scores`: best first, every pair whose scores differ.

    Numbers in `pairs` count in that order; the margin of a pair is the difference of its scores. Equal scores are no
    preference, so `pairs` may be empty.
    """
    completions, scores = row["completions"], row.get("scores")
    if not isinstance(scores, list | tuple) or len(scores) != len(completions):
        have = f"{len(scores)} of them" if isinstance(scores, list | tuple) else repr(scores)
        raise bad(where, "scores", f"is {have} for {len(completions)} completions", "Give one number per completion")
    for number, score in enumerate(scores):
        if not is_number(score):
            raise bad(where, "scores", f"holds {score!r} at {number}", "Give finite numbers; higher is better")
    if row.get("margin") is not None:
        raise bad(where, "margin", "is set, and 'scores' say it already", "Remove one of the two columns")
    order = sorted(range(len(scores)), key=lambda number: -scores[number])
    best = [float(scores[number]) for number in order]
    return order, tuple(
        Preferred(i, j, best[i] - best[j])
        for i in range(len(best))
        for j in range(i + 1, len(best))
        if best[i] > best[j]
    )


def check_margins(
    margins: Iterable[Sequence[float | None]], keep: np.ndarray, numbers: np.ndarray, name: str, unusable: UnusableMargin
) -> None:
    """Refuse the first row that is used and has a margin that the loss cannot read, or none (an empty list)."""
    for of_row, used, number in zip(margins, keep, numbers, strict=True):
        for margin in of_row or [None] if used else ():
            if why := unusable(margin):
                raise ValueError(f"Row {number} of {name}: {why}")


def is_number(value: Any) -> bool:
    """A finite number; an integer beyond all floats is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _margins(value: Any, count: int, where: str) -> Sequence[float | None]:
    if value is None or (isinstance(value, list | tuple) and not value):
        return [None] * count
    values = value if isinstance(value, list | tuple) else [value] * count
    if len(values) != count:
        raise bad(
            where, "margin", f"has {len(values)} entries for {count} pairs", "Give one number per rejected answer"
        )
    for margin in values:
        if not is_number(margin):
            raise bad(
                where, "margin", f"is {margin!r}", "Give a finite number: by how much the chosen answer is better"
            )
    return [float(margin) for margin in values]
