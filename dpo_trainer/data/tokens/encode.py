"""Texts -> token ids, as fast as the tokenizer can: one call for a whole batch, no text twice, no offsets."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets.fingerprint import Hasher
from transformers import TokenizersBackend

from ..errors import clean
from ..processor import text_tokenizer

logger = logging.getLogger(__name__)


def check_tokenizer(processing_class: Any, vocabulary_size: int | None = None) -> int:
    """The id to pad with: the pad token's, or that of EOS (with one warning; the tokenizer itself is not changed).

    Padding is masked everywhere, so the choice changes no number; flat rows have none. But it must have an embedding:
    a pad token that was added beyond the `vocabulary_size` of the model is not used. A tokenizer without an EOS token
    is refused.
    """
    tokenizer = text_tokenizer(processing_class)
    eos, pad = eos_token_id(tokenizer), tokenizer.pad_token_id
    if pad is not None and (vocabulary_size is None or pad < vocabulary_size):
        return pad
    instead = eos if vocabulary_size is None or eos < vocabulary_size else 0
    problem = (
        "no pad token"
        if pad is None
        else f"a pad token with the id {pad} (the model has {vocabulary_size} embeddings)"
    )
    logger.warning(
        "The tokenizer has %s: batches are padded with %s, id %d.",
        problem,
        f"its EOS token {tokenizer.eos_token!r}" if instead == eos else "a token that the model has",
        instead,
    )
    return instead


def eos_token_id(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no EOS token, so no completion could be seen to end. Set the one that the model knows: "
            "tokenizer.eos_token = '...'."
        )
    return tokenizer.eos_token_id


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """A hash of all that decides which ids a text gets: the same in every process, and before and after a call.

    None for a tokenizer that cannot be written down, such as one with a part in Python: nothing tells two of them apart.
    Padding and truncation are left out: a call may switch them on inside a fast tokenizer, and we ask for neither.
    """
    try:
        return _fingerprint(tokenizer)
    except Exception as error:  # of pickle, or a bare one of the Rust tokenizer
        logger.warning("The tokenizer cannot be written down (%s): its token ids are not cached.", clean(error))
        return None


def can_be_saved(processing_class: Any) -> bool:
    """Whether `save_pretrained` can write it: not a fast tokenizer with a part in Python."""
    tokenizer = text_tokenizer(processing_class)
    try:
        if getattr(tokenizer, "is_fast", False):
            tokenizer.backend_tokenizer.to_str()
    except Exception:  # a bare one of the Rust tokenizer
        return False
    return True


def is_mistral_common(tokenizer: Any) -> bool:
    """Whether it is transformers' cover of mistral-common, which `AutoTokenizer` gives where that library is installed. It reads
    control tokens in no text, and writes conversations by a program of its own instead of a chat template."""
    return any(base.__name__ == "MistralCommonBackend" for base in type(tokenizer).__mro__)


def check_writes_conversations(tokenizer: Any, where: str) -> None:
    """Refuse a conversation where there is no chat template to write it."""
    if is_mistral_common(tokenizer):
        raise ValueError(
            f"{where} is a conversation, and the tokenizer is that of mistral-common (MistralCommonBackend), which has no chat "
            "template. Pass as processing_class the tokenizer of a repository of the model that has tokenizer.json, by AutoTokenizer."
            "from_pretrained(name, mistral_format=False), with the chat_template to be used; or give the rows as plain strings."
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} is a conversation, and the tokenizer has no chat template. Set tokenizer.chat_template to the one the "
            "model is to be used with, or give the row as plain strings."
        )


def special_tokens(tokenizer: Any) -> set[str]:
    """The texts of the tokens that it calls special."""
    added = tokenizer.added_tokens_decoder
    named = {token.content for token in added.values() if token.special} if isinstance(added, Mapping) else set()
    return named | set(tokenizer.all_special_tokens)


def _fingerprint(tokenizer: Any) -> str:
    if not getattr(tokenizer, "is_fast", False):
        return Hasher.hash(tokenizer)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    control = getattr(tokenizer, "chat_control_tokens", None)
    own_call = None if _is_plain_backend(tokenizer) else type(tokenizer).__qualname__
    around = [own_call, tokenizer.chat_template, special, tokenizer.split_special_tokens, control]
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


def encode_from_one_head(
    tokenizer: Any, rows: Sequence[Sequence[str]], *, add_special_tokens: bool, control_as_text: bool
) -> list[list[list[int]]]:
    """Token ids of the texts of each row, which begin alike: what they share up to a hard edge is tokenized once.

    An added token is a hard edge: the tokenizer takes it out of the text before anything else, and what stands before it
    and after it never meet. So a conversation's earlier turns are not tokenized again with each of its answers.
    """
    as_text = control_as_text or tokenizer.split_special_tokens
    edge = None if add_special_tokens or as_text else _hard_edges(tokenizer)
    cuts = [_last_common_edge(texts, edge) if edge else 0 for texts in rows]
    pieces = [[text[cut:] for text in texts] for texts, cut in zip(rows, cuts, strict=True)]
    heads = [texts[0][:cut] for texts, cut in zip(rows, cuts, strict=True) if cut]
    how = {"add_special_tokens": add_special_tokens, "control_as_text": control_as_text}
    ids = encode(tokenizer, [*heads, *(piece for of_row in pieces for piece in of_row)], **how)
    of_heads, of_pieces = iter(ids[: len(heads)]), iter(ids[len(heads) :])
    head_ids = [next(of_heads) if cut else [] for cut in cuts]
    return [[head + next(of_pieces) for _ in of_row] for head, of_row in zip(head_ids, pieces, strict=True)]


def _hard_edges(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches every added token, where none of them looks at the text before it or at what a word is."""
    added = list(tokenizer.added_tokens_decoder.values()) if _is_plain_backend(tokenizer) else []
    if not added or any(token.lstrip or token.single_word or token.normalized for token in added):
        return None
    return re.compile("|".join(re.escape(token.content) for token in sorted(added, key=lambda t: -len(t.content))))


