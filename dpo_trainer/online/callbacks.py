"""What shows how a run does: its completions with their scores, and how often its answers beat those of a reference.

    OnlineDPOTrainer(..., callbacks=[LogCompletionsCallback(n=4), WinRateCallback(judge, prompts)])

The trainer binds itself to a callback that has `bind`. Completions come from `trainer.last_samples`, answers from
`trainer.sample_answers`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from ..registry import did_you_mean
from ..types import Text
from .completions import FILE, TRACKERS, append, cut_back, print_completions, rows_of
from .feedback.protocol import Feedback, FeedbackUnavailable
from .feedback.win_rate import WinRate, check_level, compare_answers

logger = logging.getLogger(__name__)

PLACES = ("console", "jsonl", "report_to")


class _Bound(TrainerCallback):
    """A callback that knows its trainer, and acts every so many optimizer steps."""

    needs: str  # the attribute of a trainer that it lives on

    def __init__(self, trainer: Any, every: int | None):
        if every is not None and every < 1:
            raise ValueError(
                f"{type(self).__name__}: every={every} must be a number of optimizer steps, 1 or more, or None."
            )
        self.trainer, self.every = trainer, every
        self._done_at: int | None = None  # the step that it acted at last

    def bind(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._done_at = None
        if not hasattr(self.trainer, self.needs):
            got = (
                "no trainer" if self.trainer is None else f"a {type(self.trainer).__name__}, which has no {self.needs}"
            )
            raise ValueError(
                f"{type(self).__name__} got {got}: it shows what a run samples. Use it with OnlineDPOTrainer, or leave it out."
            )

    def _first_time_at(self, step: int) -> bool:
        first, self._done_at = self._done_at != step, step
        return first

    def _due(self, step: int) -> bool:
        return self.every is not None and step % self.every == 0 and self._first_time_at(step)


class LogCompletionsCallback(_Bound):
    """Shows the first `n` prompts of the newest samples on the main process, with completions and scores.

    `every` so many optimizer steps, or at each log line and evaluation (None). `to`: the "console"; "jsonl", which is
    completions.jsonl in the output folder, a line per completion; "report_to", which is those of wandb, trackio and
    tensorboard that the run reports to. A resumed run goes on with the file from its checkpoint, a new run begins it anew.

    The outcome of a completion is "chosen" or "rejected" for the best and the worst of its prompt as pairs are made of them,
    "tie" where there is no pair for equal scores, and nothing for others, nor where fewer than two were judged.

    Raises:
        ValueError: for an option out of range; when training begins, for a trainer that samples nothing.
    """

    needs = "last_samples"

    def __init__(
        self, trainer: Any = None, *, n: int = 8, every: int | None = None, to: Sequence[str] = PLACES
    ) -> None:
        super().__init__(trainer, every)
        if n < 1:
            raise ValueError(f"LogCompletionsCallback: n={n} must be a number of prompts, 1 or more.")
        to = (to,) if isinstance(to, str) else tuple(to)
        for place in to:
            if place not in PLACES:
                raise ValueError(
                    f"LogCompletionsCallback: to={place!r} is no place.{did_you_mean(place, PLACES)} Known: {', '.join(PLACES)}."
                )
        if not to:
            raise ValueError(
                f"LogCompletionsCallback: to is empty. Give some of {', '.join(PLACES)}, or leave the callback out."
            )
        self.n, self.to = n, to

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero and "jsonl" in self.to:
            cut_back(Path(args.output_dir) / FILE, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._due(state.global_step):
            self._show(args, state)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # An evaluation ends with a line of its own.
        if self.every is None and self._first_time_at(state.global_step):
            self._show(args, state)

    def _show(self, args: Any, state: Any) -> None:
        newest = getattr(self.trainer, self.needs, ())
        samples = [(sampled, scores) for sampled, scores in newest if sampled.weight]  # others only fill a batch
        if not state.is_world_process_zero or not samples:  # nothing is sampled before the first step
            return
        rows = [row for sampled, scores in samples[: self.n] for row in rows_of(state.global_step, sampled, scores)]
        if "console" in self.to:
            print_completions(rows)
        if "jsonl" in self.to:
            append(rows, Path(args.output_dir) / FILE)
        if "report_to" in self.to:
            for name in args.report_to or ():
                if name in TRACKERS:
                    TRACKERS[name](rows, state.global_step, self.trainer)


class WinRateCallback(_Bound):
    """Logs how often the model's answers to held-out prompts beat reference answers, by `feedback`.

    Answers are the likeliest (greedy) ones, to the first `n` of `prompts`. `reference_answers` belong to `prompts` one by
    one; None: those of the reference model, asked once. `columns`: the other columns of each row, for feedback that reads
    them. `every` so many optimizer steps, or at each evaluation (None), where the numbers also join those of the evaluation:
    --metric_for_best_model eval_greedy_win_rate works.

    Logged: eval_greedy_win_rate in [0, 1] with eval_greedy_win_rate_low and _high (Wilson score interval at `level`), and how many
    comparisons were ties (_ties) or not judged (_failed). While feedback is unavailable, a warning and _failed alone.

    Raises:
        ValueError: for an option out of range; when training begins, for a trainer that cannot answer.
    """

    needs = "sample_answers"

    def __init__(
        self,
        feedback: Feedback,
        prompts: Sequence[Text],
        *,
        reference_answers: Sequence[str] | None = None,
        columns: Sequence[Mapping[str, Any]] | None = None,
        max_new_tokens: int = 64,
        n: int = 64,
        every: int | None = None,
        level: float = 0.95,
        trainer: Any = None,
    ) -> None:
        super().__init__(trainer, every)
        if not callable(feedback):
            raise ValueError(
                f"WinRateCallback: feedback {feedback!r} cannot be called. Give a judge (make_judge) or rewards."
            )
        for name, values in {"reference_answers": reference_answers, "columns": columns}.items():
            if values is not None and len(values) != len(prompts):
                raise ValueError(
                    f"WinRateCallback: {len(values)} {name} for {len(prompts)} prompts. Give one for each."
                )
        if isinstance(prompts, str) or not len(prompts):
            raise ValueError(f"WinRateCallback: prompts={prompts!r:.80} must be a list of prompts, at least one.")
        for name, value in {"n": n, "max_new_tokens": max_new_tokens}.items():
            if value < 1:
                raise ValueError(f"WinRateCallback: {name}={value} must be 1 or more.")
        self.feedback, self.level = feedback, check_level(level, "WinRateCallback: level")
        self.prompts, self.max_new_tokens = list(prompts)[:n], max_new_tokens
        self.reference_answers = None if reference_answers is None else list(reference_answers)[:n]
        self.columns = None if columns is None else list(columns)[:n]
        self.unavailable = 0  # how often feedback was down

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._due(state.global_step):
            self._log(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        # Several evaluation datasets are several evaluations at one step.
        if self.every is None and self._first_time_at(state.global_step):
            found = self._log(state, control)
            if metrics is not None:
                metrics.update(found)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._done_at = None  # the best model may be loaded now: the same step, other weights

    def _log(self, state: Any, control: Any) -> dict[str, float]:
        found = self.measure(main_process=state.is_world_process_zero)
        line: dict[str, float] = {"eval_greedy_win_rate_ties": found.ties, "eval_greedy_win_rate_failed": found.failed}
        if found.judged:
            low, high = found.interval(self.level)
            line |= {
                "eval_greedy_win_rate": found.rate,
                "eval_greedy_win_rate_low": low,
                "eval_greedy_win_rate_high": high,
            }
        should_log = control.should_log
        self.trainer.log(dict(line))
        control.should_log = should_log  # a line of ours shall not stand for that of training, which may be due
        return line

    def measure(self, *, main_process: bool = True) -> WinRate:
        """Now. Every process must call: all answer, the main one asks for feedback, and all get the result."""
        answers = self.trainer.sample_answers(self.prompts, max_new_tokens=self.max_new_tokens)
        if self.reference_answers is None:
            self.reference_answers = self.trainer.sample_answers(
                self.prompts, reference=True, max_new_tokens=self.max_new_tokens
            )
        found = [self._compared(answers) if main_process else None]
        broadcast_object_list(found)
        assert found[0] is not None
        return found[0]

    def _compared(self, answers: Sequence[str]) -> WinRate:
        assert self.reference_answers is not None
        try:
            return compare_answers(self.feedback, self.prompts, answers, self.reference_answers, self.columns)
        except FeedbackUnavailable as error:
            self.unavailable += 1
            logger.warning("No win rate this time, for the %d. time in this run: %s", self.unavailable, error)
            return WinRate(0, 0, 0, failed=len(self.prompts))
