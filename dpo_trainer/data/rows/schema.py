"""Rows of any accepted form -> Pair. Which columns a row may have, and what they mean together.

    prompt         `prompt`, or `messages` or `conversations` (turns); none of them: what chosen and rejected share (implicit.py)
    completions    `chosen` and `rejected`, where `rejected` may be a list of several; or `completions` with `scores`
    token ids      `prompt_ids`, `chosen_ids`, `rejected_ids` (tokenized.py)

A prompt or a completion is a string, or chat messages (messages.py). Where one of a row is messages, its strings are
turns: of the user as the prompt, of the assistant as a completion. So they are under a column `system`.

Images of the prompt: `image`, or `images` (a list), for vision-language models (images/text.py).

Optional: `weight` (>= 0), `margin`, and for conversations `system`, `tools`, `chat_template_kwargs`; None counts as not
given. Every other column is the user's own and is not read. A bad row raises a ValueError that names the row, the
column, what is wrong and the way out.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ...types import Pair
from ..errors import bad
from ..images.source import images_of
from .column_names import OPTIONS, is_tokenized
from .conversation import pair_of_messages
from .implicit import split_texts
from .messages import without_none
from .ranking import is_number
from .row_fields import RowFields, find_row_fields, is_ranked

SMALLEST_WEIGHT, LARGEST_WEIGHT = 1e-30, 1e30
"""Of a row that counts. float32 goes from 1e-38 to 3e38: room for sums over many rows, and for their products with losses."""

SERIALIZED = re.compile(r"\s*\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:")


def form_of(row: Mapping[str, Any], where: str) -> str:
    """What kind of row this is, in a few words."""
    if is_tokenized(row):
        return "token ids"
    fields = find_row_fields(row, where)
    kind = "conversation" if _is_chat(row, fields) else "text"
    if any(_is_sharegpt(value) for value in fields.values.values()):
        kind = "ShareGPT conversation"
    if is_ranked(row):
        return f"{kind}, ranked list"
    if len(fields.names) > 2:
        return f"{kind}, list of rejected"
    return kind if fields.prompt else f"{kind}, implicit prompt"


def pair_from_row(row: Mapping[str, Any], where: str) -> Pair:
    """`where` names the row in errors: "Row 7 of train"."""
    return replace(_pair(row, where), images=tuple(images_of(row, where)))


def _pair(row: Mapping[str, Any], where: str) -> Pair:
    fields = find_row_fields(row, where)
    if _is_chat(row, fields):
        return pair_of_messages(row, fields, where)
    if all(SERIALIZED.match(text) for text in fields.values.values()):
        problem = "is the text of a list of messages, as a CSV file holds them"
        raise bad(where, next(iter(fields.values)), problem, "Give lists: a .jsonl or .parquet file can hold them")
    for option in OPTIONS:
        if not _is_empty_json(row.get(option)):
            raise bad(where, option, "is for conversations, and this row is text", "Give messages")
    if fields.prompt is not None:
        prompt, *completions = fields.values.values()
    else:
        prompt, *completions = split_texts(*fields.values.values())
    return Pair.of(prompt, completions, fields.pairs)


def weight_from_row(row: Mapping[str, Any], where: str) -> float:
    """The weight in the loss of each pair of the row, 1.0 when not given."""
    weight = row.get("weight")
    if weight is None:
        return 1.0
    if not is_number(weight) or weight < 0:
        raise bad(where, "weight", f"is {weight!r}", "Give a finite number of at least 0, or None for 1.0")
    if weight and not SMALLEST_WEIGHT <= weight <= LARGEST_WEIGHT:
        wanted = (
            f"Give 0 or a number from {SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:g}: only the ratio between weights counts"
        )
        raise bad(where, "weight", f"is {weight!r}, and sums of such weights do not fit into float32", wanted)
    return float(weight)


def _is_chat(row: Mapping[str, Any], fields: RowFields) -> bool:
    return "system" in row or any(not isinstance(value, str) for value in fields.values.values())


def _is_sharegpt(value: Any) -> bool:
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, Mapping) and first.get("from") is not None and first.get("role") is None


def _is_empty_json(value: Any) -> bool:
    return (
        not value or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null")) or not without_none(value)
    )
