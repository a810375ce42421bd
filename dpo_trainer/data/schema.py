"""Rows of any accepted form -> Pair, or token ids for rows that are tokenized already.

    strings           prompt, chosen, rejected             str
    conversations     prompt, chosen, rejected             lists of {"role", "content"}
    implicit prompt   chosen, rejected                     two whole texts, transcripts or conversations (implicit.py)
    token ids         prompt_ids, chosen_ids, rejected_ids

Optional columns: `weight` (>= 0), and for conversations `tools` (list or JSON) and `chat_template_kwargs` (dict or
JSON); None counts as not given. Every other column is the user's own and is not read. A bad row raises a ValueError
that names the row, the column, what is wrong and the way out.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from ..batch import Message, Pair
from .implicit import split_messages, split_texts

TOKENIZED = ("prompt_ids", "chosen_ids", "rejected_ids")
READ = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs", "weight", *TOKENIZED, "example_id")
OURS = {"conversation", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict"}
"""What `chat_template_kwargs` may not set: the pipeline does."""


def is_tokenized(columns: Iterable[str]) -> bool:
    return set(TOKENIZED) <= set(columns)


def unread_columns(columns: Iterable[str]) -> list[str]:
    return [column for column in columns if column not in READ]


def check_columns(columns: Iterable[str], where: str) -> None:
    """Refuse columns that no form fits, and a misspelt `prompt`, which would silently make the prompt implicit."""
    columns = list(columns)
    if is_tokenized(columns):
        return
    half_tokenized = set(TOKENIZED) & set(columns) and not {"chosen", "rejected"} <= set(columns)
    missing = [c for c in (TOKENIZED if half_tokenized else ("chosen", "rejected")) if c not in columns]
    if missing:
        hints = "".join(_rename_hint(column, columns, cutoff=0.6) for column in missing)
        raise ValueError(
            f"{where} has no column {' and no column '.join(map(repr, missing))} (it has: {', '.join(columns)}).{hints} "
            "A pair needs 'chosen' and 'rejected', with or without 'prompt', or all of " + ", ".join(TOKENIZED) + "."
        )
    hint = "" if "prompt" in columns else _rename_hint("prompt", columns, cutoff=0.82)
    if hint:
        raise ValueError(f"{where} has no column 'prompt', but one that looks like it.{hint} Or remove it.")


def _rename_hint(wanted: str, columns: list[str], cutoff: float) -> str:
    by_lower = {column.lower(): column for column in unread_columns(columns)}
    close = [by_lower[c] for c in difflib.get_close_matches(wanted, by_lower, n=1, cutoff=cutoff)]
    return f" Is {close[0]!r} meant? dataset.rename_column({close[0]!r}, {wanted!r})." if close else ""


def pair_from_row(row: Mapping[str, Any], where: str) -> Pair:
    """`where` names the row in errors: "Row 7 of train"."""
    if not {"chosen", "rejected"} <= set(row):
        check_columns(row, where)
    columns = [column for column in ("prompt", "chosen", "rejected") if column in row]
    forms = {column: _form(row[column], where, column) for column in columns}
    if len(set(forms.values())) > 1:
        raise _mixed_forms(row, where, forms)
    options = _template_options(row, where)
    if forms["chosen"] == "text":
        if options:
            raise _bad(where, next(iter(options)), "is for conversations, and this row is text", "Give messages")
        return _text_pair(row, where)
    messages = {column: _messages(row[column], where, column) for column in columns}
    prompt, chosen, rejected = _message_parts(messages, where)
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected, **options)


def token_ids_from_row(row: Mapping[str, Any], where: str) -> tuple[list[int], list[int], list[int]]:
    """prompt, chosen, rejected of a row that is tokenized already."""
    prompt, chosen, rejected = (_token_ids(row[column], where, column) for column in TOKENIZED)
    return prompt, chosen, rejected


def example_id_from_row(row: Mapping[str, Any], where: str) -> int | None:
    """The id that a tokenized row brings along."""
    example_id = row.get("example_id")
    if example_id is not None and (isinstance(example_id, bool) or not isinstance(example_id, int)):
        raise _bad(where, "example_id", f"is {example_id!r}", "Give an integer, or remove the column")
    return example_id


def is_blank(completion: str | list[Message]) -> bool:
    """Whether a completion says nothing: not an error, for real data has some, but nothing to learn from."""
    if isinstance(completion, str):
        return not completion.strip()
    return not any(turn.get("content", "").strip() or turn.get("tool_calls") for turn in completion)


def weight_from_row(row: Mapping[str, Any], where: str) -> float:
    """The pair's weight in the loss, 1.0 when not given."""
    weight = row.get("weight")
    if weight is None:
        return 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        raise _bad(where, "weight", f"is {weight!r}", "Give a finite number of at least 0, or None for 1.0")
    return float(weight)


def _bad(where: str, column: str, problem: str, remedy: str) -> ValueError:
    return ValueError(f"{where}, column {column!r}: {problem}. {remedy}.")


def _form(value: Any, where: str, column: str) -> str:
    if value is None:
        raise _bad(where, column, "is None", "Fill it in, or leave such rows out with dataset.filter")
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "messages"
    remedy = "Put the message into a list" if isinstance(value, Mapping) else "Give a string or a list of messages"
    raise _bad(where, column, f"is of type {type(value).__name__}", remedy)


