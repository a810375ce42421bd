"""From prompts to rows of pairs: samples of the policy, what is said of them, and what the log shows of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain, compress
from typing import Any, TypeVar

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from ..data.rows.messages import without_none
from ..data.stream import PADDING_ROW_ID
from ..losses.options import is_number
from .config import OnlineDPOConfig
from .feedback.protocol import Feedback, FeedbackUnavailable, Scores
from .metrics import TALLIED, Tally, means
from .pairing import Outcome, paired
from .prompts import OURS
from .samples import Completion, Sampled
from .sampling.generate import Generator

T = TypeVar("T")


class Rollout:
    """Samples, scores and pairs under the options of one run. Counts are of this rank until they are read.

    Args:
        sum_over_ranks: of a tensor. Every rank calls what uses it: `sampled`, `scored`, `compared`, `numbers`.
    """

    def __init__(self, args: OnlineDPOConfig, feedback: Feedback, sum_over_ranks: Callable[[Tensor], Tensor]):
        self.args, self.feedback, self.sum_over_ranks = args, feedback, sum_over_ranks
        names = [*TALLIED, *(f"scores/{name}" for name in getattr(feedback, "last", ()))]
        self.tally = {"train": Tally(names), "eval": Tally(names)}
        self.restart_clock()

    def restart_clock(self) -> None:
        self._tokens = self._seconds = 0.0  # of generation
        self._since = time.perf_counter()

    def asked(self, ask: Callable[[], T]) -> T:
        """What others answer, a judge or a server that samples. Every rank calls.

        Raises:
            FeedbackUnavailable: on all ranks, if one of them gets no answer after all retries.
        """
        problem: FeedbackUnavailable | None = None
        try:
            answer = ask()
        except FeedbackUnavailable as error:
            problem = error
        if self.sum_over_ranks(torch.tensor(float(problem is not None), device=self.args.device)):
            raise problem or FeedbackUnavailable("Another process got no answer.")
        return answer

    def sampled(
        self, generator: Generator, model: nn.Module, rows: Sequence[dict[str, Any]], seed: int
    ) -> list[Sampled]:
        """The answers of `model` to each row of `prompts.py`."""
        began = time.perf_counter()
        prompts = [row["prompt_ids"] for row in rows]
        count, decoding = self.args.num_generations, self.args.decoding
        completions = self.asked(lambda: generator(model, prompts, count, decoding=decoding, seed=seed))
        self._seconds += time.perf_counter() - began
        self._tokens += sum(len(answer.ids) for answers in completions for answer in answers)
        return [_with_answers(row, answers) for row, answers in zip(rows, completions, strict=True)]

    def scored(self, samples: Sequence[Sampled]) -> Scores:
        """With the penalty for answers that did not end."""
        scores = self.asked(lambda: self.feedback(samples))
        penalty = self.args.missing_eos_penalty or 0.0
        return [
            [
                None if score is None else score - penalty * (not completion.finished)
                for score, completion in zip(row, sampled.completions, strict=True)
            ]
            for row, sampled in zip(scores, samples, strict=True)
        ]

    def paired(self, samples: Sequence[Sampled], scores: Scores, split: str) -> list[dict[str, Any]]:
        """Rows for the collator. What is known of the samples is counted, without fillers."""
        every = self.args.pair_selection == "all"
        pairs = [paired(sampled, row, every_pair=every) for sampled, row in zip(samples, scores, strict=True)]
        real = [sampled.weight > 0 for sampled in samples]
        tally = self.tally[split]
        tally.count(list(compress(samples, real)), list(compress(scores, real)))
        for name, outcome in (("tie_rate", Outcome.TIED), ("failed_rate", Outcome.FAILED)):
            tally.add(name, [float(found is outcome) for _, found in compress(pairs, real)])
        of_answers = [is_real for sampled, is_real in zip(samples, real, strict=True) for _ in sampled.completions]
        for name, values in getattr(self.feedback, "last", {}).items():
            tally.add(f"scores/{name}", list(compress(values, of_answers)))
        return [row for row, _ in pairs]

    def compared(self, samples: Sequence[Sampled], answers: Sequence[Completion]) -> None:
        """Count how often the first of each prompt's samples beats the reference's answer."""
        both = [
            Sampled(**{**vars(sampled), "completions": [sampled.completions[0], answer]})
            for sampled, answer in zip(samples, answers, strict=True)
        ]
        scores = list(compress(self.scored(both), [sampled.weight > 0 for sampled in samples]))
        self.tally["eval"].add("win_rate", [_wins(row) for row in scores])
        self.tally["eval"].add("scores/reference", [row[1] for row in scores])

    def numbers(self, split: str) -> dict[str, float]:
        """Means since they were last asked for, on all ranks; of training also how long sampling took."""
        found = means(self.tally[split].table(self.sum_over_ranks, self.args.device))
        self.tally[split].clear()
        if split == "eval":
            return found
        found["sampling/share_of_time"] = self._seconds / (time.perf_counter() - self._since)
        if self._seconds:
            found["sampling/tokens_per_second"] = self._tokens / self._seconds
        self.restart_clock()
        return found | {f"{self.feedback.name}/{name}": value for name, value in self.counts().items()}

    def counts(self) -> dict[str, float]:
        """What the feedback counts, the sum over ranks: each asks for itself. Every rank must call."""
        own = {name: float(value) for name, value in self.feedback.counts.items() if is_number(value)}
        every = gather_object([own]) if self.args.world_size > 1 else [own]
        return {name: sum(of_rank.get(name, 0) for of_rank in every) for name in dict.fromkeys(chain(*every))}


def _with_answers(row: dict[str, Any], answers: list[Completion]) -> Sampled:
    return Sampled(
        example_id=row["example_id"],
        prompt=without_none(row["prompt"]),
        prompt_ids=row["prompt_ids"],
        completions=answers,
        columns={name: value for name, value in row.items() if name not in ("prompt", *OURS)},
        weight=0.0 if row["example_id"] == PADDING_ROW_ID else 1.0,
    )


def _wins(scores: Sequence[float | None]) -> float | None:
    """1 where the first is better, 0.5 for a tie, 0 else; None where either could not be judged."""
    first, second = scores
    return None if first is None or second is None else 0.5 + 0.5 * ((first > second) - (first < second))
