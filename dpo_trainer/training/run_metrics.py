"""The numbers of a run's log lines: means over pairs, tokens so far, and tokens per second."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..metrics import FallingChosenWarning, Metric, MetricInputs, MetricSums


class RunMetrics:
    """The sums of training and evaluation (`metrics["train"]`, `metrics["eval"]`), and what else a log line of training shows.

    Args:
        table: the metrics, by name.
        sum_over_ranks: sums a tensor over ranks.
        watch: called with every micro-batch of training.
        has_router: whether the model has a load-balancing loss.
        beta, has_reference: for the warning about falling chosen log-probs.
    """

    def __init__(
        self,
        table: Mapping[str, Metric],
        *,
        device: torch.device,
        sum_over_ranks: Callable[[Tensor], Tensor],
        watch: Callable[[MetricInputs], None],
        has_router: bool,
        beta: float,
        has_reference: bool,
    ):
        self.device, self.sum_over_ranks = device, sum_over_ranks
        self.sums = {
            "train": MetricSums(table, aux_loss=has_router, also=watch),
            "eval": MetricSums(table, aux_loss=has_router),
        }
        self.falling_chosen = FallingChosenWarning(beta, has_reference=has_reference)
        self.num_tokens = 0
        self.restart_clock()

    def __getitem__(self, split: str) -> MetricSums:
        return self.sums[split]

    def restart_clock(self) -> None:
        """The time of the next line of training begins now."""
        self._logged_at = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """This time was spent in evaluation: tokens_per_second is about training."""
        self._logged_at += seconds

    def reduce(self, split: str) -> tuple[dict[str, float], int]:
        """(means since the last call, tokens since then), on all ranks. Every rank must call."""
        return self.sums[split].reduce(self.sum_over_ranks, self.device)

    def line(self, means: dict[str, float], tokens: int, step: int) -> dict[str, float]:
        """A line of training: `means`, the tokens of the run and tokens per second since the last line."""
        now = time.perf_counter()
        self.num_tokens += tokens
        self.falling_chosen.look(means, step)
        line = {**means, "num_tokens": self.num_tokens, "tokens_per_second": tokens / (now - self._logged_at)}
        self._logged_at = now
        return line

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint. Every rank must call."""
        since_last_log = self.sums["train"].state_dict(self.sum_over_ranks, self.device)
        return {"num_tokens": self.num_tokens, "since_last_log": since_last_log}

    def load_state_dict(self, state: dict[str, Any], *, main: bool) -> None:
        """The main process takes the sums, which are those of all ranks."""
        self.num_tokens = state["num_tokens"]
        if main:
            self.sums["train"].load_state_dict(state["since_last_log"], self.device)
