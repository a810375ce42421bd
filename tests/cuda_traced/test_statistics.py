"""Autocast of a GPU rounds other operations than that of a CPU: none of them touches what is computed from logits."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo_trainer.losses import LOSSES, Objective
from dpo_trainer.metrics import METRICS, MetricInputs, MetricSums
from dpo_trainer.scoring.head import stats_of
from dpo_trainer.scoring.logprobs import METRIC_STATS
from dpo_trainer.types import PairBatch, PairLogps, TokenLogps

HALF = (torch.float16, torch.bfloat16)


class Rounded(TorchDispatchMode):
    """Operations whose result is in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.dtype in HALF for x in tree_leaves(out)):
            self.seen.append(func._schema.name)
        return out


def rounded_after_the_head(loss: str, autocast: str) -> list[str]:
    """From float32 logits of two pairs of three tokens to the metrics and the gradient of the logits."""
    options: dict[str, Any] = {"label_smoothing": 0.1} if "label_smoothing" in LOSSES[loss].arguments else {}
    args = tiny.config("unused", loss_type=loss, rpo_alpha=1.0, use_weighting=True, **options)
    objective = Objective.from_config(args)
    with torch.device("cuda"):
        logits = torch.zeros(12, 40, requires_grad=True)
        completion, lengths = torch.zeros(12, dtype=torch.int64), torch.ones(4, dtype=torch.int64)
        pairs, weight = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    batch = PairBatch(
        example_ids=pairs,
        weight=weight,
        input_ids=completion[None],
        score_at=completion,
        target_ids=completion,
        completion=completion,
        completion_position=completion,
        lengths=lengths,
        chosen=pairs,
        rejected=pairs,
        num_tokens=12,
        margin=weight,
    )
    with Rounded() as rounded, torch.autocast("cuda", getattr(torch, autocast)):
        stats = stats_of(logits, batch.target_ids, METRIC_STATS | {"log_sum_sq"})
        names = ("completion", "chosen", "rejected", "lengths")
        tokens = TokenLogps(position=batch.completion_position, **{n: getattr(batch, n) for n in names}, **stats)
        policy = PairLogps.from_tokens(tokens)
        losses = objective(policy, policy, training=True, weight=weight, margin=batch.margin).total
        parts = MetricInputs(batch=batch, policy=policy, reference=policy, losses=losses, beta=0.1)
        MetricSums(METRICS, aux_loss=False).add(parts)
        losses.sum().backward()
    return rounded.seen


@pytest.mark.parametrize("autocast", ["bfloat16", "float16"])
def test_nothing_after_the_head_is_rounded(on_cuda, autocast):
    for loss in (name for name in LOSSES if LOSSES[name].builtin):
        assert on_cuda(rounded_after_the_head, loss=loss, autocast=autocast) == [], loss
