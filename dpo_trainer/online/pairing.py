"""Scores -> rows to train on: which completions of a prompt are compared.

A prompt whose completions all have one score teaches nothing, and one that could not be judged is not guessed at: both keep
their place in the batch with weight 0, so that every rank makes as many passes, and are counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Any

from .samples import Sampled


class Outcome(Enum):
    PAIRED = "paired"
    TIED = "tied"
    FAILED = "failed"  # fewer than two completions with a score


def paired(sampled: Sampled, scores: Sequence[float | None], *, every_pair: bool) -> tuple[dict[str, Any], Outcome]:
    """A row as the collator takes it, best completion first; its `margin` is the difference of scores.

    The same answer twice is one answer: whatever a judge says of the two, there is nothing to prefer.
    """
    ranked = _ranked(sampled, scores)
    if len(ranked) < 2 or ranked[0][0] == ranked[-1][0]:
        judged = sum(score is not None for score in scores)
        ids = [completion.ids for completion in sampled.completions[:2]]
        idle = _row(sampled, ids, [[0, 1]], [1.0], weight=0.0)  # any margin that every loss can take
        return idle, Outcome.TIED if judged > 1 else Outcome.FAILED
    if not every_pair:
        ranked = [ranked[0], ranked[-1]]
    places = range(len(ranked))
    pairs = [[i, j] for i in places for j in places if ranked[i][0] > ranked[j][0]]
    margins = [ranked[i][0] - ranked[j][0] for i, j in pairs]
    return _row(sampled, [ids for _, ids in ranked], pairs, margins), Outcome.PAIRED


def _ranked(sampled: Sampled, scores: Sequence[float | None]) -> list[tuple[float, list[int]]]:
    """Distinct completions that have a score, best first; of equal ones the first as sampled."""
    distinct: dict[tuple[int, ...], float] = {}
    for completion, score in zip(sampled.completions, scores, strict=True):
        if score is not None:
            distinct.setdefault(tuple(completion.ids), score)
    return sorted(((score, list(ids)) for ids, score in distinct.items()), key=lambda item: -item[0])


def _row(
    sampled: Sampled,
    completions: list[list[int]],
    pairs: list[list[int]],
    margins: list[float],
    *,
    weight: float | None = None,
) -> dict[str, Any]:
    chosen, rejected, *more = completions
    return {
        "example_id": sampled.example_id,
        "prompt_ids": sampled.prompt_ids,
        "chosen_ids": chosen,
        "rejected_ids": rejected,
        "more_ids": more,
        "pairs": pairs,
        "margin": margins,
        "weight": sampled.weight if weight is None else weight,
    }
