"""Attention over shared prompts: each segment of a flat row sees its prefix in full and itself causally.

Registered once with transformers under `NAME`; a model uses it only inside `SharedPromptAttention.installed()`.

    H query heads   K key/value heads   T tokens of the flat row   d head size   q, k: query and key tokens of one segment
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import CausalBias, causal_lower_right
from transformers import AttentionInterface, PreTrainedModel
from transformers.utils import logging

from ..types import Segments
from .varlen import Kernel, choose, flash_serves, varlen_attention

logger = logging.get_logger(__name__)

# transformers reads meaning into names that contain "flash", "sdpa" or "flex_attention". A name without a registered
# mask function gets no mask: restarted positions would otherwise be taken for packed sequences, in a [T, T] mask.
NAME = "dpo_shared_prompt"

Mutual: TypeAlias = "tuple[tuple[int, int], ...]"
"""Stretches (start, end) of a segment whose tokens see each other both ways."""

KNOWN_LAYER_TYPES = {"full_attention", "sliding_attention"}


QUERY_BLOCK = 128
"""Queries of one call on a CPU: fewer gain nothing more (benchmarks/NOTES.md)."""


class SegmentsLost(RuntimeError):
    """A model's layers drop the extra keyword arguments that carry the segments to the attention function."""


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,  # [1, H, T, d]
    key: Tensor,  # [1, K, T, d]
    value: Tensor,  # [1, K, T, dv]
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,  # [H] attention sinks: one more logit per head that no value belongs to
    segments: Segments | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls; returns [1, T, H, dv]."""
    if segments is None:
        raise SegmentsLost(f"{type(module).__name__} does not pass extra arguments on to its attention.")
    both_ways = kwargs.get("is_causal") is False or getattr(module, "is_causal", True) is False
    if position_bias is not None or (both_ways and not segments.mutual):  # a batch that knows of it says where
        raise SegmentsLost(f"{type(module).__name__} is not a plain causal attention.")
    query, key, value = _as_autocast_has_them(query, key, value)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if kernel := _kernel_for(query, value, segments, dropout, softcap, s_aux):
        return varlen_attention(kernel, query, key, value, segments, scaling, sliding_window, softcap), None

    # Split once: backward joins the gradients of pieces in one go, where each slice of a row makes a row of zeros.
    queries, keys, values = (x.split(segments.length, dim=2) for x in (query, key, value))
    starts = {start: s for s, start in enumerate(accumulate(segments.length, initial=0))}
    mutual = segments.remember("mutual", lambda: _mutual_by_segment(segments))
    outputs = []
    for s, (prefix, n_prefix) in enumerate(zip(segments.prefix_start, segments.prefix_length, strict=True)):
        k, v = keys[s], values[s]
        if n_prefix:
            first = starts[prefix]
            k = torch.cat([keys[first][:, :, :n_prefix], k], dim=2)
            v = torch.cat([values[first][:, :, :n_prefix], v], dim=2)
        own = mutual.get(s, ())
        if softcap is None and s_aux is None:
            outputs.append(_sdpa(queries[s], k, v, segments, scaling, sliding_window, dropout, own))
        else:
            hidden = _hidden(queries[s], k, segments, sliding_window, own)
            outputs.append(_written_out(queries[s], k, v, hidden, scaling, dropout, softcap, s_aux))
    return torch.cat(outputs, dim=2).transpose(1, 2), None


def _as_autocast_has_them(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype, where it is on: rotary embeddings give queries and keys in float32 there, and values come in
    half precision. torch's own attention casts all three as well, but only once its kernel is chosen."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _kernel_for(
    query: Tensor, value: Tensor, segments: Segments, dropout: float, softcap: float | None, s_aux: Tensor | None
) -> Kernel | None:
    """The kernel that takes the whole row, where there is one; on a GPU the log says once what is taken."""
    if not query.is_cuda:
        return None
    kernel, why = choose(query, value, dropout, softcap, s_aux)
    if segments.mutual:
        kernel, why = None, "no variable-length kernel for tokens that see each other both ways"
    what = why if kernel else f"one call per segment ({why})"
    logger.warning_once(f"Attention of flat rows: {what}.")
    return kernel


def _mutual_by_segment(segments: Segments) -> dict[int, Mutual]:
    """{segment: its stretches, counted from its beginning}."""
    ends = list(accumulate(segments.length))
    found: dict[int, Mutual] = {}
    for start, end in segments.mutual:
        s = bisect_right(ends, start)
        begin = ends[s] - segments.length[s]
        found[s] = (*found.get(s, ()), (start - begin, end - begin))
    return found


def _visible(q: int, k: int, window: int | None, device: torch.device, mutual: Mutual = ()) -> Tensor:
    """[q, k] True where a query sees a key: causal, aligned at the ends, or both in a stretch of `mutual` (which counts
    queries); and within the sliding window, which reaches backwards."""
    seen = torch.ones(q, k, dtype=torch.bool, device=device).tril(k - q)
    for start, end in mutual:
        seen[start:end, k - q + start : k - q + end] = True
    return seen if window is None else seen.triu(k - q - window + 1)


def _added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[q, k] the same as what is added to scores."""
    if seen.is_cuda:  # rows of 16 entries: torch copies a mask with others in each layer
        wide = seen.new_zeros(seen.shape[0], seen.shape[1] + -seen.shape[1] % 16, dtype=dtype)
        return wide[:, : seen.shape[1]].masked_fill_(~seen, float("-inf"))
    return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, float("-inf"))


