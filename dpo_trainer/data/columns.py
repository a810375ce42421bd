"""Which columns a dataset may have, what is said about those that are missing, misspelt or not read."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable

from .errors import clean

logger = logging.getLogger(__name__)

TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids")
PROMPTS = ("prompt", "messages", "conversations")
PAIR = ("chosen", "rejected")
RANKED = ("completions", "scores")
OPTIONS = ("system", "tools", "chat_template_kwargs")
PREPARED = ("example_id", "more_ids", "pairs", "unscored")
IMAGES = ("image", "images")
REFUSED = ("video", "videos", "audio", "audios")
"""Read only to say that they cannot be trained on: a model would answer for what it never saw."""
MOST = 30
"""How many columns an error lists."""
READ = (*PROMPTS, *PAIR, *RANKED, *OPTIONS, "weight", "margin", *IMAGES, *REFUSED, *TOKENIZED, *PREPARED)


def is_tokenized(columns: Iterable[str]) -> bool:
    return set(TOKENIZED) <= set(columns)


def unread_columns(columns: Iterable[str]) -> list[str]:
    return [column for column in columns if column not in READ]


def read_columns(columns: Iterable[str]) -> list[str]:
    return [column for column in columns if column in READ]


def announce_unread(columns: Iterable[str], where: str) -> None:
    """Say which columns are not read where one of them may have been meant: beside an implicit prompt, or two forms."""
    columns = list(columns)
    if is_tokenized(columns):
        return
    unread = unread_columns(columns)
    if unread and set(PAIR) <= set(columns) and not set(PROMPTS) & set(columns):
        names = ", ".join(map(clean, unread[:MOST]))
        logger.warning(
            "%s has no column 'prompt': prompts are what 'chosen' and 'rejected' share. Columns that are not read: %s.",
            where,
            names,
        )
    if set(PAIR + RANKED) <= set(columns):
        logger.warning(
            "%s has 'chosen' and 'rejected': where they are filled, 'completions' and 'scores' are not read.", where
        )


def check_columns(columns: Iterable[str], where: str) -> None:
    """Refuse columns that no form fits, and a misspelt `prompt`, which would silently make the prompt implicit."""
    columns = list(columns)
    if is_tokenized(columns) or set(RANKED) <= set(columns):
        return
    wanted = next((form for form in (PAIR, TOKENIZED, RANKED) if set(form) & set(columns)), PAIR)
    missing = [column for column in wanted if column not in columns]
    if missing:
        hints = "".join(_rename_hint(column, columns, cutoff=0.6) for column in missing)
        have = ", ".join(map(clean, columns[:MOST])) + ", ..." * (len(columns) > MOST)
        raise ValueError(
            f"{where} has no column {' and no column '.join(map(repr, missing))} (it has: {have}).{hints} "
            "A row needs 'chosen' and 'rejected', with or without 'prompt'; or 'prompt', 'completions' and 'scores'; or all "
            f"of {', '.join(TOKENIZED)}. Other names: --columns prompt=question,chosen=best."
        )
    hint = "" if set(PROMPTS) & set(columns) else _rename_hint("prompt", columns, cutoff=0.82)
    if hint:
        raise ValueError(f"{where} has no column 'prompt', but one that looks like it.{hint} Or remove it.")


def _rename_hint(wanted: str, columns: list[str], cutoff: float) -> str:
    by_lower = {column.lower(): column for column in unread_columns(columns)}
    close = [by_lower[c] for c in difflib.get_close_matches(wanted, by_lower, n=1, cutoff=cutoff)]
    name = clean(close[0]) if close else ""
    return f" Is {name!r} meant? dataset.rename_column({name!r}, {wanted!r})." if close else ""
