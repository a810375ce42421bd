"""Which columns a dataset may have, what is said about those that are missing, misspelt or not read."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from ..errors import clean
from ..images.source import IMAGES, REFUSED
from .column_aliases import columns_option, context_like, other_name, prompt_like, two_answers
from .column_kinds import fits

logger = logging.getLogger(__name__)

TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids")
PROMPTS = ("prompt", "messages", "conversations")
PAIR = ("chosen", "rejected")
RANKED = ("completions", "scores")
OPTIONS = ("system", "tools", "chat_template_kwargs")
PREPARED = ("example_id", "more_ids", "pairs", "unscored")
MOST = 30
"""How many columns an error lists."""
READ = (*PROMPTS, *PAIR, *RANKED, *OPTIONS, "weight", "margin", *IMAGES, *REFUSED, *TOKENIZED, *PREPARED)


def is_tokenized(columns: Iterable[str]) -> bool:
    return set(TOKENIZED) <= set(columns)


def unread_columns(columns: Iterable[str]) -> list[str]:
    return [column for column in columns if column not in READ]


def read_columns(columns: Iterable[str]) -> list[str]:
    return [column for column in columns if column in READ]


def compared_columns(columns: Iterable[str]) -> list[str]:
    """Those that are not read, but looked into: a row without a prompt may have it there (`column_aliases.py`)."""
    columns = list(columns)
    return [] if is_tokenized(columns) else [name for name in unread_columns(columns) if prompt_like(name)]


def announce_unread(columns: Iterable[str], where: str, kinds: Mapping[str, str] | None = None) -> None:
    """Say which columns are not read where one of them may have been meant: beside an implicit prompt, beside a prompt that
    they may belong to, or of two forms."""
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
    beside = [
        name for name in unread if context_like(name) and (kinds or {}).get(name) in ("text", "texts", "messages")
    ]
    if beside and set(PROMPTS) & set(columns):
        logger.warning(
            "%s has columns beside its prompt that are not read: %s. Where the model shall see them, put them into the "
            "prompt, or (a system message) name them in --columns system=NAME; where not, --columns %s= leaves one out.",
            where,
            ", ".join(map(clean, beside)),
            clean(beside[0]),
        )
    if set(PAIR + RANKED) <= set(columns):
        logger.warning(
            "%s has 'chosen' and 'rejected': where they are filled, 'completions' and 'scores' are not read.", where
        )


def check_columns(columns: Iterable[str], where: str, kinds: Mapping[str, str] | None = None) -> None:
    """Refuse columns that no form fits, and a misspelt `prompt`, which would silently make the prompt implicit.

    `kinds` (column_kinds.py): what the columns hold, where it is known. No advice names a column of another kind.
    """
    columns = list(columns)
    if is_tokenized(columns) or set(RANKED) <= set(columns):
        return
    unread = {name: (kinds or {}).get(name, "unknown") for name in unread_columns(columns)}
    wanted = next((form for form in (PAIR, TOKENIZED, RANKED) if set(form) & set(columns)), PAIR)
    missing = [column for column in wanted if column not in columns]
    if missing:
        have = ", ".join(map(clean, columns[:MOST])) + ", ..." * (len(columns) > MOST)
        raise ValueError(
            f"{where} has no column {' and no column '.join(map(repr, missing))} (it has: {have})."
            f"{_advice(missing, columns, unread)} "
            "A row needs 'chosen' and 'rejected', with or without 'prompt'; or 'prompt', 'completions' and 'scores'; or all "
            f"of {', '.join(TOKENIZED)}. Other names: --columns prompt=question,chosen=best."
        )
    meant = None if set(PROMPTS) & set(columns) else other_name("prompt", _fitting("prompt", unread), cutoff=0.82)
    if meant is not None and not prompt_like(
        meant
    ):  # the rows tell whether it is read: `column_aliases.refuse_lost_prompt`
        raise ValueError(
            f"{where} has no column 'prompt', but one that looks like it.{_meant({'prompt': meant})} Or leave it out: "
            f"--columns {columns_option({meant: ''})}."
        )


def _fitting(ours: str, unread: Mapping[str, str]) -> list[str]:
    return [name for name, kind in unread.items() if fits(kind, ours)]


def _advice(missing: list[str], columns: list[str], unread: Mapping[str, str]) -> str:
    """What the missing columns may be called here, or how to make them of what is here; "" where nothing is known."""
    found: dict[str, str] = {}
    for ours in missing:
        name = other_name(ours, [c for c in _fitting(ours, unread) if c not in found.values()], cutoff=0.6)
        if name is not None:
            found[ours] = name
    if len(found) < len(missing) and (code := two_answers(columns, unread)):
        return f" {code}"
    if found and len(found) == len(missing) and not set((*PROMPTS, "prompt_ids")) & set(columns):
        left = [name for name in _fitting("prompt", unread) if name not in found.values()]
        prompt = other_name("prompt", left, cutoff=0.82)
        found = ({"prompt": prompt} if prompt is not None else {}) | found
    return _meant(found) if found else ""


def _meant(found: Mapping[str, str]) -> str:
    names = " and ".join(repr(clean(theirs)) for theirs in found.values())
    python = "".join(f".rename_column({clean(theirs)!r}, {ours!r})" for ours, theirs in found.items())
    are = "Are" if len(found) > 1 else "Is"
    return f" {are} {names} meant? --columns {columns_option(found)} (in Python: dataset{python})."
