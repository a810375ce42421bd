"""Pair -> token ids, as the model would meet them: the template applied once, prompt and completion tokenized together.

A tokenizer may join the end of a prompt and the beginning of a completion into one token. So the prompt is tokenized
alone and with each completion: the prompt of the row is what these have in common from the start, and each completion is
the rest of its own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...types import ONE_PAIR, Flag, Pair, PairIds, Span, Text
from ..errors import clean
from ..images.text import ImageText
from ..rows.implicit import shared_length
from ..rows.messages import is_blank
from .encode import encode_from_one_head
from .render import Rendered, control_tokens, render, render_prompt
from .rendering import completion_name
from .special_tokens import SpecialTokens


def tokenize_pairs(
    pairs: Sequence[Pair],
    tokenizer: Any,
    where: Sequence[str],
    *,
    allow_special_tokens_in_text: bool = False,
    images: ImageText | None = None,
) -> list[PairIds]:
    """Token ids of each row, in order; `where` names the rows in errors.

    One tokenizer call for all texts (two when the rows mix plain text and conversations), no text twice. Plain text gets
    the special tokens that the tokenizer adds by itself, but never a second BOS, and an EOS after each completion that
    lacks one; for conversations the chat template decides both. The text of a special token inside a row is text, unless
    `allow_special_tokens_in_text`. `images` writes the images of rows into their prompts, where a processor is there.
    """
    control = None if allow_special_tokens_in_text else control_tokens(tokenizer)
    rows = [render(pair, tokenizer, row, control, images) for pair, row in zip(pairs, where, strict=True)]
    ids = _encode_all(tokenizer, rows, where, allow_special_tokens_in_text)
    special = SpecialTokens.of(tokenizer)
    out = [_pair_ids(*row, special) for row in zip(pairs, rows, ids, where, strict=True)]
    return out if images is None else [images.guarded(row, at) for row, at in zip(out, where, strict=True)]


def tokenize_prompts(
    prompts: Sequence[Text], tokenizer: Any, where: Sequence[str], *, allow_special_tokens_in_text: bool = False
) -> list[list[int]]:
    """Token ids of each prompt, up to where its answer begins, by the rules of `tokenize_pairs`."""
    control = None if allow_special_tokens_in_text else control_tokens(tokenizer)
    rows = [render_prompt(prompt, tokenizer, row, control) for prompt, row in zip(prompts, where, strict=True)]
    encoded = _encode_all(tokenizer, rows, where, allow_special_tokens_in_text)
    special = SpecialTokens.of(tokenizer)
    return [
        _prompt_ids(row, ids[0], special) or [special.bos_instead_of_prompt(at)]
        for row, ids, at in zip(rows, encoded, where)
    ]


def _encode_all(tokenizer: Any, rows: list[Rendered], where: Sequence[str], allow_special: bool) -> list[list]:
    """Of each row, the token ids of all its texts: plain text, that with images, and conversations by one call each."""
    ids: list[list] = [[]] * len(rows)
    for templated, images in ((False, False), (False, True), (True, None)):
        at = [i for i, row in enumerate(rows) if row.templated == templated and images in (None, row.images)]
        how = {"add_special_tokens": not templated, "control_as_text": not (templated or images or allow_special)}
        encoded = _encode_rows(tokenizer, [rows[i] for i in at], [where[i] for i in at], **how)
        for index, of_row in zip(at, encoded, strict=True):
            ids[index] = of_row
    return ids


def _prompt_ids(texts: Rendered, ids: list[int], special: SpecialTokens) -> list[int]:
    if texts.templated:
        return ids
    return special.without_own_eos(special.without_second_bos(ids), f"{texts.prompt}", as_text=texts.control_text)


def _encode_rows(tokenizer: Any, rows: list[Rendered], where: list[str], **how: bool) -> list[list]:
    """Token ids of all texts of each row, in the order of `Rendered.all`."""
    texts = [row.all for row in rows if isinstance(row.prompt, str)]
    try:
        ids = iter(encode_from_one_head(tokenizer, texts, **how) if texts else ())
    except Exception as error:  # such as an unknown word without an UNK token, or half of a surrogate pair
        if len(rows) == 1:
            raise ValueError(
                f"{where[0]}: the tokenizer refuses this text: {clean(error)}. Mend the text, or leave it out."
            ) from error
        return [_encode_rows(tokenizer, [row], [name], **how)[0] for row, name in zip(rows, where, strict=True)]
    return [next(ids) if isinstance(row.prompt, str) else row.all for row in rows]


def _pair_ids(pair: Pair, texts: Rendered, ids: list[list[int]], where: str, special: SpecialTokens) -> PairIds:
    """Cut the tokenized texts of a row at the boundary that they share."""
    count = len(pair.completions)
    prompt = _prompt_ids(texts, ids[0], special)
    if not texts.templated:
        ids = [special.without_second_bos(text) for text in ids]
    wholes, edges = ids[1 : 1 + count], iter(ids[1 + count :])
    blank = [is_blank(completion) for completion in pair.completions]
    end = _shared_end(prompt, wholes, blank)
    if texts.templated and not end:
        raise ValueError(
            f"{where}: what the chat template makes of the whole conversation does not begin with what it makes of the "
            "prompt. Use a template that keeps the prompt in front of the answer."
        )
    unscored = tuple(
        span
        for number, of_completion in enumerate(texts.edges)
        for span in _unscored(number, wholes[number], [next(edges) for _ in of_completion], prompt, end)
    )
    flags = (
        Flag.MERGED_BOUNDARY * (end < len(prompt))
        | Flag.CONTROL_TEXT * texts.control_text
        | Flag.TIED * (not pair.pairs)
        | texts.flags
    )
    prompt = prompt[:end] or [special.bos_instead_of_prompt(where)]
    flags |= Flag.EMPTY_PROMPT * (prompt == [special.bos])
    completions = [whole[end:] for whole in wholes]
    for number, text in enumerate(pair.completions):
        if not (texts.templated or blank[number]):
            at = f"{where}, column {completion_name(number, count)!r}"
            completions[number] = special.ended(completions[number], f"{text}", at)
    row = PairIds(prompt, completions, pair.pairs or ONE_PAIR, unscored, flags)
    if not any(blank):
        return row
    return row.drop_pairs(lambda of: blank[of.chosen] or blank[of.rejected], Flag.EMPTY_COMPLETION)


def _shared_end(prompt: list[int], wholes: list[list[int]], blank: list[bool]) -> int:
    """How much of the prompt stands before every completion that says something."""
    says = [whole for whole, nothing in zip(wholes, blank, strict=True) if not nothing]
    return min(shared_length(prompt, whole) for whole in says or wholes)


def _unscored(number: int, whole: list[int], edges: list[list[int]], prompt: list[int], end: int) -> list[Span]:
    """The tokens of a completion outside the stretches that `edges` begin and end, in turn; none without edges.

    The completion begins at `end` of the whole, where the prompt may not have ended yet: what it gave up to a token that
    spans its end is scored, as in a completion of one turn.
    """
    if not edges:
        return []
    at = [0 if edge == prompt else max(0, shared_length(edge, whole) - end) for edge in edges]
    outside = zip([0, *at[1::2]], [*at[::2], len(whole) - end], strict=True)
    return [(number, start, stop) for start, stop in outside if start < stop]
