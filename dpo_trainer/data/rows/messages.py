"""Chat messages in the spellings that real data has -> [{"role": ..., "content": ...}], checked.

    {"role", "content"}      as chat templates read them; content a string, or a list of parts of text and {"type": "image"}
    {"from", "value"}        ShareGPT: human, gpt, system, observation, function_call

Entries that are None are left out: a table fills every message with the keys of all others.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from itertools import groupby
from typing import Any

from ...registry import did_you_mean
from ...types import Message
from ..errors import bad

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
ROLE_ALIASES = {
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "bot", "model", "ai", "chatbot"), "assistant"),
    "function": "tool",
}
"""Roles as other tools write them. Every model that was trained on its template knows the usual ones."""
ROLE = re.compile(r"[\w.-]+")
KNOWN_ROLES = ("system", "user", "assistant", "tool")


def read_messages(value: Any, where: str, column: str) -> list[Message]:
    """A list of messages, or one message alone, as a list of checked ones."""
    if isinstance(value, Mapping):
        return [_message(value, where, column)]
    if not value:
        raise bad(where, column, "is an empty list", "Give at least one message, or leave the row out")
    return [_message(message, where, f"{column}[{turn}]") for turn, message in enumerate(value)]


def without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list | tuple) else value


def words_of(message: Message) -> str:
    """What a message says, without its images."""
    content = message.get("content", "")
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content)


def image_count(message: Message) -> int:
    content = message.get("content", "")
    return 0 if isinstance(content, str) else sum(block["type"] == "image" for block in content)


def is_blank(completion: str | list[Message]) -> bool:
    """Whether a completion says nothing: not an error, for real data has some, but nothing to learn from."""
    if isinstance(completion, str):
        return not completion.strip()
    return not any(
        words_of(turn).strip() or turn.get("tool_calls") for turn in completion if turn["role"] == "assistant"
    )


def _message(message: Any, where: str, column: str) -> Message:
    if not isinstance(message, Mapping):
        raise bad(where, column, f"is of type {type(message).__name__}", 'Give {"role": ..., "content": ...}')
    message = without_none(message)
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, where, column)
    role, content = message.get("role"), message.get("content")
    if role is None or (content is None and not message.get("tool_calls")):
        missing = "role" if role is None else "content"
        problem = f"has no {missing} (it has: {', '.join(map(str, message)) or 'nothing'})"
        raise bad(where, column, problem, "A message needs role and content (or from and value)")
    if not isinstance(role, str) or not ROLE.fullmatch(role):  # templates write it between control characters
        raise bad(
            where, column, f"has the role {role!r:.80}", "Give a name of letters and digits, such as user or assistant"
        )
    message["role"] = role = usual_role(role)
    meant = difflib.get_close_matches(role.lower(), KNOWN_ROLES, n=1, cutoff=0.85)
    if meant and role.isalpha() and role not in KNOWN_ROLES:
        raise bad(
            where, column, f"has the role {role!r}", f"Did you mean {meant[0]!r}? Mend it, or give it another name"
        )
    _check_calls(message.get("tool_calls"), where, column)
    if isinstance(content, list):
        blocks = _joined([_block(block, where, column) for block in content])
        message["content"] = (
            blocks if any(block["type"] == "image" for block in blocks) else words_of({"content": blocks})
        )
        if role == "assistant" and not isinstance(message["content"], str):
            remedy = "A model that answers in words cannot learn it: move the image to a turn of the user"
            raise bad(where, column, "has an image in a turn of the assistant", remedy)
    elif content is not None and not isinstance(content, str):
        raise bad(where, column, f"has content of type {type(content).__name__}", "Give the content as one string")
    return message


def usual_role(role: str) -> str:
    """The name that chat templates know, in any case of letters; another role as it is."""
    lower = role.lower()
    return ROLE_ALIASES.get(lower, lower if lower in KNOWN_ROLES else role)


def roles_are_renamed(value: Any) -> bool:
    """Whether messages as a row holds them have a role that is read as another."""
    messages = [value] if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    roles = [message.get("role") for message in messages if isinstance(message, Mapping)]
    return any(isinstance(role, str) and usual_role(role) != role for role in roles)


def _from_sharegpt(message: Message, where: str, column: str) -> Message:
    speaker, value = message["from"], message.get("value")
    if not isinstance(speaker, str) or speaker not in SHAREGPT_ROLES:
        hint = did_you_mean(str(speaker), SHAREGPT_ROLES)
        raise bad(where, column, f"is from {speaker!r}.{hint}".rstrip("."), f"Known: {', '.join(SHAREGPT_ROLES)}")
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    if speaker != "function_call":
        return {"role": SHAREGPT_ROLES[speaker], "content": value, **rest} if value is not None else {"role": speaker}
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (json.JSONDecodeError, RecursionError) as error:
        raise bad(where, column, f"is a function_call that is not JSON ({error})", "Mend it") from None
    if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
        raise bad(
            where, column, "is a function_call without a name", 'Give {"name": ..., "arguments": {...}} as value'
        )
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": dict(call)}], **rest}


def _check_calls(calls: Any, where: str, column: str) -> None:
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise bad(where, column, f"has tool_calls {calls!r:.80}", "Give a list of calls, each an object")


def _joined(blocks: list[dict[str, str]]) -> list[dict[str, str]]:
    """Neighbouring texts as one: half a control token in each would be a whole one behind the chat template."""
    out: list[dict[str, str]] = []
    for kind, same in groupby(blocks, key=lambda block: block["type"]):
        run = list(same)
        out += run if kind == "image" else [{"type": "text", "text": "".join(block["text"] for block in run)}]
    return out


def _block(block: Any, where: str, column: str) -> dict[str, str]:
    """One of the parts of a message's content, without what a template need not see."""
    kind = block.get("type", "text") if isinstance(block, Mapping) else type(block).__name__
    if kind == "image":
        held = [key for key in block if key not in ("type", "text", "index")]
        if held:
            remedy = 'Put images into a column "images" of the row, in the order of their parts'
            raise bad(where, column, f"has an image part that holds {held[0]!r} itself", remedy)
        return {"type": "image"}
    if kind != "text":
        raise bad(
            where,
            column,
            f"has a content part of type {kind!r}",
            "Only parts of type 'text' and 'image' can be used here",
        )
    if not isinstance(block.get("text"), str):
        raise bad(where, column, "has a text part without text", 'Give {"type": "text", "text": ...}')
    return {"type": "text", "text": block["text"]}
