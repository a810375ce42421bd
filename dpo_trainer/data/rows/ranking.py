"""Which completions of a row are preferred to which: one chosen against a list, or a list with scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...types import Preferred
from ..errors import bad

LARGEST = 1e38
"""Sums and differences of two such numbers fit float32, in which they are trained on."""


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


def is_number(value: Any) -> bool:
    """A number that float32 can hold, and the difference of two such numbers too."""
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= LARGEST


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