def _mixed_forms(row: Mapping[str, Any], where: str, forms: dict[str, str]) -> ValueError:
    remedy = "Give all as strings, or all as lists of messages"
    first = row["chosen"][0] if row["chosen"] else None
    if forms.get("prompt") == "text" and isinstance(first, Mapping) and first.get("role") != "assistant":
        remedy += "; here 'chosen' holds the prompt's turn already: dataset.remove_columns('prompt')"
    kinds = ", ".join(f"{column!r} is {'a string' if form == 'text' else 'a list'}" for column, form in forms.items())
    return ValueError(f"{where} mixes forms: {kinds}. {remedy}.")


def _text_pair(row: Mapping[str, Any], where: str) -> Pair:
    if "prompt" in row:
        return Pair(prompt=row["prompt"], chosen=row["chosen"], rejected=row["rejected"])
    prompt, chosen, rejected = split_texts(row["chosen"], row["rejected"])
    return Pair(prompt=prompt, chosen=chosen, rejected=rejected)


def _messages(value: list, where: str, column: str) -> list[Message]:
    if not value:
        raise _bad(where, column, "is an empty list", "Give at least one message, or leave the row out")
    return [_message(message, where, f"{column}[{turn}]") for turn, message in enumerate(value)]


def _message(message: Any, where: str, column: str) -> Message:
    """The message without its None entries: tables fill every message with the keys of all others."""
    if not isinstance(message, Mapping):
        raise _bad(where, column, f"is of type {type(message).__name__}", 'Give {"role": ..., "content": ...}')
    role, content = message.get("role"), message.get("content")
    if role is None or (content is None and not message.get("tool_calls")):
        hint = ", not from and value" if {"from", "value"} <= set(message) else ""
        missing = "role" if role is None else "content"
        problem = f"has no {missing} (it has: {', '.join(message)})"
        raise _bad(where, column, problem, f"A message needs role and content{hint}")
    if not isinstance(role, str) or not role.strip():
        raise _bad(where, column, f"has the role {role!r}", "Give a name such as user or assistant")
    if content is not None and not isinstance(content, str):
        raise _bad(where, column, f"has content of type {type(content).__name__}", "Give the content as one string")
    return _without_none(message)


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list | tuple) else value


def _message_parts(messages: dict[str, list[Message]], where: str) -> tuple[list[Message], ...]:
    """prompt, chosen, rejected, with completions that are an assistant's."""
    chosen, rejected = messages["chosen"], messages["rejected"]
    if "prompt" in messages:
        prompt = messages["prompt"]
    else:
        prompt, chosen, rejected = split_messages(chosen, rejected)
        if not prompt:
            raise ValueError(
                f"{where}: 'chosen' and 'rejected' share no first turn that an assistant answers in both, so there is no "
                "prompt. Give the shared turns in a column 'prompt'."
            )
    _check_completion(chosen, where, "chosen")
    _check_completion(rejected, where, "rejected")
    return prompt, chosen, rejected


def _check_completion(completion: list[Message], where: str, column: str) -> None:
    for turn, message in enumerate(completion):
        role = message["role"]
        if role != "assistant" and turn == 0:
            remedy = "Move the turns before it to 'prompt', or remove the column 'prompt' if both repeat it"
            raise _bad(where, column, f"starts with a {role!r} turn; a completion starts with 'assistant'", remedy)
        if role != "assistant":
            problem = f"has a {role!r} turn inside the completion, which would be scored as the model's own words"
            raise _bad(where, column, problem, "End the completion before it, or move shared turns to 'prompt'")


def _template_options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs`, where the row has any."""
    options = {
        "tools": _json_value(row.get("tools"), list, where, "tools"),
        "chat_template_kwargs": _json_value(row.get("chat_template_kwargs"), dict, where, "chat_template_kwargs"),
    }
    if not all(isinstance(tool, dict) for tool in options["tools"] or ()):
        raise _bad(where, "tools", "holds something else than JSON objects", "Describe each tool by its JSON schema")
    reserved = sorted(OURS & set(options["chat_template_kwargs"] or ()))
    if reserved:
        raise _bad(where, "chat_template_kwargs", f"sets {', '.join(reserved)}, which is set for you", "Remove it")
    return {name: value for name, value in options.items() if value}


def _json_value(value: Any, kind: type, where: str, column: str) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise _bad(where, column, f"is not JSON ({error})", "Mend it, or give None") from None
    else:
        value = _without_none(value)
    if value is not None and not isinstance(value, kind):
        raise _bad(where, column, f"is of type {type(value).__name__}", f"Give a {kind.__name__}, its JSON, or None")
    return value


def _token_ids(value: Any, where: str, column: str) -> list[int]:
    """A non-empty list of ids, checked as an array: a row may hold thousands."""
    remedy = "Give at least one token id, each an integer of at least 0"
    if value is None or not isinstance(value, list | tuple) or not len(value):
        raise _bad(where, column, "is None" if value is None else f"is {value!r:.40}", remedy)
    try:
        ids = np.asarray(value)
    except ValueError:
        raise _bad(where, column, "is nested", remedy) from None
    if ids.ndim != 1 or ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > np.iinfo(np.int32).max:
        raise _bad(where, column, f"holds something else than token ids: {value!r:.60}", remedy)
    return list(value)
