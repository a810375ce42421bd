"""Losses that anchor chosen and rejected separately, so that both log-ratios have a place to be.

In every equation r_w, r_l = log policy / reference of chosen and rejected, nats, summed over the completion;
b = beta, s = sigmoid. Each returns one loss per pair, [N].
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..types import PairLogps
from .registry import register_loss
from .shaping import log_ratios


@register_loss("nca_pair")
def nca_pair(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Noise contrastive alignment: raise chosen while both completions also count as noise.

        L = -log s(b r_w) - 1/2 log s(-b r_w) - 1/2 log s(-b r_l)

    Given r_l, least at b r_w = log 2.

    Source: Chen et al. 2024, arXiv:2402.05369.
    """
    chosen, rejected = (beta * r for r in log_ratios(policy, reference))
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@register_loss("sppo_hard")
def sppo_hard(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Self-play preference optimisation with certain preferences: each log-ratio has its own target.

        L = (r_w - 1 / (2 b))^2 + (r_l + 1 / (2 b))^2

    In nats squared: with a small beta the first values are large (50 at b = 0.1).

    Source: Wu et al. 2024, arXiv:2405.00675, Eq. 4.7, with the win probability 1 for chosen and 0 for rejected;
    1 / b is its eta.
    """
    chosen, rejected = log_ratios(policy, reference)
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


@register_loss("apo_zero")
def apo_zero(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Anchored preference optimisation for chosen completions that are better than the model's own.

        L = 1 - s(b r_w) + s(b r_l)

    Pushes chosen above the reference and rejected below it. Bounded: between 0 and 2.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 7.
    """
    chosen, rejected = log_ratios(policy, reference)
    return 1 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid()


@register_loss("apo_down")
def apo_down(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Anchored preference optimisation for a model that is better than the chosen completions.

        L = s(b r_w) + 1 - s(b (r_w - r_l))

    Pushes chosen below the reference, and rejected further down. Bounded: between 0 and 2.

    Source: D'Oosterlinck et al. 2024, arXiv:2408.06266, Eq. 8.
    """
    chosen, rejected = log_ratios(policy, reference)
    return (beta * chosen).sigmoid() + 1 - (beta * (chosen - rejected)).sigmoid()


@register_loss("cal_dpo")
def cal_dpo(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Calibrated DPO: DPO's comparison, plus squares that give the log-ratios the scale of real rewards.

        L = -log s(r_w - r_l) + (r_w - 1 / (2 b))^2 + (r_l + 1 / (2 b))^2

    beta only sets the targets; the comparison is not scaled by it.

    Source: Xiao et al. 2024, arXiv:2412.14516, with rewards of +-1/2.
    """
    return sppo_hard(policy, reference, beta=beta) - F.logsigmoid(policy.margin() - reference.margin())
