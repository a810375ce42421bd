"""How often one set of answers is preferred to another, with the uncertainty that the number of comparisons leaves."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

from ...types import Text
from ..samples import Completion, Sampled
from .protocol import Scores, checked


@dataclass(frozen=True)
class WinRate:
    """Of answers against others to the same prompts: comparisons won, drawn, lost, and those without a judgement."""

    wins: int
    ties: int
    losses: int
    failed: int = 0

    def __post_init__(self) -> None:
        for name, count in asdict(self).items():
            if not isinstance(count, int) or count < 0:
                raise ValueError(f"WinRate: {name} is {count!r}. Give a count, 0 or more.")

    @property
    def judged(self) -> int:
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float:
        """In [0, 1], of the judged comparisons; a tie is half a win. NaN where none was judged."""
        return (self.wins + self.ties / 2) / self.judged if self.judged else math.nan

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """(low, high) of the win rate: the Wilson score interval at this confidence.

            (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),    z = Phi^-1((1 + level) / 2)

        p is `rate` and n the judged comparisons: failed ones say nothing. Half wins vary less than the formula takes for
        granted, so with ties the interval is wider than it had to be, never too narrow. (0, 1) where none was judged.

        Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", Journal of the American
        Statistical Association 22. The prompts count as drawn independently.

        Raises:
            ValueError: for a level outside (0, 1).
        """
        z = NormalDist().inv_cdf((1 + check_level(level)) / 2)
        n, p = self.judged, self.rate
        if not n:
            return 0.0, 1.0
        middle = p + z**2 / (2 * n)
        half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        low, high = ((middle + side) / (1 + z**2 / n) for side in (-half, half))
        return max(0.0, min(low, p)), min(1.0, max(high, p))  # rounding shall not put the rate outside

    def to_dict(self, level: float = 0.95) -> dict[str, Any]:
        """For JSON: rate, interval and counts. The rate is None where nothing was judged."""
        low, high = self.interval(level)
        return {
            "win_rate": self.rate if self.judged else None,
            "low": low,
            "high": high,
            "level": level,
            **asdict(self),
        }

    def describe(self, level: float = 0.95) -> str:
        """In one line, with the interval at this confidence."""
        counts = f"{self.wins} wins, {self.ties} ties, {self.losses} losses, {self.failed} failed"
        if not self.judged:
            return f"no win rate: no comparison was judged ({counts})"
        low, high = self.interval(level)
        return f"win rate {self.rate:.1%}, {100 * level:g} % interval {low:.1%} to {high:.1%} ({counts})"

    def __str__(self) -> str:
        return self.describe()


def check_level(level: float, name: str = "level") -> float:
    """`level`, a confidence in (0, 1). `name` is what errors call it."""
    if not 0 < level < 1:
        raise ValueError(f"{name} is {level}: a confidence lies between 0 and 1. The usual one is 0.95.")
    return level


def compare_answers(
    feedback: Callable[[Sequence[Sampled]], Scores],
    prompts: Sequence[Text],
    answers_a: Sequence[str],
    answers_b: Sequence[str],
    columns: Sequence[Mapping[str, Any]] | None = None,
    ids: Sequence[int] | None = None,
) -> WinRate:
    """How often the answers `a` score higher than the answers `b` to the same prompts.

    `feedback` is a judge or rewards. `columns` are the other columns of each row, `ids` its example ids (0, 1, ... when
    None). The answers may come from anywhere, so there are no token ids: feedback has the texts to go by.

    Raises:
        ValueError: for lists of different lengths, and what the feedback refuses.
        FeedbackUnavailable: when the judge does not answer.
    """
    given = {"prompts": prompts, "answers_a": answers_a, "answers_b": answers_b, "columns": columns, "ids": ids}
    lengths = {name: len(values) for name, values in given.items() if values is not None}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{length} {name}" for name, length in lengths.items())
        raise ValueError(
            f"Answers to compare must belong to the same prompts, got {counts}: give one of each per prompt."
        )
    samples = [
        Sampled(
            example_id=number if ids is None else ids[number],
            prompt=prompt,
            prompt_ids=[],
            completions=[Completion(ids=[], text=text, finished=True) for text in answers],
            columns=dict(columns[number]) if columns is not None else {},
        )
        for number, (prompt, *answers) in enumerate(zip(prompts, answers_a, answers_b, strict=True))
    ]
    who = f"Feedback {getattr(feedback, 'name', type(feedback).__name__)!r}"
    return _counted(checked(feedback(samples), samples, who)) if samples else WinRate(0, 0, 0)


def _counted(scores: Scores) -> WinRate:
    pairs = [(a, b) for a, b in scores if a is not None and b is not None]
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return WinRate(wins, len(pairs) - wins - losses, losses, len(scores) - len(pairs))
