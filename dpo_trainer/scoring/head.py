"""The output embedding as a scorer: hidden states of M scored tokens -> log-probs, one chunk of logits at a time.

M scored tokens   B tokens of a chunk   D hidden size   V vocabulary
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..types import without_autocast


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
    names = sorted(stats)
    with without_autocast(logits):
        logps, *extras = _TargetLogps.apply(logits, targets, names)
    return {"logps": logps, **dict(zip(names, extras, strict=True))}


class _TargetLogps(torch.autograd.Function):
    """Log-softmax at the targets, and statistics of the distribution, from one pass of exponentials.

    Backward makes the probabilities again from the logits: a graph of single operations would keep a second array [B, V],
    and need four of them at its peak. On a CPU a few tokens at a time, so that what is between stays in its cache.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, names: list[str]) -> tuple[Tensor, ...]:
        size = _block_size(logits)
        rows = [_distribution(*block, names) for block in zip(logits.split(size), targets.split(size), strict=True)]
        normaliser, logps, *extras = (torch.cat(parts) for parts in zip(*rows, strict=True))
        ctx.save_for_backward(logits, targets, normaliser)
        ctx.mark_non_differentiable(*extras)
        return logps, *extras

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        """d logp / d logits = one-hot of the target - probabilities."""
        logits, targets, normaliser = ctx.saved_tensors
        size, out = _block_size(logits), torch.empty_like(logits)
        with without_autocast(logits):
            for into, *block in zip(*(x.split(size) for x in (out, logits, targets, normaliser, grad)), strict=True):
                into.copy_(_gradient(*block))
        return out, None, None


def _distribution(logits: Tensor, targets: Tensor, names: list[str]) -> tuple[Tensor, ...]:
    """[B, V] -> log of the normaliser [B], log-prob of the target [B], and each of `names` [B], float32."""
    top, first = logits.max(1, keepdim=True)
    top = top.float()
    # A logit of -inf (a padded vocabulary entry) must not turn 0 * -inf into NaN.
    below = (logits.float() - top).clamp_min_(-1e30)
    exps = below.exp()
    log_total = exps.sum(1).log()
    extra = {
        "entropy": lambda: log_total - torch.linalg.vecdot(exps, below) / log_total.exp(),
        "log_sum_sq": lambda: torch.linalg.vecdot(exps, exps).log() - 2 * log_total,
        "is_top1": lambda: (first[:, 0] == targets).float(),
        "mean_logit": lambda: logits.mean(1, dtype=torch.float32),
    }
    logps = (logits.gather(1, targets[:, None]).float() - top)[:, 0] - log_total
    return top[:, 0] + log_total, logps, *(extra[name]() for name in names)


def _gradient(logits: Tensor, targets: Tensor, normaliser: Tensor, grad: Tensor) -> Tensor:
    negative = (logits.float() - normaliser[:, None]).exp_().mul_(-grad[:, None])
    return negative.scatter_add_(1, targets[:, None], grad[:, None])


def _block_size(logits: Tensor) -> int:
    """Tokens whose logits take 4 MB on a CPU; on an accelerator all of them."""
    return max(1, 2**20 // logits.shape[1]) if logits.is_cpu else max(1, len(logits))


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
