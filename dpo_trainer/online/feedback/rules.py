"""Judges that need no model: chance, length, a pattern, a known answer."""

from __future__ import annotations

import hashlib
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from ..samples import Completion, Sampled
from .protocol import Judge, Scores, register_judge


class _Rule(Judge):
    """A judge that looks at one completion at a time."""

    @abstractmethod
    def score(self, sampled: Sampled, completion: Completion) -> float | None: ...

    def scores(self, samples: Sequence[Sampled]) -> Scores:
        return [[self.score(sampled, completion) for completion in sampled.completions] for sampled in samples]


@register_judge("random")
class RandomJudge(_Rule):
    """Scores in [0, 1) by chance, to compare other judges with.

    They are a hash of the seed, the prompt and the completion: a run that goes on gets the verdicts of one that was never
    interrupted, and equal completions of a prompt tie.
    """

    def __init__(self, *, seed: int = 0):
        super().__init__()
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"Judge 'random': seed must be a whole number, got {seed!r}.")
        self.seed = seed

    def score(self, sampled: Sampled, completion: Completion) -> float:
        # Ids alone would not do: answers that were read from a file have none.
        of = [self.seed, sampled.question(), list(sampled.prompt_ids), completion.text, list(completion.ids)]
        digest = hashlib.blake2b(json.dumps(of).encode(), digest_size=8).digest()
        return (int.from_bytes(digest, "little") >> 11) / 2**53


@register_judge("length")
class LengthJudge(_Rule):
    """Prefers the "shorter" or the "longer" answer, in "characters" of the text or in "tokens", the one that ends it too."""

    def __init__(self, *, prefer: str = "shorter", unit: str = "characters"):
        super().__init__()
        _check_choice("length", "prefer", prefer, ("shorter", "longer"))
        _check_choice("length", "unit", unit, ("characters", "tokens"))
        self.sign = 1 if prefer == "longer" else -1
        self.unit = unit

    def score(self, sampled: Sampled, completion: Completion) -> float:
        if self.unit == "characters":
            return self.sign * len(completion.text)
        if completion.text and not completion.ids:
            raise ValueError(
                f"Judge 'length': an answer to the prompt with example_id {sampled.example_id} was not sampled here, so its "
                "tokens are not known. Use unit='characters'."
            )
        return self.sign * len(completion.ids)


@register_judge("regex")
class RegexJudge(_Rule):
    """1 for an answer in which `pattern` (Python's `re`) is found, 0 for any other; `full`: it must match all of the text."""

    def __init__(self, *, pattern: str, full: bool = False):
        super().__init__()
        _check_choice("regex", "full", full, (True, False))
        try:
            compiled = re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"Judge 'regex': pattern {pattern!r} is no regular expression: {error}.") from error
        self.matches: Callable[[str], Any] = compiled.fullmatch if full else compiled.search

    def score(self, sampled: Sampled, completion: Completion) -> float:
        return float(self.matches(completion.text) is not None)


@register_judge("exact_match")
class ExactMatchJudge(_Rule):
    """1 for an answer that is what the row has in `column`, 0 for any other; None for a row that has None there.

    `strip`: without white space around the two; `ignore_case`: without regard to case.
    """

    def __init__(self, *, column: str = "answer", strip: bool = True, ignore_case: bool = False):
        super().__init__()
        if not isinstance(column, str) or not column:
            raise ValueError(f"Judge 'exact_match': column must be the name of a column, got {column!r}.")
        _check_choice("exact_match", "strip", strip, (True, False))
        _check_choice("exact_match", "ignore_case", ignore_case, (True, False))
        self.column, self.strip, self.ignore_case = column, strip, ignore_case

    def score(self, sampled: Sampled, completion: Completion) -> float | None:
        wanted = self._wanted(sampled)
        return None if wanted is None else float(self._plain(completion.text) == self._plain(wanted))

    def _wanted(self, sampled: Sampled) -> str | None:
        where = f"Judge 'exact_match': the row with example_id {sampled.example_id}"
        if self.column not in sampled.columns:
            known = ", ".join(sampled.columns) or "none"
            raise ValueError(
                f"{where} has no column {self.column!r}; beside the prompt it has: {known}. Name the one with the right "
                "answer: --judge_kwargs '{\"column\": ...}'."
            )
        wanted = sampled.columns[self.column]
        if wanted is not None and (not isinstance(wanted, str | int) or isinstance(wanted, bool)):
            raise ValueError(
                f"{where} has a {type(wanted).__name__} in column {self.column!r}: give the answer as a string or a whole number."
            )
        return None if wanted is None else str(wanted)

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


def _check_choice(judge: str, option: str, value: Any, choices: tuple[Any, ...]) -> None:
    if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in choices):
        raise ValueError(f"Judge {judge!r}: {option} must be {' or '.join(map(repr, choices))}, got {value!r}.")
