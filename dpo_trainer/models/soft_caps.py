"""Models that cap their attention scores (Gemma 2), which not every attention implementation does."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)


def keep_soft_caps(model: nn.Module) -> None:
    """Exchange torch's fused attention for the written-out one where a model caps its scores (Gemma 2), in place.

    `sdpa` has no soft cap. transformers before 5.21 takes it for these models all the same and leaves the cap out: log-probs are
    off by half a nat and more, without a word. Later releases do not offer it to them.
    """
    for capped in _capped_models(model):
        if capped.config._attn_implementation == "sdpa":
            capped.set_attn_implementation("eager")
            logger.warning(
                f"{type(capped).__name__} caps its attention scores, which `sdpa` does not: it computes with `eager` attention."
            )


def caps_scores(model: nn.Module) -> bool:
    """Whether attention scores of the model have a soft cap, as those of Gemma 2 have."""
    return next(_capped_models(model), None) is not None


def _capped_models(model: nn.Module) -> Iterator[PreTrainedModel]:
    for capped in model.modules():
        if isinstance(capped, PreTrainedModel) and getattr(capped.config, "attn_logit_softcapping", None) is not None:
            yield capped
