"""What happens to log-probs before a loss sees them, or to a loss afterwards: f-divergences, LD-DPO, WPO.

N pairs   M scored tokens   r log-ratio policy / reference of a completion, nats
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import PairLogps, TokenLogps

Divergence = Callable[[Tensor], Tensor]
"""The score f'(e^r) of a log-ratio, up to a constant: the margin of a pair is score(r_chosen) - score(r_rejected)."""

EXPONENT_LIMIT = 20.0
"""Nats beyond which e^x is continued by its tangent: float32 overflows at 88, and gradient norms square the value."""


def log_ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """Policy minus reference of chosen and of rejected, [N] nats each."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected


def safe_exp(x: Tensor) -> Tensor:
    """e^x up to x = 20, the tangent beyond: finite, increasing, and with a gradient everywhere."""
    return x.clamp(max=EXPONENT_LIMIT).exp() * (1 + (x - EXPONENT_LIMIT).relu())


def reverse_kl(r: Tensor) -> Tensor:
    return r


def forward_kl(r: Tensor) -> Tensor:
    return 1 - safe_exp(-r)


def js_divergence(r: Tensor) -> Tensor:
    return math.log(2) + F.logsigmoid(r)


def alpha_divergence(r: Tensor, alpha: float) -> Tensor:
    return (1 - safe_exp(-alpha * r)) / alpha


def divergence_by_name(name: str, alpha: float) -> Divergence:
    """The scores of f-DPO.

        reverse_kl: r    forward_kl: 1 - e^-r    js_divergence: log 2 + log sigmoid(r)
        alpha_divergence: (1 - e^(-alpha r)) / alpha

    Source: Wang et al. 2023, arXiv:2309.16240. `alpha` is one minus the paper's, as in TRL: 0.5 is both.
    """
    scores: dict[str, Divergence] = {
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "js_divergence": js_divergence,
        "alpha_divergence": partial(alpha_divergence, alpha=alpha),
    }
    return scores[name]


def wpo_weight(policy: PairLogps, *, clamp: bool) -> Tensor:
    """How readily the policy itself would write a pair, [N], without gradient.

        weight = w(chosen) w(rejected),   w(y) = exp(mean over tokens of (log p(y_t) - log sum_v p(v)^2))

    `clamp` limits the product to 1; without it a pair that is likelier than a sampled one counts more than once.
    Source: Zhou et al. 2024, arXiv:2406.11827 (its sampled alignment).
    """
    tokens = needed_tokens(policy, "--use_weighting")
    if tokens.log_sum_sq is None:
        raise ValueError(
            "--use_weighting needs log_sum_sq for each token: ask the log-probs for `Objective.token_stats`."
        )
    mean = tokens.sum_by_completion((tokens.logps - tokens.log_sum_sq).detach()) / tokens.lengths
    log_weight = mean[tokens.chosen] + mean[tokens.rejected]
    return safe_exp(log_weight.clamp(max=0) if clamp else log_weight)


def length_desensitized(logps: PairLogps, alpha: float) -> PairLogps:
    """LD-DPO: what a completion has beyond the length of the shorter one of its pair counts `alpha` of the rest.

        log p'(y) = sum_{t < l} log p(y_t) + alpha sum_{t >= l} log p(y_t),   l = min(|y_chosen|, |y_rejected|)

    Lengths stay the true ones. Several pairs may share a completion: each has its own l.
    Source: Liu et al. 2024, arXiv:2409.06411.
    """
    tokens = needed_tokens(logps, "--ld_alpha")
    shared = torch.minimum(logps.chosen_lengths, logps.rejected_lengths)

    def shaped(completions: Tensor) -> Tensor:
        weight_NM = torch.where(tokens.position < shared[:, None], 1.0, alpha)
        mine_NM = tokens.completion == completions[:, None]
        # Not a matrix product: autocast or TF32 would round it.
        return torch.where(mine_NM, weight_NM * tokens.logps, 0).sum(1)

    return dataclasses.replace(logps, chosen=shaped(tokens.chosen), rejected=shaped(tokens.rejected))


def needed_tokens(logps: PairLogps, flag: str) -> TokenLogps:
    if logps.tokens is None:
        raise ValueError(f"{flag} needs log-probs per token, and only their sums are here (a cached reference?).")
    return logps.tokens
