"""Which columns a row may have, and which of them hold its prompt, its completions and its preferences."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..batch import Preferred
from .errors import bad, clean
from .ranking import against_each, ranked

logger = logging.getLogger(__name__)

TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids")
PROMPTS = ("prompt", "messages", "conversations")
PAIR = ("chosen", "rejected")
RANKED = ("completions", "scores")
OPTIONS = ("system", "tools", "chat_template_kwargs")
PREPARED = ("example_id", "more_ids", "pairs", "unscored")
MOST = 30
"""How many columns an error lists."""
READ = (*PROMPTS, *PAIR, *RANKED, *OPTIONS, "weight", "margin", *TOKENIZED, *PREPARED)


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


class Parts(NamedTuple):
    """A row whose columns have been found, its values not yet looked into."""

    prompt: str | None  # the column; None: implicit
    values: dict[
        str, Any
    ]  # by the name that errors give them: prompt, chosen, rejected or rejected[0] ... or completions[0] ...
    pairs: Sequence[Preferred]

    @property
    def names(self) -> list[str]:
        """Of the completions, as `pairs` counts them."""
        return [name for name in self.values if name != self.prompt]


def find_parts(row: Mapping[str, Any], where: str) -> Parts:
    ranked_row = is_ranked(row)
    if not ranked_row and not set(PAIR) <= set(row):
        check_columns(row, where)
        raise _is_none(where, "completions")
    prompt = _prompt_column(row, where)
    values = {} if prompt is None else {prompt: row[prompt]}
    pairs: Sequence[Preferred]
    if ranked_row:
        completions = _several(row["completions"], or_messages=True)
        if completions is None or len(completions) < 2:
            raise bad(
                where, "completions", "is no list of two or more", "Give a list of strings, or of lists of messages"
            )
        order, pairs = ranked(row, where)
        values |= {f"completions[{number}]": completions[number] for number in order}
    else:
        rejected = _several(row["rejected"])
        named = {"rejected": row["rejected"]}
        if rejected is not None:
            named = {f"rejected[{number}]": value for number, value in enumerate(rejected)}
        values |= {"chosen": row["chosen"], **named}
        pairs = against_each(row, len(named), where)
    if prompt is None and len(values) > 2:
        raise ValueError(f"{where} has several completions and no prompt. Give what they share in a column 'prompt'.")
    for name, value in values.items():
        _check_kind(value, where, name)
    return Parts(prompt, values, pairs)


def is_ranked(row: Mapping[str, Any]) -> bool:
    """A table of mixed rows has all columns, and None where a row has another form."""
    return row.get("completions") is not None and row.get("chosen") is None and row.get("rejected") is None


def _prompt_column(row: Mapping[str, Any], where: str) -> str | None:
    present = [column for column in PROMPTS if column in row]
    filled = [column for column in present if row[column] is not None]
    if present and not filled:
        raise _is_none(where, present[0])
    return filled[0] if filled else None


def _several(value: Any, *, or_messages: bool = False) -> list | None:
    """The completions of a list that holds completions; a list with a message in it is one, unless `or_messages`."""
    if not isinstance(value, list | tuple) or not value:
        return None
    if any(isinstance(item, Mapping) for item in value):
        return list(value) if or_messages else None
    return list(value) if any(isinstance(item, str | list | tuple) for item in value) else None


def _check_kind(value: Any, where: str, column: str) -> None:
    if value is None:
        raise _is_none(where, column)
    if isinstance(value, list | tuple) and any(isinstance(item, str | list | tuple) for item in value):
        if _several(value) is None:
            raise bad(
                where, column, "is a list of messages and of strings or lists", "Give each answer as a list of its own"
            )
        raise bad(where, column, "is a list of texts", "Only 'rejected' and 'completions' may hold several")
    if not isinstance(value, str | list | tuple | Mapping):
        raise bad(where, column, f"is of type {type(value).__name__}", "Give a string or a list of messages")


def _is_none(where: str, column: str) -> ValueError:
    return bad(where, column, "is None", "Fill it in, or leave such rows out with dataset.filter")
