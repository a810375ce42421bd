"""What a run settles about its tokenizer before any data is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.utils import logging

from ..config import DPOConfig
from ..data import check_tokenizer
from ..data.tokens.encode import can_be_saved
from ..models.unwrap import base_model
from ..models.vocabulary import vocabulary_size
from .template_date import settle_date

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class TokenizerSettings:
    """The pad token, the date that the chat template writes, and whether the tokenizer can be written to disk."""

    pad_token_id: int
    template_date: str | None  # YYYY-MM-DD
    can_be_saved: bool


def tokenizer_settings(args: DPOConfig, processing_class: Any, model: nn.Module) -> TokenizerSettings:
    """Check the tokenizer against the model, and settle the date of its chat template. All ranks must call."""
    pad_token_id = check_tokenizer(processing_class, vocabulary_size(model))
    date = settle_date(args, processing_class)
    saved = can_be_saved(processing_class)
    if not saved:
        logger.warning(
            "The tokenizer cannot be written down, for a part of it is Python code: checkpoints and the trained model are saved "
            "without it. Load it as you did for this run, and pass it as processing_class."
        )
    return TokenizerSettings(pad_token_id, date, saved)


def replace_pad_tokens_without_embedding(model: nn.Module, pad_token_id: int) -> None:
    """`Trainer` copies the tokenizer's pad token into the model's configs: one without an embedding would make a model that
    cannot be loaded."""
    size, base = vocabulary_size(model), base_model(model)
    configs: list[Any] = [base.config.get_text_config(), getattr(base, "generation_config", None)]
    for config in configs:
        pad = getattr(config, "pad_token_id", None)
        if size is not None and isinstance(pad, int) and pad >= size:
            config.pad_token_id = pad_token_id
