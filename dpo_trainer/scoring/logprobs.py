"""Model + PairBatch -> PairLogps, without ever holding the logits of a batch.

The model is called through whatever wraps it, so that the hooks of DDP, FSDP, DeepSpeed and PEFT run. For the time of
the call its output embedding alone gets another `forward`: it receives the hidden states, takes the M scored ones, walks
them in chunks through its own original `forward` (head.py; bias, LoRA, quantised and sharded weights just work) and
returns their log-probs [1, M] where the model expected logits.

    R rows   L tokens in a row   M scored tokens   D hidden size
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.soft_caps import keep_soft_caps
from ..models.unwrap import base_model
from ..types import PairBatch, PairLogps, TokenLogps, without_autocast
from .attention import SharedPromptAttention
from .head import Head, score_chunks, scoring_head, stats_of

METRIC_STATS = frozenset({"entropy", "is_top1", "mean_logit"})
"""Per-token outputs for the log line; they come from the same logits chunk as the log-probs."""


class Scorer:
    """One model's way from batches to log-probs.

    Args:
        model: the model, or the PEFT model; wrappers that come later do not matter.
        stats: per-token extras to compute besides the log-probs (fields of `TokenLogps`).
        router_loss: also ask a mixture-of-experts model for its load-balancing loss.
    """

    def __init__(self, model: nn.Module, *, stats: frozenset[str] = frozenset(), router_loss: bool = False):
        base = base_model(model)
        keep_soft_caps(base)
        self.stats = stats
        self.router_loss = router_loss
        self.attention = SharedPromptAttention(base)
        # Switched off when the first batch shows that a model does more to its logits than we know of.
        self.through_head = base.get_output_embeddings() is not None
        self._step: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around forward and backward of a training step: the attention that a flat batch needs stays until the end."""
        with contextlib.ExitStack() as self._step:
            try:
                yield
            finally:
                self._step = None

    def __call__(self, model: nn.Module, batch: PairBatch, *, extras: bool = True) -> PairLogps:
        """Log-probs of `batch` under `model` as it is wrapped now. Differentiable where gradients are on.

        `extras` False leaves out everything that a reference is not asked for.
        """
        stats = self.stats if extras else frozenset()
        more = {"output_router_logits": True} if extras and self.router_loss else {}
        score = _score_in_head if self.through_head else _score_logits
        if batch.segments is not None and self._step is not None and torch.is_grad_enabled():
            self._step.callback(batch.segments.forget)
            self._step.enter_context(self.attention.installed())
        with self.attention.installed() if batch.is_flat else contextlib.nullcontext():
            tokens, aux_loss = score(model, batch, stats, more)
        if batch.is_flat:
            self.attention.guard(tokens.logps)
        with without_autocast(tokens.logps):
            return PairLogps.from_tokens(tokens, aux_loss)


def router_loss_weight(model: PreTrainedModel, requested: float | None) -> float:
    """Weight of the load-balancing loss: as asked, else the model's own where its config has that loss on; 0 is off."""
    config = model.config.get_text_config(decoder=True)
    if requested is None:
        return config.router_aux_loss_coef if getattr(config, "output_router_logits", False) else 0.0
    if requested > 0 and not hasattr(config, "output_router_logits"):
        raise ValueError(
            f"--router_aux_loss_coef {requested} needs a mixture-of-experts model with a load-balancing loss; "
            f"{type(model).__name__} has none. Leave the option out."
        )
    return requested


def _model_inputs(batch: PairBatch) -> dict[str, Any]:
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    inputs |= (batch.images.inputs if batch.images else {}) | (batch.token_types or {})
    if batch.is_flat:
        return {**inputs, "position_ids": batch.position_ids, "segments": batch.segments}
    return {**inputs, "attention_mask": batch.attention_mask}


def _score_in_head(
    model: nn.Module, batch: PairBatch, stats: frozenset[str], more: dict[str, Any]
) -> tuple[TokenLogps, Tensor | None]:
    scored: dict[str, Tensor] = {}

    def score(head: Head, hidden: Tensor) -> Tensor:
        scored.update(score_chunks(head, _states(hidden, batch), batch.target_ids, stats))
        return scored["logps"][None].clone()  # FSDP2 wants no view

    with scoring_head(base_model(model), score):
        outputs = model(**_model_inputs(batch), **more)
    # The differentiable log-probs leave through the model's output, where wrappers attach their hooks.
    scored["logps"] = outputs.logits.reshape(-1)
    if scored["logps"].shape != batch.target_ids.shape:
        raise RuntimeError(
            f"{type(base_model(model)).__name__} reshapes what its output embedding returns: got "
            f"{tuple(outputs.logits.shape)} for {len(batch.target_ids)} scored tokens."
        )
    return _token_logps(batch, scored), getattr(outputs, "aux_loss", None) if more else None


def _score_logits(
    model: nn.Module, batch: PairBatch, stats: frozenset[str], more: dict[str, Any]
) -> tuple[TokenLogps, Tensor | None]:
    """The plain way: all logits of the rows, as the model returns them. The yardstick, and the last resort."""
    outputs = model(**_model_inputs(batch), **more)
    scored = stats_of(_states(outputs.logits, batch), batch.target_ids, stats)
    return _token_logps(batch, scored), getattr(outputs, "aux_loss", None) if more else None


def _token_logps(batch: PairBatch, values: dict[str, Tensor]) -> TokenLogps:
    return TokenLogps(
        completion=batch.completion,
        position=batch.completion_position,
        chosen=batch.chosen,
        rejected=batch.rejected,
        lengths=batch.lengths,
        **values,
    )


def _states(hidden: Tensor, batch: PairBatch) -> Tensor:
    """[R, L', D] -> [M, D]: the states that predict the scored tokens. L' > L where prompt tuning puts tokens in front."""
    extra = hidden.shape[1] - batch.input_ids.shape[1]
    at = batch.score_at
    if extra:
        at = at + (torch.div(at, batch.input_ids.shape[1], rounding_mode="floor") + 1) * extra
    return hidden.flatten(0, 1).index_select(0, at)
