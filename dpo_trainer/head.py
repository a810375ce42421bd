"""The output embedding as a scorer: hidden states of M scored tokens -> log-probs, one chunk of logits at a time.

M scored tokens   B tokens of a chunk   D hidden size   V vocabulary
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Head:
    """A model's own output embedding, [B, D] -> logits [B, V] as the model would return them."""

    module: nn.Module
    forward: Callable[[Tensor], Tensor]
    change: Callable[[Tensor], Tensor] | None = None  # what the model does to its logits afterwards

    def __call__(self, states: Tensor) -> Tensor:
        logits = self.forward(states)
        return logits if self.change is None else self.change(logits)

    @property
    def has_dropout(self) -> bool:
        """LoRA on the head may have some; nothing else there is random."""
        return any(isinstance(m, nn.Dropout) and m.p > 0 and m.training for m in self.module.modules())


@contextlib.contextmanager
def scoring_head(model: PreTrainedModel, score: Callable[[Head, Tensor], Tensor]) -> Iterator[None]:
    """For the time of a forward: `score(head, hidden states)` instead of the output embedding's `forward`.

    What the model does to its logits after the head would hit log-probs: it is switched off, and done in the chunk.
    """
    module = model.get_output_embeddings()
    original, was_patched = module.forward, "forward" in module.__dict__
    with _without_logit_changes(model) as change:
        head = Head(module, original, change)
        module.forward = lambda hidden, *args, **kwargs: score(head, hidden)
        try:
            yield
        finally:
            if was_patched:  # by accelerate's device hooks, which put their forward on the instance as well
                module.forward = original
            else:
                del module.forward


def score_chunks(head: Head, states: Tensor, targets: Tensor, stats: frozenset[str]) -> dict[str, Tensor]:
    """[M, D] -> [M] each. Logits live for one chunk; backward recomputes them chunk by chunk."""
    names = ["logps", *sorted(stats)]

    def score(states_BD: Tensor, targets_B: Tensor) -> tuple[Tensor, ...]:
        out = stats_of(head(states_BD), targets_B, stats)
        return tuple(out[name] for name in names)

    size = chunk_size(head, states)
    chunks = list(zip(states.split(size), targets.split(size), strict=True))
    if len(chunks) > 1 and torch.is_grad_enabled():
        rows = [checkpoint(score, *c, use_reentrant=False, preserve_rng_state=head.has_dropout) for c in chunks]
    else:
        rows = [score(*c) for c in chunks]
    return {name: torch.cat(parts) for name, parts in zip(names, zip(*rows, strict=True), strict=True)}


def chunk_size(head: Head, states: Tensor) -> int:
    """Scored tokens per chunk: as many as keep a float32 chunk of logits at 64 MB on a CPU, 512 MB on an accelerator.

    Small enough to be nothing beside the model, large enough for matrix products to run at full speed.
    """
    vocabulary = getattr(head.module, "out_features", None) or 32_768
    return max(64, (2**24 if states.device.type == "cpu" else 2**27) // vocabulary)


def stats_of(logits: Tensor, targets: Tensor, stats: frozenset[str]) -> dict[str, Tensor]:
    """[B, V] logits -> the log-prob of each target (differentiable) and the extras (not), float32 [B] each."""
    logits = logits.float()
    logps = -F.cross_entropy(logits, targets, reduction="none")
    out = {"logps": logps}
    with torch.no_grad():
        if stats & {"entropy", "log_sum_sq"}:
            probs = logits.softmax(1)
        if "entropy" in stats:
            log_normaliser = logits.gather(1, targets[:, None])[:, 0] - logps
            # A logit of -inf (a padded vocabulary entry) must not turn 0 * -inf into NaN.
            out["entropy"] = log_normaliser - torch.linalg.vecdot(probs, logits.clamp_min(-1e30))
        if "log_sum_sq" in stats:
            out["log_sum_sq"] = torch.linalg.vecdot(probs, probs).log()
        if "is_top1" in stats:
            out["is_top1"] = (logits.argmax(1) == targets).float()
        if "mean_logit" in stats:
            out["mean_logit"] = logits.mean(1)
    return out


@contextlib.contextmanager
def _without_logit_changes(model: PreTrainedModel) -> Iterator[Callable[[Tensor], Tensor] | None]:
    """Neutralise soft caps and scales that a model applies to its logits; yield the same as a function of the logits.

    A model with a change that is not listed here is found by the check on the first batch.
    """
    config = model.config.get_text_config(decoder=True)
    found: list[tuple[Any, str, Any]] = []  # owner, attribute, neutral value
    change: Callable[[Tensor], Tensor] | None = None
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2, 3, 3n, VaultGemma ...
        found.append((config, "final_logit_softcapping", None))
        change = lambda logits: torch.tanh(logits.float() / cap) * cap  # noqa: E731
    elif isinstance(scale := getattr(model, "logit_scale", None), float | int):  # Cohere
        found.append((model, "logit_scale", 1.0))
        change = lambda logits: logits * scale  # noqa: E731
    elif config.model_type.startswith("granite") and (divisor := getattr(config, "logits_scaling", None)):
        found.append((config, "logits_scaling", 1.0))
        change = lambda logits: logits / divisor  # noqa: E731
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in found]
    for owner, name, neutral in found:
        setattr(owner, name, neutral)
    try:
        yield change
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)
