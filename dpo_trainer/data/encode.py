"""Texts -> token ids, as fast as the tokenizer can: one call for a whole batch, no text twice, no offsets."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any

from datasets.fingerprint import Hasher
from transformers import TokenizersBackend

logger = logging.getLogger(__name__)


def text_tokenizer(processing_class: Any) -> Any:
    """The tokenizer of a processor, or the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def check_tokenizer(processing_class: Any) -> int:
    """The id to pad with: the pad token's, or that of EOS (with one warning; the tokenizer itself is not changed).

    Padding is masked everywhere, so the choice changes no number; flat rows have none. A tokenizer without an EOS token
    is refused.
    """
    tokenizer = text_tokenizer(processing_class)
    eos = eos_token_id(tokenizer)
    if tokenizer.pad_token_id is not None:
        return tokenizer.pad_token_id
    logger.warning("The tokenizer has no pad token: batches are padded with its EOS token %r.", tokenizer.eos_token)
    return eos


def eos_token_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so no completion could be seen to end. Set the one that the model knows: "
            "tokenizer.eos_token = '...'."
        )
    return tokenizer.eos_token_id


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of all that decides which ids a text gets: the same in every process, and before and after a call.

    Padding and truncation are left out: a call may switch them on inside a fast tokenizer, and we ask for neither.
    """
    if not getattr(tokenizer, "is_fast", False):
        return Hasher.hash(tokenizer)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    control = getattr(tokenizer, "chat_control_tokens", None)
    around = [tokenizer.chat_template, special, tokenizer.split_special_tokens, control]
    content = _backend(tokenizer).to_str() + json.dumps(around, sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _backend(tokenizer: Any) -> Any:
    """The Rust tokenizer, with no padding and no truncation left on by an earlier call."""
    backend = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.no_truncation()
    return backend


def encode(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool, control_as_text: bool
) -> list[list[int]]:
    """Token ids of each text. `add_special_tokens`: those that the tokenizer puts around a text by itself.

    `control_as_text`: the text of a special token is text like any other (`split_special_tokens`).
    """
    unique = list(dict.fromkeys(texts))
    ids = _encode(tokenizer, unique, add_special_tokens, control_as_text or tokenizer.split_special_tokens)
    of = dict(zip(unique, ids, strict=True))
    return [of[text] for text in texts]


def _encode(tokenizer: Any, texts: list[str], add_special_tokens: bool, control_as_text: bool) -> list[list[int]]:
    if _is_plain_backend(tokenizer):
        # What calling the tokenizer does, without the offsets, masks and copies that it makes of each text.
        backend = _backend(tokenizer)
        backend.encode_special_tokens = control_as_text
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        split_special_tokens=control_as_text,
        verbose=False,  # its warning about long texts comes before ours can cut them
    )["input_ids"]


def _is_plain_backend(tokenizer: Any) -> bool:
    """Whether a call does no more than to ask the Rust tokenizer."""
    own = (type(tokenizer)._encode_plus, type(tokenizer).__call__) if isinstance(tokenizer, TokenizersBackend) else ()
    return own == (TokenizersBackend._encode_plus, TokenizersBackend.__call__)
