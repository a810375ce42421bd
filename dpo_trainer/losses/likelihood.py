"""Losses that need no reference: the likelihood of the chosen completion, and comparisons of plain log-probs.

In every equation log p is the policy's log-prob summed over a completion, nats; |y| its scored tokens; b = beta,
s = sigmoid. Each returns one loss per pair, [N].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import PairLogps
from .registry import register_loss


def chosen_nll(policy: PairLogps, *, normalization: str, weight: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of the chosen completions, [N] nats per token.

    `sequence`: each completion's own mean per token. `token`: the mean over all chosen tokens of the micro-batch. Pair
    i then gets -log p(y_i) divided by the mean length, so that the (weighted) mean over pairs is the token mean;
    this couples the micro-batch, and splitting it otherwise changes the loss.
    Either way it is a mean over pairs: a completion that is chosen in several counts in each of them.
    """
    if normalization == "sequence":
        return -policy.mean_chosen()
    weight = torch.ones_like(policy.chosen) if weight is None else weight
    # All weights are 0 in a micro-batch of fillers: the length is then anything but 0.
    mean_length = (weight * policy.chosen_lengths).sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
    return -policy.chosen / torch.where(mean_length > 0, mean_length, 1)


@register_loss("sft", needs_reference=False, takes_ld=False)
def sft(
    policy: PairLogps,
    reference: PairLogps,
    *,
    rpo_normalization: str = "sequence",
    weight: Tensor | None = None,
) -> Tensor:
    """Supervised fine-tuning on the chosen completion; rejected is not used.

        L = -log p(y_w) / |y_w|

    With `rpo_normalization="token"` all chosen tokens of the micro-batch count alike: L = -log p(y_w) / mean |y_w|.

    Source: the NLL term of Pang et al. 2024 (RPO), arXiv:2404.19733, and of Wang et al. 2024 (MPO),
    arXiv:2411.10442, which both take the mean per completion; TRL's `sft` takes the token mean.
    """
    return chosen_nll(policy, normalization=rpo_normalization, weight=weight)


@register_loss("simpo", needs_reference=False)
def simpo(policy: PairLogps, reference: PairLogps, *, beta: float, simpo_gamma: float = 0.5) -> Tensor:
    """SimPO: the reward is the mean log-prob per token, and chosen must win by a margin.

        L = -log s(b log p(y_w) / |y_w| - b log p(y_l) / |y_l| - gamma)

    beta acts on nats per token: the paper takes 2 to 10. gamma is `simpo_gamma`, in units of the reward.

    Source: Meng et al. 2024, arXiv:2405.14734, Eq. 6.
    """
    return -F.logsigmoid(beta * (policy.mean_chosen() - policy.mean_rejected()) - simpo_gamma)


@register_loss("orpo", needs_reference=False, takes_ld=False)
def orpo(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """ORPO: fine-tuning on chosen, plus a term for the odds of chosen against rejected.

        L = -log P(y_w) - b log s(log odds(y_w) - log odds(y_l)),    odds = P / (1 - P),  log P(y) = log p(y) / |y|

    beta is the paper's lambda.

    Source: Hong et al. 2024, arXiv:2403.07691, Eq. 6.
    """
    chosen, rejected = policy.mean_chosen(), policy.mean_rejected()
    return -chosen - beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logp: Tensor) -> Tensor:
    """log(P / (1 - P)) from log P. P = 1 has infinite odds: it counts as one rounding step below."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    return logp - (-logp.expm1()).log()


@register_loss("cpo", needs_reference=False, takes_ld=False)
def cpo(policy: PairLogps, reference: PairLogps, *, beta: float, cpo_alpha: float = 1.0) -> Tensor:
    """Contrastive preference optimisation: DPO against a uniform reference, plus fine-tuning on chosen.

        L = -log s(b (log p(y_w) - log p(y_l))) - alpha log p(y_w) / |y_w|

    alpha is `cpo_alpha`.

    Source: Xu et al. 2024, arXiv:2401.08417. The paper writes the second term as a sum over the completion;
    as in its authors' code it is a mean per token here, on one scale with the first.
    """
    return -F.logsigmoid(beta * policy.margin()) - cpo_alpha * policy.mean_chosen()
