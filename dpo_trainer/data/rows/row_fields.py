"""Which columns of a row hold its prompt and its completions, and which completions are preferred to which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...types import Preferred
from ..errors import bad
from .column_aliases import refuse_lost_prompt
from .column_kinds import kinds_of_values
from .column_names import PAIR, PROMPTS, check_columns
from .ranking import against_each, ranked


class RowFields(NamedTuple):
    """A row whose columns have been found, its values not yet looked into."""

    prompt: str | None  # the column; None: implicit
    values: dict[str, Any]  # by the name that errors give them: prompt, chosen, rejected[0] ..., completions[0] ...
    pairs: Sequence[Preferred]

    @property
    def names(self) -> list[str]:
        """Of the completions, as `pairs` counts them."""
        return [name for name in self.values if name != self.prompt]


def find_row_fields(row: Mapping[str, Any], where: str) -> RowFields:
    if is_ranked(row):
        completions, pairs = _of_ranked(row, where)
    elif set(PAIR) <= set(row):
        completions, pairs = _of_pair(row, where)
    else:
        check_columns(row, where, kinds_of_values(row))
        raise _is_none(where, "completions")
    prompt = _prompt_column(row, where)
    refuse_lost_prompt(row, prompt, completions if prompt is None else {prompt: row[prompt], **completions}, where)
    if prompt is None and len(completions) > 2:
        raise ValueError(f"{where} has several completions and no prompt. Give what they share in a column 'prompt'.")
    values = completions if prompt is None else {prompt: row[prompt], **completions}
    for name, value in values.items():
        _check_kind(value, where, name)
    return RowFields(prompt, values, pairs)


def _of_ranked(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Sequence[Preferred]]:
    """Completions by name, the best first, and the pairs among them."""
    completions = _several(row["completions"], or_messages=True)
    if completions is None or len(completions) < 2:
        remedy = "Give a list of strings, or of lists of messages"
        raise bad(where, "completions", "is no list of two or more", remedy)
    order, pairs = ranked(row, where)
    return {f"completions[{number}]": completions[number] for number in order}, pairs


def _of_pair(row: Mapping[str, Any], where: str) -> tuple[dict[str, Any], Sequence[Preferred]]:
    several = _several(row["rejected"])
    rejected = {"rejected": row["rejected"]}
    if several is not None:
        rejected = {f"rejected[{number}]": value for number, value in enumerate(several)}
    return {"chosen": row["chosen"], **rejected}, against_each(row, len(rejected), where)


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
