"""Losses of the margin of a pair: how much more the policy moved towards chosen than towards rejected.

In every equation
    r_w, r_l = log policy / reference of chosen and rejected, nats, summed over the completion
    D = score(r_w) - score(r_l), r_w - r_l for the reverse KL divergence (shaping.py)
    b = beta, e = label_smoothing, s = sigmoid
Each returns one loss per pair, [N].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import PairLogps
from .registry import register_loss
from .shaping import EXPONENT_LIMIT, Divergence, log_ratios, reverse_kl


def gained_margin(policy: PairLogps, reference: PairLogps, divergence: Divergence) -> Tensor:
    """D, [N]."""
    chosen, rejected = log_ratios(policy, reference)
    return divergence(chosen) - divergence(rejected)


def smoothed_logistic(h: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - e) log s(h) - e log s(-h): cross-entropy of a preference that is flipped with probability e."""
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


@register_loss("sigmoid")
def sigmoid(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: Divergence = reverse_kl,
) -> Tensor:
    """DPO: logistic regression on the margin. With label smoothing, conservative DPO (cDPO).

        L = -(1 - e) log s(b D) - e log s(-b D)

    log 2 when policy and reference agree; with e > 0 least at b D = log((1 - e) / e).

    Source: Rafailov et al. 2023, arXiv:2305.18290, Eq. 7; cDPO: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    return smoothed_logistic(beta * gained_margin(policy, reference, divergence), label_smoothing)


def unusable_margin(margin: float, *, odpo_offset: str = "log", **_: object) -> str | None:
    """Why `odpo` has no offset for a pair of this margin."""
    if odpo_offset == "linear" or margin > 0:
        return None
    return (
        f"the margin {margin:g} has no logarithm: it says by how much chosen is better, so it must be above 0. Drop such "
        "pairs, or take --odpo_offset linear."
    )


@register_loss("odpo", unusable_margin=unusable_margin)
def odpo(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    margin: Tensor,
    odpo_alpha: float = 1.0,
    odpo_offset: str = "log",
    divergence: Divergence = reverse_kl,
) -> Tensor:
    """DPO with an offset: the clearer the preference, the larger the margin that is asked for.

        L = -log s(b D - alpha f(m)),    m = score(y_w) - score(y_l),  f(m) = log m

    m is the column `margin`, in the unit of the judge; alpha is `odpo_alpha`, and f(m) = m with
    `odpo_offset="linear"`. A margin of 1 is plain DPO under the logarithm, a smaller one asks for less. NaN for a pair
    whose m has no f.

    Source: Amini et al. 2024, arXiv:2402.10571, which leaves f open and takes the logarithm and alpha = 1 in its
    experiments.
    """
    # Written out: the logarithm of 0 would make a finite loss of an infinite offset.
    scaled = torch.where(margin > 0, margin, torch.nan).log() if odpo_offset == "log" else margin
    return -F.logsigmoid(beta * gained_margin(policy, reference, divergence) - odpo_alpha * scaled)


@register_loss("hinge")
def hinge(policy: PairLogps, reference: PairLogps, *, beta: float, divergence: Divergence = reverse_kl) -> Tensor:
    """SLiC's hinge on DPO's margin: nothing is gained beyond b D = 1.

        L = max(0, 1 - b D)

    Source: Zhao et al. 2023, arXiv:2305.10425; on this margin: Liu et al. 2023, arXiv:2309.06657.
    """
    return (1 - beta * gained_margin(policy, reference, divergence)).relu()


@register_loss("ipo")
def ipo(policy: PairLogps, reference: PairLogps, *, beta: float, ipo_normalization: str = "token") -> Tensor:
    """Identity preference optimisation: pull the margin to a fixed target, not to infinity.

        L = (h - 1 / (2 b))^2,    h = r_w / |y_w| - r_l / |y_l|

    h is in nats per token, or in nats with `ipo_normalization="sequence"`: h = r_w - r_l. beta is the paper's tau.

    Source: Azar et al. 2023, arXiv:2310.12036, Eq. 17. The equation has the sums; the mean per token is the default
    because its authors use it, and without it long pairs dominate the square.
    """
    h = per_token_margin(policy, reference) if ipo_normalization == "token" else policy.margin() - reference.margin()
    return (h - 1 / (2 * beta)).square()


@register_loss("sigmoid_norm")
def sigmoid_norm(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Length-normalised DPO: the margin per token.

        L = -log s(b (r_w / |y_w| - r_l / |y_l|))

    beta acts on nats per token, so useful values are larger than for `sigmoid` (the paper: 5).

    Source: Lambert et al. 2024 (Tulu 3), arXiv:2411.15124.
    """
    return -F.logsigmoid(beta * per_token_margin(policy, reference))


