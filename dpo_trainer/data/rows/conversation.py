"""A row of chat messages -> the prompt's turns and each completion's."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from ...types import Message, Pair
from ..errors import bad
from .column_aliases import columns_option
from .implicit import split_messages
from .messages import image_count, read_messages, roles_are_renamed, without_none, words_of
from .row_fields import RowFields

OURS = {
    *(set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) - {"documents", "kwargs"}),
    *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
    "messages",
    "conversations",
}
"""What `chat_template_kwargs` may not set: the pipeline does, or the tokenizer."""


def pair_of_messages(row: Mapping[str, Any], fields: RowFields, where: str) -> Pair:
    if fields.prompt is None and all(isinstance(value, str) for value in fields.values.values()):
        raise bad(where, "system", "needs a prompt to stand before", "Give the prompt in a column of its own")
    messages = {name: _turns(value, name == fields.prompt, where, name) for name, value in fields.values.items()}
    completions = [messages[name] for name in fields.names]
    if fields.prompt is None:
        prompt, *completions = _split(completions, where)
    else:
        _check_asks(messages[fields.prompt], completions[0], fields.prompt, where)
        prompt, *completions = _without_repeated_prompt(messages[fields.prompt], completions, row[fields.prompt])
    for name, completion in zip(fields.names, completions, strict=True):
        _check_completion(completion, where, name, fields.prompt)
    prompt = _with_system(prompt, row.get("system"), where)
    renamed = any(map(roles_are_renamed, fields.values.values()))
    return Pair.of(prompt, completions, fields.pairs, roles_renamed=renamed, **_template_options(row, where))


def _turns(value: Any, is_prompt: bool, where: str, column: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": "user" if is_prompt else "assistant", "content": value}]
    return read_messages(value, where, column)


def _split(completions: list[list[Message]], where: str) -> tuple[list[Message], ...]:
    split = split_messages(*completions)
    if not split[0]:
        raise ValueError(
            f"{where}: 'chosen' and 'rejected' share no first turn that an assistant answers in both, so there is no "
            "prompt. Give the shared turns in a column 'prompt'."
        )
    return split


def _without_repeated_prompt(
    prompt: list[Message], completions: list[list[Message]], given: Any
) -> tuple[list[Message], ...]:
    """A string prompt that stands again in whole conversations beside it is the last turn that they all share."""
    if isinstance(given, str) and len(completions) == 2:
        shared, *rest = split_messages(*completions)
        if shared and words_of(shared[-1]).strip() == given.strip():
            return shared, *rest
    return prompt, *completions


def _check_asks(prompt: list[Message], chosen: list[Message], column: str, where: str) -> None:
    """Refuse a prompt that holds the chosen answer already: the model would learn to give it twice."""
    answer = words_of(prompt[-1]).strip()
    if prompt[-1]["role"] != "assistant" or not answer or answer != words_of(chosen[-1]).strip():
        return
    if chosen[0]["role"] != "assistant":
        remedy = (
            f"Leave it out, for 'chosen' and 'rejected' repeat the prompt: --columns {columns_option({column: ''})}"
        )
    else:
        remedy = f'End it before the answer: dataset.map(lambda row: {{"{column}": row["{column}"][:-1]}})'
    raise bad(where, column, "ends with the answer that 'chosen' gives", remedy)


def _check_completion(completion: list[Message], where: str, column: str, prompt: str | None) -> None:
    first, last = completion[0]["role"], completion[-1]["role"]
    if first != "assistant":
        remedy = "Move the turns before it to 'prompt'"
        if prompt is not None:
            repeated = f"remove the column {prompt!r} if all completions repeat it (--columns {prompt}=)"
            remedy = f"{remedy}, or {repeated}"
        raise bad(where, column, f"starts with a {first!r} turn; a completion starts with 'assistant'", remedy)
    if any(map(image_count, completion)):
        remedy = "Images belong to the prompt, which all completions share: give it in a column of its own"
        raise bad(where, column, "holds an image", remedy)
    if last != "assistant":
        remedy = "End it with what the assistant says"
        raise bad(where, column, f"ends with a {last!r} turn, which is not the model's to learn", remedy)


def _with_system(prompt: list[Message], system: Any, where: str) -> list[Message]:
    if system is None or system == "":
        return prompt
    if not isinstance(system, str):
        raise bad(where, "system", f"is of type {type(system).__name__}", "Give a string, or None")
    if prompt[0]["role"] == "system":
        raise bad(where, "system", "is set, and the prompt has a system turn already", "Keep one of the two")
    return [{"role": "system", "content": system}, *prompt]


def _template_options(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`tools` and `chat_template_kwargs`, where the row has any."""
    options = {
        "tools": _json_value(row.get("tools"), list, where, "tools"),
        "chat_template_kwargs": _json_value(row.get("chat_template_kwargs"), dict, where, "chat_template_kwargs"),
    }
    if not all(isinstance(tool, dict) for tool in options["tools"] or ()):
        raise bad(where, "tools", "holds something else than JSON objects", "Describe each tool by its JSON schema")
    reserved = sorted(OURS & set(options["chat_template_kwargs"] or ()))
    if reserved:
        raise bad(where, "chat_template_kwargs", f"sets {', '.join(reserved)}, which is set for you", "Remove it")
    return {name: value for name, value in options.items() if value}


def _json_value(value: Any, kind: type, where: str, column: str) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
            json.dumps(value, ensure_ascii=False).encode()  # refuses half of a surrogate pair
        except (ValueError, RecursionError) as error:
            raise bad(where, column, f"is not JSON ({error})", "Mend it, or give None") from None
    else:
        value = without_none(value)
    if value is not None and not isinstance(value, kind):
        raise bad(where, column, f"is of type {type(value).__name__}", f"Give a {kind.__name__}, its JSON, or None")
    return value
