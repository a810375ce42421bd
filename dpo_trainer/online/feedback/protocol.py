"""Feedback on samples, behind one protocol: scores of the completions of each prompt, by rewards or by a judge.

A judge of one's own is registered by name and made from `--judge NAME --judge_kwargs '{...}'`:

    @register_judge("short")
    class Short(Judge):
        def scores(self, samples):
            return [[-len(completion.text) for completion in sampled.completions] for sampled in samples]

P prompts   K completions of each
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

from ...losses.options import is_number
from ...registry import Registry
from ..samples import Sampled

Scores = list[list[float | None]]
"""[P][K]: larger is better, within a prompt. None: there is no judgement."""


class FeedbackUnavailable(RuntimeError):
    """The judge or reward does not answer after all retries: the run stops with a checkpoint."""


class Feedback(Protocol):
    """What the trainer asks. `counts`: what it wants logged (calls, failures, cost), totals since it was made; a run that is
    resumed puts those of its checkpoint into it, to be counted on."""

    name: str
    counts: dict[str, float]

    def __call__(self, samples: Sequence[Sampled]) -> Scores: ...


class Judge(ABC):
    """Scores the completions of each prompt. Registered by name with `register_judge`; arguments of `__init__` are its
    options, and wrong ones raise ValueError there."""

    name: str = "judge"

    def __init__(self) -> None:
        self.counts: dict[str, float] = {}

    @abstractmethod
    def scores(self, samples: Sequence[Sampled]) -> Scores:
        """[P][K] numbers, larger is better; None where the judge cannot tell."""

    def __call__(self, samples: Sequence[Sampled]) -> Scores:
        return checked(self.scores(samples), samples, f"Judge {self.name!r}")


@dataclass(frozen=True)
class Comparison:
    """Which of two answers to one prompt is better? `sampled.completions[first]` or `[second]`."""

    sampled: Sampled
    first: int
    second: int

    @property
    def texts(self) -> tuple[str, str]:
        return self.sampled.completions[self.first].text, self.sampled.completions[self.second].text


class PairwiseJudge(Judge):
    """A judge that compares two answers. The score of a completion is the mean probability that it beats the others of its
    prompt, over the comparisons that could be judged."""

    @abstractmethod
    def compare(self, comparisons: Sequence[Comparison]) -> Sequence[float | None]:
        """The probability, in [0, 1], that the first is better; 0.5 is a tie, None a failed judgement."""

    def scores(self, samples: Sequence[Sampled]) -> Scores:
        comparisons = [Comparison(s, i, j) for s in samples for i, j in combinations(range(len(s.completions)), 2)]
        verdicts = list(self.compare(comparisons))
        if len(verdicts) != len(comparisons):
            raise ValueError(
                f"Judge {self.name!r} returned {len(verdicts)} verdicts for {len(comparisons)} comparisons: return one each, None "
                "where it cannot tell."
            )
        wins: dict[tuple[int, int], list[float]] = {}
        for comparison, verdict in zip(comparisons, verdicts, strict=True):
            if verdict is None:
                continue
            if not is_number(verdict) or not 0 <= verdict <= 1:
                raise ValueError(
                    f"Judge {self.name!r} returned {verdict!r} for a comparison: return the probability in [0, 1] that the first "
                    "answer is better, or None."
                )
            of = id(comparison.sampled)
            wins.setdefault((of, comparison.first), []).append(float(verdict))
            wins.setdefault((of, comparison.second), []).append(1 - float(verdict))
        return [[_mean(wins.get((id(s), k))) for k in range(len(s.completions))] for s in samples]


JUDGES: Registry[Callable[..., Judge]] = Registry("judge")


def register_judge(name: str) -> Callable[[type[Judge]], type[Judge]]:
    """Make a judge known by name, for `--judge`.

    Raises:
        ValueError: for a name that is taken.
    """

    def add(kind: type[Judge]) -> type[Judge]:
        JUDGES.add(name, kind)
        kind.name = name
        return kind

    return add


def parse_options(text: str) -> dict[str, Any]:
    """The options of a judge from a command line.

    Raises:
        ValueError: for anything but a JSON object.
    """
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--judge_kwargs {text!r} is not valid JSON: {error}.") from None
    if not isinstance(options, dict):
        raise ValueError(f"--judge_kwargs must be a JSON object, got {text!r}.")
    return options


def make_judge(name: str, options: dict[str, Any] | None) -> Judge:
    """The judge of this name.

    Raises:
        ValueError: for an unknown name, an option it does not have or lacks, or a value it refuses.
    """
    kind = JUDGES[name]
    known = list(inspect.signature(kind).parameters)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(kind).parameters.values())
    if unknown := [option for option in options or {} if option not in known and not takes_any]:
        raise ValueError(
            f"--judge_kwargs: judge {name!r} has no option {unknown[0]!r}. It has: {', '.join(known) or 'none'}."
        )
    try:
        return kind(**(options or {}))
    except TypeError as error:
        raise ValueError(f"--judge_kwargs does not fit judge {name!r}: {error}. It has: {', '.join(known)}.") from None


def checked(scores: Any, samples: Sequence[Sampled], who: str) -> Scores:
    """`scores` as [P][K] of finite numbers or None.

    Raises:
        ValueError: for anything else, with the prompt it was said of.
    """
    shape = [len(sampled.completions) for sampled in samples]
    got = [len(row) if isinstance(row, Sequence) else None for row in scores] if isinstance(scores, Sequence) else None
    if got != shape:
        raise ValueError(f"{who} returned numbers of shape {got} for {shape} completions: return one for each.")
    for sampled, row in zip(samples, scores, strict=True):
        for score in row:
            if score is not None and not is_number(score):
                raise ValueError(
                    f"{who} returned {score!r} for the prompt with example_id {sampled.example_id}: return a finite number, or "
                    "None where it cannot tell."
                )
    return [[None if score is None else float(score) for score in row] for row in scores]


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