def per_token_margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    """r_w / |y_w| - r_l / |y_l|, [N] nats per token."""
    chosen, rejected = log_ratios(policy, reference)
    return chosen / policy.chosen_lengths - rejected / policy.rejected_lengths


@register_loss("exo_pair")
def exo_pair(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    label_smoothing: float,
    divergence: Divergence = reverse_kl,
) -> Tensor:
    """EXO: reverse KL between the policy's preference and the smoothed label, where DPO has the forward KL.

        L = s(b D) (log s(b D) - log(1 - e)) + s(-b D) (log s(-b D) - log e)

    Zero at b D = log((1 - e) / e). Needs e > 0; the paper takes 1e-3.

    Source: Ji et al. 2024, arXiv:2402.00856, Eq. 16.
    """
    h = beta * gained_margin(policy, reference, divergence)
    toward = h.sigmoid() * (F.logsigmoid(h) - math.log1p(-label_smoothing))
    return toward + (-h).sigmoid() * (F.logsigmoid(-h) - math.log(label_smoothing))


@register_loss("robust")
def robust(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    divergence: Divergence = reverse_kl,
) -> Tensor:
    """Robust DPO: an unbiased estimate of DPO's loss when a share e of the labels is flipped.

        L = (-(1 - e) log s(b D) + e log s(-b D)) / (1 - 2 e)

    e < 1/2; at e = 0 it is `sigmoid`. The loss has no lower bound where e > 0.

    Source: Chowdhury et al. 2024, arXiv:2403.00409.
    """
    h = beta * gained_margin(policy, reference, divergence)
    e = label_smoothing
    return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)


@register_loss("discopop")
def discopop(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    discopop_tau: float = 0.05,
    divergence: Divergence = reverse_kl,
) -> Tensor:
    """DiscoPOP: a blend of logistic and exponential loss that a language model discovered.

        L = (1 - m) (-log s(b D)) + m e^(-b D),    m = s(b D / tau)

    tau is `discopop_tau`. Neither convex nor monotone: at tau = 0.05 the loss rises between b D = -0.12 and 0.07, so
    that it has a local minimum just below 0.

    Source: Lu et al. 2024, arXiv:2406.08414, Eq. 5.
    """
    h = beta * gained_margin(policy, reference, divergence)
    logistic = -F.logsigmoid(h) * (-h / discopop_tau).sigmoid()
    # m e^-h as one exponential: e^-h alone overflows where m vanishes.
    exponent = F.logsigmoid(h / discopop_tau) - h
    return logistic + exponent.clamp(max=EXPONENT_LIMIT).exp()


@register_loss("dpop")
def dpop(policy: PairLogps, reference: PairLogps, *, beta: float, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive: DPO whose margin pays for a chosen completion that falls below the reference.

        L = -log s(b (r_w - r_l - lambda max(0, -r_w)))

    Source: Pal et al. 2024 (Smaug), arXiv:2402.13228.
    """
    chosen, rejected = log_ratios(policy, reference)
    return -F.logsigmoid(beta * (chosen - rejected - dpop_lambda * (-chosen).relu()))


@register_loss("chi_po")
def chi_po(
    policy: PairLogps, reference: PairLogps, *, beta: float, chi_po_reward_bound: float | None = None
) -> Tensor:
    """Chi-squared preference optimisation: the link z + log z of the probability ratio z instead of DPO's log z.

        L = -log s(clip(b (phi(r_w) - phi(r_l)), -2 R, 2 R)),    phi(r) = e^r + r

    Pessimistic about what the data do not cover: a ratio far above 1 costs linearly, not logarithmically.
    R is `chi_po_reward_bound`, the largest reward that is believed possible; None does not clip. The exponent is
    limited to 20, so that it stays finite; the log term keeps its gradient there.

    Source: Huang et al. 2024, arXiv:2407.13399, Algorithm 1.
    """
    chosen, rejected = (r.clamp(max=EXPONENT_LIMIT).exp() + r for r in log_ratios(policy, reference))
    h = beta * (chosen - rejected)
    if chi_po_reward_bound is not None:
        h = torch.clamp(h, -2 * chi_po_reward_bound, 2 * chi_po_reward_bound)
    return -F.logsigmoid(h)