def _hidden(query: Tensor, key: Tensor, segments: Segments, window: int | None, mutual: Mutual) -> Tensor:
    """[q, k] True where a query does not see a key. All layers of the batch share it."""
    k = key.shape[2]
    what = (query.shape[2], k, None if window is None or window >= k else window, query.device, mutual)
    return segments.remember(("hidden", *what), lambda: ~_visible(*what))


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    window: int | None,
    dropout: float,
    mutual: Mutual = (),
) -> Tensor:
    """torch's kernel. On a CPU by blocks of queries, each with the keys up to its last: the kernel computes what it masks."""
    if query.is_cpu and query.shape[2] > QUERY_BLOCK and not mutual:
        before, blocks = key.shape[2] - query.shape[2], []
        for block in query.split(QUERY_BLOCK, dim=2):
            before += block.shape[2]
            keys, values = key[:, :, :before], value[:, :, :before]
            blocks.append(_sdpa(block, keys, values, segments, scaling, window, dropout))
        return torch.cat(blocks, dim=2)

    mask = _mask(query, key.shape[2], segments, window, mutual)
    if query.is_cuda and not ((mask is None or isinstance(mask, CausalBias)) and flash_serves(query, value)):
        # The other kernels of a GPU take as many heads of keys as of queries: else all scores would be in memory.
        key, value = _for_each_head(query, key, value)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _mask(query: Tensor, k: int, segments: Segments, window: int | None, mutual: Mutual) -> Tensor | None:
    """[q, k] what hides keys from queries; None where torch's causal mask, aligned at the beginning, does."""
    q = query.shape[2]
    window = None if window is None or window >= k else window
    if window is None and not mutual:
        if q == k:
            return None
        if query.is_cuda and (bias := _lower_right(q, k)) is not None:
            return bias
    # All layers of the batch share it. Of one of booleans the kernel would make, and keep, one like this in each.
    what = (q, k, window, query.device, mutual)
    return segments.remember((what, query.dtype), lambda: _added(_visible(*what), query.dtype))


def _lower_right(q: int, k: int) -> CausalBias | None:
    """The causal mask aligned at the ends: to a GPU's kernels an option, and no tensor. None in a dispatch mode, such as a
    FlopCounterMode, where torch cannot make it."""
    try:
        return causal_lower_right(q, k)
    except RuntimeError:
        return None


def _for_each_head(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """[1, K, k, d] -> [1, H, k, d]."""
    groups = query.shape[1] // key.shape[1]
    return (key, value) if groups == 1 else (key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1))


def _written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    hidden: Tensor,
    scaling: float,
    dropout: float,
    softcap: float | None,
    s_aux: Tensor | None,
) -> Tensor:
    """The formula itself, for what no fused kernel offers: soft-capped scores (Gemma 2) and sinks (gpt-oss)."""
    key, value = _for_each_head(query, key, value)
    scores = query @ key.transpose(2, 3) * scaling  # [1, H, q, k]
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(hidden, float("-inf"))
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.to(scores).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32)[..., : key.shape[2]].to(query.dtype)
    return F.dropout(weights, dropout, training=dropout > 0) @ value


AttentionInterface.register(NAME, shared_prompt_attention)


def why_not_flat(model: PreTrainedModel) -> str | None:
    """What in an architecture rules the flat layout out, as far as its config tells; None where nothing does.

    Differences that only show beyond some length (chunked or sparse attention) must be found here: the check on the
    first batch looks at short pairs.
    """
    config = model.config.get_text_config(decoder=True)
    layers = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYER_TYPES
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if layers:
        return f"its layers of type {', '.join(sorted(layers))} run along the row"
    if getattr(model, "_is_stateful", False):
        return "its layers carry a state along the row"
    if getattr(config, "alibi", False):
        return "its ALiBi positions count columns of the row"
    for name in ("attention_chunk_size", "index_topk"):
        if getattr(config, name, None):
            return f"its attention is limited by column ({name})"
    if not model._can_set_attn_implementation():
        return "its attention cannot be exchanged"
    return None


class SharedPromptAttention:
    """Installs the attention on one model for the time of a forward and its backward.

    Checkpointed layers look their attention up again *during backward*: losses would be right and gradients wrong if
    the switch ended with the forward. `guard` makes that an error.
    """

    def __init__(self, model: PreTrainedModel):
        self.config = model.config.get_text_config(decoder=True)

    @property
    def is_installed(self) -> bool:
        return self.config._attn_implementation == NAME

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Nested uses change nothing: only the one that installed it takes it off."""
        if self.is_installed:
            yield
            return
        # The setter of `_attn_implementation` would write through to sub-configs, and a vision tower must keep its own.
        before = self.config._attn_implementation_internal
        self.config._attn_implementation_internal = NAME
        try:
            yield
        finally:
            self.config._attn_implementation_internal = before

    def guard(self, logps: Tensor) -> None:
        """Raise when the backward of `logps` begins outside of `installed()`."""

        def check(grad: Tensor) -> None:
            if not self.is_installed:
                raise RuntimeError(
                    "The backward of a flat batch began after its attention was taken off the model: recomputed layers "
                    "would give wrong gradients. Run forward and backward inside one `Scorer.step()` context, as "
                    "DPOTrainer.training_step does."
                )

        if logps.requires_grad:
            logps.register_hook(check)
