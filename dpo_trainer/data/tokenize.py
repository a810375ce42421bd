"""Pair -> token ids, as the model would meet them: the template applied once, prompt and completion tokenized together.

A tokenizer may join the end of a prompt and the beginning of a completion into one token. So three texts are tokenized:
the prompt, the prompt with the chosen and the prompt with the rejected completion. The prompt of the pair is what the
three have in common from the start, and each completion is the rest of its own text.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from datasets.fingerprint import Hasher

from ..batch import Message, Pair
from .implicit import shared_length
from .report import Flag
from .schema import is_blank
from .truncate import PairIds

logger = logging.getLogger(__name__)


class _Texts(NamedTuple):
    """One pair as text; `chosen` and `rejected` start with the prompt, or with what the template makes of it."""

    prompt: str
    chosen: str
    rejected: str
    templated: bool


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
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"padding": None, "truncation": None}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    everything = [content, tokenizer.chat_template, special, getattr(tokenizer, "split_special_tokens", False)]
    return hashlib.blake2b(json.dumps(everything, sort_keys=True).encode(), digest_size=16).hexdigest()


def tokenize_pairs(pairs: Sequence[Pair], tokenizer: Any, where: Sequence[str]) -> list[PairIds]:
    """Token ids of each pair, in order; `where` names the rows in errors.

    One tokenizer call for all texts (two when the pairs mix plain text and conversations). Plain text gets the special
    tokens that the tokenizer adds by itself, but never a second BOS, and an EOS after each completion that lacks one;
    for conversations the chat template decides both.
    """
    texts = [_texts(pair, tokenizer, row) for pair, row in zip(pairs, where, strict=True)]
    ids: list[list[list[int]]] = [[]] * len(texts)
    for templated in (False, True):
        at = [index for index, text in enumerate(texts) if text.templated == templated]
        for index, three in zip(at, _encode(tokenizer, [texts[i] for i in at], [where[i] for i in at]), strict=True):
            ids[index] = three
    return [_pair_ids(*row, tokenizer) for row in zip(pairs, texts, ids, where, strict=True)]


def _texts(pair: Pair, tokenizer: Any, where: str) -> _Texts:
    if isinstance(pair.prompt, str) or isinstance(pair.chosen, str) or isinstance(pair.rejected, str):
        return _Texts(
            f"{pair.prompt}", f"{pair.prompt}{pair.chosen}", f"{pair.prompt}{pair.rejected}", templated=False
        )
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} is a conversation, and the tokenizer has no chat template. Set tokenizer.chat_template to the one the "
            "model is to be used with, or give the row as plain strings."
        )

    def render(messages: list[Message], **how: bool) -> str:
        return tokenizer.apply_chat_template(
            messages, tools=pair.tools, tokenize=False, **how, **pair.chat_template_kwargs
        )

    continued = pair.prompt[-1]["role"] == "assistant"
    try:
        prompt = render(pair.prompt, add_generation_prompt=not continued, continue_final_message=continued)
        chosen = render(_joined(pair.prompt, pair.chosen))
        rejected = render(_joined(pair.prompt, pair.rejected))
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise ValueError(
            f"{where}: the chat template refuses these messages: {error}. Change their roles or order, or the template."
        ) from error
    return _Texts(prompt, chosen, rejected, templated=True)


def _joined(prompt: list[Message], completion: list[Message]) -> list[Message]:
    """Prompt and completion as one conversation. A prompt that ends in an assistant turn is continued, not answered anew."""
    last, first = prompt[-1], completion[0]
    if last["role"] != "assistant":
        return [*prompt, *completion]
    return [
        *prompt[:-1],
        {**last, **first, "content": last.get("content", "") + first.get("content", "")},
        *completion[1:],
    ]


def _encode(tokenizer: Any, texts: list[_Texts], where: list[str]) -> list[list[list[int]]]:
    """[3] lists of token ids for each pair; all pairs are templated, or none is."""
    if not texts:
        return []
    try:
        ids = tokenizer(
            [text for pair in texts for text in pair[:3]],
            add_special_tokens=not texts[0].templated,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # its warning about long texts comes before ours can cut them
        )["input_ids"]
    except Exception as error:  # such as an unknown word without an UNK token, or half of a surrogate pair
        if len(texts) == 1:
            raise ValueError(
                f"{where[0]}: the tokenizer refuses this text: {error}. Mend the text, or leave it out."
            ) from error
        return [_encode(tokenizer, [pair], [row])[0] for pair, row in zip(texts, where, strict=True)]
    return [ids[start : start + 3] for start in range(0, len(ids), 3)]


def _pair_ids(pair: Pair, texts: _Texts, ids: list[list[int]], where: str, tokenizer: Any) -> PairIds:
    """Cut the three tokenized texts at the boundary that they share."""
    bos, eos, flags = tokenizer.bos_token_id, eos_token_id(tokenizer), 0
    if not texts.templated:
        ids = [_without_second_bos(text, bos) for text in ids]
    prompt, chosen, rejected = ids
    if not texts.templated and prompt[-1:] == [eos] and not texts.prompt.endswith(tokenizer.eos_token):
        prompt = prompt[:-1]  # the tokenizer's own EOS, after a text that does not end there
    end = min(shared_length(prompt, chosen), shared_length(prompt, rejected))
    flags |= Flag.MERGED_BOUNDARY * (end < len(prompt))
    prompt, chosen, rejected = prompt[:end], chosen[end:], rejected[end:]
    prompt = prompt or [_bos_instead_of_prompt(bos, where)]
    flags |= Flag.EMPTY_PROMPT * (prompt == [bos])
    if is_blank(pair.chosen) or is_blank(pair.rejected):
        return PairIds(prompt, chosen, rejected, flags | Flag.EMPTY_COMPLETION)
    if not isinstance(pair.chosen, str) or not isinstance(pair.rejected, str):
        _check_template_wrote(chosen, rejected, where)
        return PairIds(prompt, chosen, rejected, flags)
    chosen = _ended(chosen, pair.chosen, tokenizer, f"{where}, column 'chosen'")
    rejected = _ended(rejected, pair.rejected, tokenizer, f"{where}, column 'rejected'")
    return PairIds(prompt, chosen, rejected, flags)


def _ended(completion: list[int], text: str, tokenizer: Any, where: str) -> list[int]:
    """The completion with one EOS at its end."""
    eos = tokenizer.eos_token_id
    if not completion or (completion == [eos] and tokenizer.eos_token not in text):
        raise ValueError(
            f"{where}: the tokenizer makes no token of {text[:40]!r}. Leave such rows out with dataset.filter, or use a "
            "tokenizer that knows these characters."
        )
    return completion if completion[-1] == eos else [*completion, eos]


def _check_template_wrote(chosen: list[int], rejected: list[int], where: str) -> None:
    for column, completion in (("chosen", chosen), ("rejected", rejected)):
        if not completion:
            raise ValueError(
                f"{where}, column {column!r}: the chat template writes nothing for this completion. Use a template that "
                "writes assistant turns."
            )


def _bos_instead_of_prompt(bos: int | None, where: str) -> int:
    if bos is None:
        raise ValueError(
            f"{where}: the prompt has no token of its own, so nothing predicts the first token of the completions, and the "
            "tokenizer has no BOS token to stand in. Give a prompt, or set tokenizer.bos_token."
        )
    return bos


def _without_second_bos(ids: list[int], bos: int | None) -> list[int]:
    """The text itself began with BOS, and the tokenizer put another before it."""
    return ids[1:] if bos is not None and ids[:2] == [bos, bos] else ids
