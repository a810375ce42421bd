"""Losses that couple the pairs of a batch: over all ranks, and not the same when a batch is split otherwise.

Pairs of weight 0 only fill an uneven batch: they take no part, and their loss is 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..distributed.ranks import ALL_RANKS, Ranks
from ..types import PairLogps
from .margin import smoothed_logistic
from .registry import register_loss
from .shaping import log_ratios


@register_loss("aot", separable=False)
def aot(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ranks: Ranks = ALL_RANKS,
) -> Tensor:
    """Alignment via optimal transport: the sorted margins of the policy beat the sorted margins of the reference.

        L_i = -log s(b (u_(i) - v_(i))),    u = log p(y_w) - log p(y_l),  v the same of the reference

    u_(i) and v_(i) are the i-th smallest of the batch, over all ranks. Returns for each pair the term of its u;
    label smoothing as in `sigmoid`.

    Source: Melnyk et al. 2024, arXiv:2406.05882, paired case, logistic loss.
    """
    u, counts = policy.margin(), counted(policy, weight)
    gathered, first = ranks.gather_pairs(torch.stack([u, reference.margin()], 1).where(counts[:, None], torch.inf))
    v = opposite(gathered[:, 0], gathered[:, 1], first, len(u)).where(counts, u.detach())
    return smoothed_logistic(beta * (u - v), label_smoothing).where(counts, 0)


@register_loss("aot_unpaired", separable=False, aliases=("aot_pair",))
def aot_unpaired(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    weight: Tensor | None = None,
    ranks: Ranks = ALL_RANKS,
) -> Tensor:
    """Alignment via optimal transport without pairs: the sorted chosen rewards beat the sorted rejected ones.

        L_i = -log s(b (r_w(i) - r_l(i))),    r_w(i), r_l(i) = the i-th smallest log-ratio of the batch

    over all ranks. A term joins the chosen of one pair and the rejected of another, perhaps on another rank: each of the
    two pairs returns half of its value, and the whole gradient of its own completion. Sums over the batch and
    their gradients are those of the equation. Label smoothing as in `sigmoid`.

    Source: Melnyk et al. 2024, arXiv:2406.05882, unpaired case, logistic loss.
    """
    counts = counted(policy, weight)
    chosen, rejected = log_ratios(policy, reference)
    gathered, first = ranks.gather_pairs(torch.stack([chosen, rejected], 1).where(counts[:, None], torch.inf))
    all_chosen, all_rejected = gathered.unbind(1)
    below_chosen = opposite(all_chosen, all_rejected, first, len(chosen)).where(counts, chosen.detach())
    above_rejected = opposite(all_rejected, all_chosen, first, len(chosen)).where(counts, rejected.detach())
    terms = smoothed_logistic(beta * (chosen - below_chosen), label_smoothing)
    terms = terms + smoothed_logistic(beta * (above_rejected - rejected), label_smoothing)
    return (terms - terms.detach() / 2).where(counts, 0)


def counted(policy: PairLogps, weight: Tensor | None) -> Tensor:
    """[N] True for the pairs that are not mere fillers."""
    return torch.ones_like(policy.chosen, dtype=torch.bool) if weight is None else weight > 0


def opposite(values: Tensor, others: Tensor, first: int, n: int) -> Tensor:
    """For each of `values[first : first + n]`: the value of `others` at its place when both are sorted, [n].

    Fillers are +inf in both, so they sort behind everything that counts.
    """
    place = values.argsort(stable=True).argsort(stable=True)
    return others.sort().values[place[first : first + n]]


@register_loss("bco_pair", separable=False)
def bco_pair(policy: PairLogps, reference: PairLogps, *, beta: float, delta: Tensor | float) -> Tensor:
    """Binary classifier optimisation: tell chosen from rejected by a reward above or below a running threshold.

        L = -log s(b r_w - delta) - log s(-(b r_l - delta))

    r_w, r_l are log-ratios in nats, summed over the completion; delta is the mean reward (b r_w + b r_l) / 2 of all pairs
    trained on so far, this batch included, over all ranks and without gradient (`RunningShift`).

    Source: Jung et al. 2024, arXiv:2404.04656 (its reward shift; TRL leaves delta out). Every pair seen counts alike.
    """
    chosen, rejected = log_ratios(policy, reference)
    return -F.logsigmoid(beta * chosen - delta) - F.logsigmoid(delta - beta * rejected)


class RunningShift:
    """The delta of `bco_pair`: running mean over pairs of their mean reward. 0 before the first training batch."""

    def __init__(self) -> None:
        self.mean = torch.zeros(())
        self.count = torch.zeros(())

    def update(self, rewards: Tensor, weight: Tensor, ranks: Ranks) -> None:
        """`rewards` [N] and `weight` [N] of this rank's pairs. Nothing is copied to the host."""
        self.to(rewards.device)
        local = torch.stack([(weight * rewards).sum(), weight.sum()]).float()
        total, count = torch.stack(ranks.exchange(local)).sum(0)
        self.count = self.count + count
        # As an increment: sums over a whole run would lose digits in float32.
        self.mean = self.mean + (total - count * self.mean) / self.count.clamp(min=torch.finfo(torch.float32).tiny)

    def mark(self) -> tuple[Tensor, Tensor]:
        """What `back_to` returns to; an update makes new tensors and leaves these alone."""
        return self.mean, self.count

    def back_to(self, mark: tuple[Tensor, Tensor]) -> None:
        """Forget the pairs of a step that was not made."""
        self.mean, self.count = mark

    def to(self, device: torch.device) -> RunningShift:
        self.mean, self.count = (value.to(device, non_blocking=True) for value in (self.mean, self.count))
        return self

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean.item(), "count": self.count.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.mean, self.count = torch.tensor(state["mean"]), torch.tensor(state["count"])
