"""What online DPO logs beside the metrics of DPO.

    objective/kl       log-prob under the policy - under the reference, of the completions in pairs: nats per completion, an
                       estimate of KL(policy || reference) on the policy's own samples
    objective/entropy  of the policy at each completion token, nats

Both count the tokens of completions alone. The rest is counted on the host, where samples are made and judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from ..data.stream import PADDING_ROW_ID
from ..metrics import METRICS, Metric, MetricInputs
from ..types import widest_float
from .feedback.protocol import Scores
from .samples import Sampled


def _kl(parts: MetricInputs) -> Tensor:
    """Also of tied pairs, which have weight 0: they are samples like others."""
    if parts.reference is None:
        return parts.losses.new_zeros(2)
    of_pairs = [getattr(parts.policy, side) - getattr(parts.reference, side) for side in ("chosen", "rejected")]
    sampled = _sampled(parts)
    return torch.stack([(sum(of_pairs) * sampled).sum(), 2 * sampled.sum()])


def _entropy(parts: MetricInputs) -> Tensor:
    assert parts.policy.tokens is not None
    entropy = parts.policy.tokens.entropy
    assert entropy is not None
    in_pairs = entropy.new_zeros(len(parts.batch.lengths))
    for side in ("chosen", "rejected"):
        in_pairs = in_pairs.index_add(0, getattr(parts.batch, side), _sampled(parts))
    weight = (in_pairs > 0)[parts.batch.completion].float()
    return torch.stack([(entropy * weight).sum(), weight.sum()])


def _sampled(parts: MetricInputs) -> Tensor:
    """[N] 0 for a pair that only fills its batch."""
    return (parts.batch.example_ids != PADDING_ROW_ID).float()


ONLINE_METRICS: dict[str, Metric] = METRICS | {"objective/kl": _kl, "objective/entropy": _entropy}

TALLIED = (
    "objective/scores",
    "objective/scores_margin",
    "val/contain_eos_token",
    "completions/length",
    "tie_rate",
    "failed_rate",
    "staleness",
    "win_rate",
    "scores/reference",
)


class Tally:
    """Sums and counts since the last log line, on the host; one collective when they are read.

    Args:
        names: the same on all ranks.
    """

    def __init__(self, names: Iterable[str]):
        self.sums = {name: [0.0, 0.0] for name in names}

    def add(self, name: str, values: Sequence[float | None]) -> None:
        """None counts for nothing."""
        known = [value for value in values if value is not None]
        self.sums[name][0] += sum(known)
        self.sums[name][1] += len(known)

    def count(self, samples: Sequence[Sampled], scores: Scores) -> None:
        """What can be said of samples and their scores alone."""
        answers = [answer for sampled in samples for answer in sampled.completions]
        self.add("objective/scores", [score for row in scores for score in row])
        self.add("objective/scores_margin", [_spread(row) for row in scores])
        self.add("val/contain_eos_token", [float(answer.finished) for answer in answers])
        self.add("completions/length", [float(len(answer.ids)) for answer in answers])

    def clear(self) -> None:
        self.sums = {name: [0.0, 0.0] for name in self.sums}

    def table(self, sum_over_ranks: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, list[float]]:
        """The sums of all ranks. Every rank must call."""
        rows = torch.tensor(list(self.sums.values()), dtype=widest_float(device), device=device)
        return dict(zip(self.sums, sum_over_ranks(rows).tolist(), strict=True))

    def load(self, table: dict[str, list[float]]) -> None:
        """For one rank: the sums are those of all."""
        self.sums |= {name: list(row) for name, row in table.items() if name in self.sums}


def _spread(scores: Sequence[float | None]) -> float | None:
    """Best minus worst."""
    known = [score for score in scores if score is not None]
    return max(known) - min(known) if len(known) > 1 else None


def means(table: dict[str, list[float]]) -> dict[str, float]:
    return {name: total / count for name, (total, count) in table.items() if count}


def objective_means(means: dict[str, float], beta: float) -> dict[str, float]:
    """objective/non_score_reward = -beta KL, and the sum with the score: what RLHF maximises."""
    if "objective/kl" not in means:
        return means
    non_score = -beta * means["objective/kl"]
    more = {"objective/non_score_reward": non_score}
    if "objective/scores" in means:
        more["objective/rlhf_reward"] = means["objective/scores"] + non_score
    return means | more