def _last_common_edge(texts: Sequence[str], edge: re.Pattern[str]) -> int:
    """Where the last added token of the first text begins, if all texts are the same up to there; else 0."""
    cut = max((match.start() for match in edge.finditer(texts[0])), default=0)
    return cut if all(text.startswith(texts[0][:cut]) for text in texts[1:]) else 0


def _encode(tokenizer: Any, texts: list[str], add_special_tokens: bool, control_as_text: bool) -> list[list[int]]:
    if _is_plain_backend(tokenizer):
        # What calling the tokenizer does, without the offsets, masks and copies that it makes of each text.
        backend = _backend(tokenizer)
        before, backend.encode_special_tokens = backend.encode_special_tokens, control_as_text
        try:
            encoded = backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        finally:
            backend.encode_special_tokens = before
        return [encoding.ids for encoding in encoded]
    how: dict[str, Any] = {"split_special_tokens": control_as_text, "return_token_type_ids": False}
    if is_mistral_common(tokenizer):
        if not control_as_text:
            raise ValueError(
                "mistral-common reads no control tokens in text, which --allow_special_tokens_in_text asks for. Leave it out, or pass as "
                "processing_class a tokenizer from tokenizer.json: AutoTokenizer.from_pretrained(name, mistral_format=False)"
            )
        how = {}
    return tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        verbose=False,  # its warning about long texts comes before ours can cut them
        **how,
    )["input_ids"]


def _is_plain_backend(tokenizer: Any) -> bool:
    """Whether a call does no more than to ask the Rust tokenizer."""
    own = (type(tokenizer)._encode_plus, type(tokenizer).__call__) if isinstance(tokenizer, TokenizersBackend) else ()
    return own == (TokenizersBackend._encode_plus, TokenizersBackend.__call__)
