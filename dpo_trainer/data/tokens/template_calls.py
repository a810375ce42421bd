"""Tool calls in the form that a chat template takes.

The same call has several spellings, and templates were written for one of them each: the arguments as an object, or as JSON
text (as OpenAI's API has them); a message of calls alone without `content`, or with an empty one. Most templates take an
object: they write it as JSON, or walk over it. Some concatenate strings, and raise for an object or write it as Python does.
So the forms are tried, once per template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ...types import Message


class CallForm(NamedTuple):
    """How messages with tool calls are handed to a template."""

    as_object: bool  # the arguments, else as JSON text
    empty_content: bool  # of a message without words, else none

    def of(self, messages: list[Message]) -> list[Message]:
        return [self._message(message) if message.get("tool_calls") else message for message in messages]

    def _message(self, message: Message) -> Message:
        calls = [self._call(call) for call in message["tool_calls"]]
        content = {"content": ""} if self.empty_content and "content" not in message else {}
        return {**message, **content, "tool_calls": calls}

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        """OpenAI's {"type", "function": {"name", "arguments"}}, or the inner object alone."""
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(dict(call["function"]))}
        if "arguments" not in call:
            return call
        arguments = call["arguments"]
        return {**call, "arguments": parsed(arguments) if self.as_object else _as_text(arguments)}


FORMS = [CallForm(as_object, empty) for as_object in (True, False) for empty in (False, True)]
_known: dict[Any, CallForm] = {}
"""By template, and by whether a message has no content."""


def parsed(arguments: Any) -> Any:
    """The object that JSON text holds; anything else as it is."""
    if not isinstance(arguments, str):
        return arguments
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments


def _as_text(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def arguments_of(messages: list[Message]) -> Iterator[Any]:
    for message in messages:
        for call in message.get("tool_calls") or ():
            function = call.get("function")
            yield (function if isinstance(function, Mapping) else call).get("arguments")


def has_calls(messages: list[Message]) -> bool:
    return any(message.get("tool_calls") for message in messages)


def call_form(template: str, messages: list[Message], render: Callable[[list[Message]], str]) -> CallForm:
    """The first form that the template takes and writes as it should. `render` raises a ValueError where it refuses one.

    Where it refuses all of them, the first: rendering the row then says why.
    """
    key = (template, any(message.get("tool_calls") and "content" not in message for message in messages))
    if key in _known:
        return _known[key]
    taken = []
    for form in FORMS:
        try:
            text = render(form.of(messages))
        except ValueError:
            continue
        if not _is_quoted(text, messages, form):
            return _known.setdefault(key, form)
        taken.append(form)
    return taken[0] if taken else FORMS[0]


def _is_quoted(text: str, messages: list[Message], form: CallForm) -> bool:
    """Whether arguments came out as a string inside JSON, or as Python writes a dict."""
    for given in arguments_of(messages):
        value = parsed(given)
        if not isinstance(value, dict) or not value:
            continue
        if form.as_object and str(value) in text and str(value) != json.dumps(value, ensure_ascii=False):
            return True
        quoted = json.dumps(_as_text(given), ensure_ascii=False)
        if not form.as_object and quoted in text:
            return True
    return False
