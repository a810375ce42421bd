"""The table of metrics: sums and counts on the device, one reduction per log line.

    rewards/*  beta * (log-prob under the policy - under the reference), nats * beta      logps/*  nats per completion
    entropy    nats per completion token                                                 logits/* mean logit per token

Rewards and log-probs are of whole completions: `--ld_alpha` shapes the loss alone. Means of pairs are over pairs, means of
tokens over tokens, on all ranks, since the last line; rows that only fill an uneven batch do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction
from transformers.utils import logging

from .types import PairBatch, PairLogps, widest_float, without_autocast

logger = logging.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class MetricInputs:
    """What one micro-batch knows; every metric is a sum and a count over it."""

    batch: PairBatch
    policy: PairLogps
    reference: PairLogps | None
    losses: Tensor  # [N], all terms
    beta: float

    @property
    def counted(self) -> Tensor:
        """[N] 1 for a real pair, 0 for one that only fills the batch."""
        return (self.batch.weight > 0).float()

    def of_pairs(self, values: Tensor, weight: Tensor | None = None) -> Tensor:
        """[N] -> (sum, count)."""
        weight = self.counted if weight is None else weight
        return torch.stack([(values.float() * weight).sum(), weight.sum()])

    def of_tokens(self, values: Tensor, *sides: str) -> Tensor:
        """[M] -> (sum, count) over the completions of these sides (chosen, rejected); a shared completion counts once."""
        counted = self.batch.weight.new_zeros(len(self.batch.lengths))
        for side in sides:
            counted = counted.index_add(0, getattr(self.batch, side), self.counted)
        weight = (counted > 0)[self.batch.completion].float()
        return torch.stack([(values * weight).sum(), weight.sum()])

    def reward(self, side: str) -> Tensor:
        """[N] implicit reward; without a reference, against log-probs of 0."""
        policy = getattr(self.policy, side)
        return self.beta * (policy if self.reference is None else policy - getattr(self.reference, side))


Metric: TypeAlias = Callable[[MetricInputs], Tensor]

METRICS: dict[str, Metric] = {
    "loss": lambda s: s.of_pairs(s.losses, s.batch.weight),
    "rewards/chosen": lambda s: s.of_pairs(s.reward("chosen")),
    "rewards/rejected": lambda s: s.of_pairs(s.reward("rejected")),
    "rewards/accuracies": lambda s: s.of_pairs(s.reward("chosen") > s.reward("rejected")),
    "rewards/margins": lambda s: s.of_pairs(s.reward("chosen") - s.reward("rejected")),
    "logps/chosen": lambda s: s.of_pairs(s.policy.chosen),
    "logps/rejected": lambda s: s.of_pairs(s.policy.rejected),
    "logits/chosen": lambda s: s.of_tokens(_tokens(s).mean_logit, "chosen"),
    "logits/rejected": lambda s: s.of_tokens(_tokens(s).mean_logit, "rejected"),
    "entropy": lambda s: s.of_tokens(_tokens(s).entropy, "chosen", "rejected"),
    "mean_token_accuracy": lambda s: s.of_tokens(_tokens(s).is_top1, "chosen"),
    "nll_loss": lambda s: s.of_pairs(-s.policy.mean_chosen()),
    "aux_loss": lambda s: s.of_pairs(_aux_loss(s).expand_as(s.losses)),
}
"""Name -> (sum, count) of a micro-batch; the logged value is the sum of sums over the sum of counts."""


def _tokens(inputs: MetricInputs):
    return inputs.policy.tokens


def _aux_loss(inputs: MetricInputs) -> Tensor:
    return inputs.losses.new_zeros(()) if inputs.policy.aux_loss is None else inputs.policy.aux_loss


def per_pair(inputs: MetricInputs) -> dict[str, Tensor]:
    """What `compute_metrics` receives: [N] each. `losses` go into its `losses`, where --include_for_metrics asks for them."""
    of_reference = {
        f"ref_logps/{side}": torch.zeros_like(inputs.losses)
        if inputs.reference is None
        else getattr(inputs.reference, side)
        for side in ("chosen", "rejected")
    }
    return {
        "rewards/chosen": inputs.reward("chosen"),
        "rewards/rejected": inputs.reward("rejected"),
        "logps/chosen": inputs.policy.chosen,
        "logps/rejected": inputs.policy.rejected,
        **of_reference,
        "losses": inputs.losses,
        "example_ids": inputs.batch.example_ids,
    }


def with_losses(compute: Callable[..., Any], prediction: EvalPrediction, **how: Any) -> Any:
    """`compute` of the prediction, whose losses are those of `per_pair`: an array, or one per batch (--eval_do_concat_batches)."""
    predictions: Any = prediction.predictions
    if isinstance(predictions, dict):
        losses: Any = predictions["losses"]
        predictions = {name: values for name, values in predictions.items() if name != "losses"}
    else:
        losses = [batch["losses"] for batch in predictions]
        predictions = [{name: values for name, values in batch.items() if name != "losses"} for batch in predictions]
    return compute(
        EvalPrediction(
            predictions=predictions, label_ids=prediction.label_ids, inputs=prediction.inputs, losses=losses
        ),
        **how,
    )


class MetricSums:
    """Sums since the last log line. `add` launches a few kernels and waits for nothing.

    Args:
        metrics: the table, by name.
        aux_loss: whether the model has a load-balancing loss to report.
        also: is called with every micro-batch as well.
    """

    def __init__(
        self,
        metrics: Mapping[str, Metric],
        *,
        aux_loss: bool,
        also: Callable[[MetricInputs], None] = lambda inputs: None,
    ):
        self.also = also
        self.metrics = {name: metric for name, metric in metrics.items() if aux_loss or name != "aux_loss"}
        self.names = list(self.metrics)
        self.clear()

    def clear(self) -> None:
        self.table: Tensor | None = None  # [K, 2], on the device of the losses
        self.num_tokens = 0

    def mark(self) -> Tensor | None:
        """What `back_to` returns to: the sums as they are now. `add` makes a new table and leaves this one alone."""
        return self.table

    def back_to(self, mark: Tensor | None) -> None:
        """Forget the sums of a step that was not made. Its tokens were computed all the same."""
        self.table = mark

    @torch.no_grad()
    def add(self, inputs: MetricInputs) -> None:
        with without_autocast(inputs.losses):
            table = torch.stack([metric(inputs) for metric in self.metrics.values()])
        table = table.to(widest_float(table.device))
        self.table = table if self.table is None else self.table + table
        self.num_tokens += inputs.batch.num_tokens
        self.also(inputs)

    def state_dict(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, list]:
        """The open window of all ranks, for the checkpoint. Every rank must call."""
        return {"names": self.names, "rows": gather(self._rows(device)).tolist()}

    def load_state_dict(self, state: dict[str, list], device: torch.device) -> None:
        """For one rank: the sums are those of all."""
        rows = dict(zip([*state["names"], "num_tokens"], state["rows"], strict=True))
        self.table = torch.tensor(
            [rows.get(name, [0.0, 0.0]) for name in self.names], dtype=widest_float(device), device=device
        )
        self.num_tokens = int(rows["num_tokens"][0])

    def _rows(self, device: torch.device) -> Tensor:
        """[K + 1, 2] the table and, as its last row, the tokens."""
        table = (
            torch.zeros(len(self.names), 2, dtype=widest_float(device), device=device)
            if self.table is None
            else self.table
        )
        tokens = F.pad(table.new_full((1, 1), self.num_tokens), (0, 1))
        return torch.cat([table, tokens])

    def reduce(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> tuple[dict[str, float], int]:
        """(means over all pairs since the last call, tokens computed since then), on all ranks: one collective, one wait.

        `gather` sums a tensor over ranks. Every rank must call, also one that saw no batch.
        """
        *rows, (num_tokens, _) = gather(self._rows(device)).tolist()
        self.clear()
        means = {name: total / count for name, (total, count) in zip(self.names, rows, strict=True) if count}
        return means, int(num_tokens)


class FallingChosenWarning:
    """Says once when margins grow because the rejected log-prob falls faster than the chosen one.

    Loss, accuracy and margins look perfect then, while the model unlearns the very answers that it should prefer.
    """

    NATS = 1.0  # mean distance from the reference, per completion, on both sides of the comparison

    def __init__(self, beta: float, *, has_reference: bool):
        self.beta = beta
        self.said = not has_reference  # rewards are then log-probs, and always negative

    def look(self, means: dict[str, float], step: int) -> None:
        chosen, margin = means.get("rewards/chosen", 0.0) / self.beta, means.get("rewards/margins", 0.0) / self.beta
        if self.said or chosen > -self.NATS or margin < self.NATS:
            return
        self.said = True
        logger.warning(
            f"Step {step}: chosen log-probs fall while margins grow. The chosen completions are {-chosen:.1f} nats less "
            f"likely than under the reference, and the margin is {margin:.1f} nats. Loss and accuracy do not show it; the "
            "model may stop writing well-formed answers. Add an NLL term (--rpo_alpha 1), raise --beta, or lower the "
            "learning rate, and make sure that chosen completions end with the EOS token."
        )
