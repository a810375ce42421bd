"""The objective of a run: every chosen loss with its weight and hyperparameters, and what shapes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..distributed.ranks import Ranks
from ..types import PairLogps, without_autocast
from .batchwise import RunningShift
from .likelihood import chosen_nll
from .registry import LOSSES, Loss, hyperparameters
from .shaping import Divergence, divergence_by_name, length_desensitized, log_ratios, reverse_kl, wpo_weight

Plain = int | float | str | None
"""Options of an objective, apart from its parts."""


@dataclass(frozen=True, kw_only=True)
class PairLosses:
    """What the objective makes of N pairs."""

    total: Tensor  # [N] float32, to be averaged over pairs by their weight
    nll: Tensor | None = None  # [N] nats per token of the chosen completion, where the objective has an NLL term


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss of the mixture."""

    loss: Loss
    weight: float
    hyperparameters: dict[str, Any]


@dataclass(kw_only=True)
class Objective:
    """Policy and reference log-probs -> one loss per pair.

        total = wpo * sum_k weight_k loss_k(policy', reference') + rpo_alpha * NLL(policy) + router_weight * aux_loss

    policy', reference' are shaped by LD-DPO where `ld_alpha` is set; wpo is 1 without `use_weighting`.
    """

    terms: list[Term]
    beta: float
    reference_free: bool = False
    ld_alpha: float | None = None
    use_weighting: bool = False
    wpo_clamp: bool = False
    rpo_alpha: float | None = None
    rpo_normalization: str = "sequence"
    router_weight: float = 0.0
    divergence: Divergence = reverse_kl
    ranks: Ranks = field(default_factory=Ranks)
    shift: RunningShift = field(default_factory=RunningShift)

    @classmethod
    def from_config(cls, args: Any) -> Objective:
        """From a checked `DPOConfig`: hyperparameters are its fields of the same name."""
        losses = [LOSSES[name] for name in args.loss_type]
        weights = args.loss_weights or [1.0] * len(losses)
        return cls(
            terms=[
                Term(loss=loss, weight=weight, hyperparameters=hyperparameters(loss, args))
                for loss, weight in zip(losses, weights, strict=True)
            ],
            beta=args.beta,
            reference_free=args.reference_free,
            ld_alpha=args.ld_alpha,
            use_weighting=args.use_weighting,
            wpo_clamp=args.wpo_clamp,
            rpo_alpha=args.rpo_alpha,
            rpo_normalization=args.rpo_normalization,
            divergence=divergence_by_name(args.f_divergence_type, args.f_alpha_divergence_coef),
        )

    def set_beta(self, beta: float) -> None:
        """Go on with another beta, in every loss that has one."""
        self.beta = beta
        for term in self.terms:
            if "beta" in term.hyperparameters:
                term.hyperparameters["beta"] = beta

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free and any(term.loss.needs_reference for term in self.terms)

    @property
    def needs_reference_tokens(self) -> bool:
        """Whether the reference must supply log-probs per token, and not only their sums."""
        return self.needs_reference and self.ld_alpha is not None

    @property
    def needs_margin(self) -> bool:
        """Whether every pair must say by how much chosen is better."""
        return any(term.loss.needs_margin for term in self.terms)

    def unusable_margin(self, margin: float | None) -> str | None:
        """Why a pair with this margin cannot be trained on, and the way out; None where it can.

        For the preparation of data: called once per pair, on the host. In a step nothing is asked, for that would wait
        for the device; a margin that slips through gives a loss of NaN, which stops the run before the weights move.
        """
        for term in self.terms:
            if margin is None or math.isnan(margin):
                if term.loss.needs_margin:
                    return needs_one(term.loss)
            elif why := term.loss.unusable_margin(margin, **term.hyperparameters):
                return f"--loss_type {term.loss.name}: {why}"
        return None

    @property
    def token_stats(self) -> frozenset[str]:
        """Fields of the policy's `TokenLogps` that the log-probs must fill in beyond the log-probs themselves."""
        return frozenset({"log_sum_sq"}) if self.use_weighting else frozenset()

    @property
    def has_nll(self) -> bool:
        return bool(self.rpo_alpha) or self._takes("rpo_normalization")

    @property
    def gathers_pairs(self) -> bool:
        """Whether a loss looks at the pairs of all ranks."""
        return self._takes("ranks")

    @property
    def separable(self) -> bool:
        """Whether the mean over a batch is the same however the batch is split."""
        return self.couples is None

    @property
    def couples(self) -> str | None:
        """The options that make the loss of a pair depend on the others of its batch; None where nothing does."""
        coupled = [term.loss for term in self.terms if not term.loss.separable or "delta" in term.loss.arguments]
        names = [f"--loss_type {loss.name}" for loss in coupled]
        if self.has_nll and self.rpo_normalization == "token":
            names.append("--rpo_normalization token")
        return " with ".join(names) or None

    def __call__(
        self,
        policy: PairLogps,
        reference: PairLogps | None,
        *,
        training: bool,
        weight: Tensor | None = None,
        margin: Tensor | None = None,
        pairs_by_rank: Sequence[int] | None = None,
    ) -> PairLosses:
        """`reference` None counts as zeros. `weight` [N]: pairs of weight 0 do not touch the losses of the others.

        `margin` [N] as the data gave it, NaN for a pair without; None where no pair of the batch has one.
        `pairs_by_rank`: N of every rank, where it is known: losses that gather pairs then wait for nothing.
        """
        with without_autocast(policy.chosen):
            ranks = self.ranks.knowing(pairs_by_rank)
            return self._losses(policy, reference, training=training, weight=weight, margin=margin, ranks=ranks)

    def _losses(
        self,
        policy: PairLogps,
        reference: PairLogps | None,
        *,
        training: bool,
        weight: Tensor | None,
        margin: Tensor | None,
        ranks: Ranks,
    ) -> PairLosses:
        weight = torch.ones_like(policy.chosen) if weight is None else weight
        shaped, shaped_reference = self._shape(policy, reference)
        supplied = {"divergence": self.divergence, "weight": weight, "ranks": ranks}
        if margin is not None:
            supplied["margin"] = margin
        if self._takes("delta"):
            supplied["delta"] = self._delta(shaped, shaped_reference, weight, training)

        total = self._mixture(shaped, shaped_reference, supplied)
        if self.use_weighting:
            total = total * wpo_weight(policy, clamp=self.wpo_clamp)
        nll = chosen_nll(policy, normalization=self.rpo_normalization, weight=weight) if self.has_nll else None
        if nll is not None and self.rpo_alpha:
            total = total + self.rpo_alpha * nll
        if policy.aux_loss is not None:
            total = total + self.router_weight * policy.aux_loss
        return PairLosses(total=total, nll=nll)

    def _shape(self, policy: PairLogps, reference: PairLogps | None) -> tuple[PairLogps, PairLogps]:
        if reference is None or self.reference_free:
            reference = zero_logps(policy)
        elif self.ld_alpha is not None and self.needs_reference:
            reference = length_desensitized(reference, self.ld_alpha)
        return (policy if self.ld_alpha is None else length_desensitized(policy, self.ld_alpha)), reference

    def _mixture(self, policy: PairLogps, reference: PairLogps, supplied: dict[str, Any]) -> Tensor:
        total = torch.zeros_like(policy.chosen)
        for term in self.terms:
            if term.loss.needs_margin and "margin" not in supplied:
                raise ValueError(f"The batch has no margins, and {needs_one(term.loss)}")
            wanted = {name: value for name, value in supplied.items() if name in term.loss.arguments}
            losses = term.loss(policy, reference, **term.hyperparameters, **wanted)
            if losses.shape != total.shape:
                raise ValueError(
                    f"Loss {term.loss.name!r} returned shape {tuple(losses.shape)} for {len(total)} pairs: return one "
                    "value per pair and leave the mean to the trainer."
                )
            total = total + term.weight * losses
        return total

    def _delta(self, policy: PairLogps, reference: PairLogps, weight: Tensor, training: bool) -> Tensor:
        if training:
            chosen, rejected = log_ratios(policy, reference)
            rewards = self.beta * (chosen + rejected).detach() / 2
            self.shift.update(rewards, weight, self.ranks)
        return self.shift.to(policy.chosen.device).mean

    def _takes(self, argument: str) -> bool:
        return any(argument in term.loss.arguments for term in self.terms)

    def description(self) -> dict[str, Any]:
        """All that decides the loss of a pair, as JSON takes it: two runs with the same description have the same objective."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Plain)}
        divergence = self.divergence
        name, options = (
            (divergence.func.__name__, divergence.keywords)
            if isinstance(divergence, partial)
            else (divergence.__name__, {})
        )
        return plain | {
            "losses": [
                [term.loss.name, term.weight, {k: v for k, v in term.hyperparameters.items() if k not in plain}]
                for term in self.terms
            ],
            "divergence": [name, options],
        }

    def state_dict(self) -> dict[str, Any]:
        """What training changes, as JSON takes it: part of the checkpoint."""
        return {"delta": self.shift.state_dict()} if self._takes("delta") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._takes("delta") != ("delta" in state):
            raise ValueError(
                "The checkpoint was written with another --loss_type: it has "
                f"{'a' if 'delta' in state else 'no'} running reward shift, and this run's losses "
                f"({', '.join(term.loss.name for term in self.terms)}) need {'one' if self._takes('delta') else 'none'}. "
                "Resume with the losses of the checkpoint, or start a new run from its model."
            )
        if "delta" in state:
            self.shift.load_state_dict(state["delta"])


def needs_one(loss: Loss) -> str:
    return (
        f"--loss_type {loss.name} needs to know of every pair by how much chosen is better: give the data a column "
        "'margin', or scores, or choose another loss."
    )


def zero_logps(policy: PairLogps) -> PairLogps:
    """The reference that is none: every log-prob 0."""
    return PairLogps(
        chosen=torch.zeros_like(policy.chosen),
        rejected=torch.zeros_like(policy.rejected),
        chosen_lengths=policy.chosen_lengths,
        rejected_lengths=policy.rejected_lengths,
    )
