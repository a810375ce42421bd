"""Whether a chat template writes all that a row says: each message's words, its calls and reasoning, and the tools.

Words are looked for in the text itself. Calls, reasoning and tools are short names and values that may stand in the words
too, so a template is asked once per shape of conversation: the same conversation, a marker in each place, and which of the
markers come out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from ...types import Message
from .template_calls import has_calls

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold what a model thinks before it answers."""
THOUGHT = re.compile(
    r"\s*(?:<(\w*think\w*)>)?(?:(?!</\w*think\w*>).)*</\w*think\w*>|\s*\[THINK\].*?\[/THINK\]", re.DOTALL
)
"""A block of reasoning at the beginning of a content, whose opening tag may stand in the generation prompt."""
THINK_TAG = re.compile(r"</?\w*think\w*>|\[/?THINK\]")
WORD = re.compile(r"\w+")
ESCAPE = re.compile(r'\\(?:[nrtbf"\\/]|u[0-9a-f]{4})')
KEPT = ("role", "type", "id", "tool_call_id")
"""Strings of a conversation that are no words: they keep their value in a probe."""


class Lost(NamedTuple):
    """Something that a row says and the template does not write."""

    turn: int  # of the conversation; -1: beside it
    field: str


def says(text: str, words: str) -> bool:
    """Whether the words stand in the text: as they are, or in other white space, or with their signs escaped."""
    words = words.strip()
    if not words or words in text:
        return True
    plain = _plain(words)
    if plain.strip():
        return plain in _plain(text)
    return json.dumps(words)[1:-1] in text


def _plain(text: str) -> str:
    return f" {' '.join(WORD.findall(ESCAPE.sub(' ', text)))} "


def without_thought(content: str) -> str:
    return THOUGHT.sub("", content, count=1)


def lost_words(messages: list[Message], text: str) -> list[int]:
    """Numbers of the messages whose words the text does not hold, in any order.

    Reasoning inside a content may come out with other tags, or its opening tag stand in the generation prompt.
    """
    return [
        number
        for number, message in enumerate(messages)
        if not all(_is_written(text, block) for block in _texts(message))
    ]


def _texts(message: Message) -> list[str]:
    """The texts of a content, between which images may stand."""
    content = message.get("content", "")
    return [content] if isinstance(content, str) else [block.get("text", "") for block in content]


def _is_written(text: str, content: str) -> bool:
    return says(text, content) or all(says(text, piece) for piece in _pieces(content))


def _pieces(content: str) -> list[str]:
    pieces = THINK_TAG.split(content)
    return pieces if len(pieces) > 1 else [content]


# --- calls, reasoning, tools ---


def has_fields(messages: list[Message], tools: Any) -> bool:
    return bool(tools) or has_calls(messages) or any(message.get(name) for message in messages for name in REASONING)


class Probe:
    """A conversation of the same shape as one of a row, with a marker in the place of each string."""

    def __init__(self, messages: list[Message], tools: list[dict] | None):
        self._count = 0
        self.markers: list[tuple[Lost, str]] = []
        self.messages = [self._message(turn, message) for turn, message in enumerate(messages)]
        self.tools = [self._tool(tool) for tool in tools] if tools else None

    @property
    def shape(self) -> str:
        """The same for all conversations that differ in their strings alone."""
        return json.dumps([self.messages, self.tools], default=str)

    def lost(self, render: Callable[[list[Message], Any], str]) -> list[Lost]:
        """What the template does not write of it. Raises what `render` raises."""
        text = render(self.messages, self.tools)
        return list(dict.fromkeys(lost for lost, marker in self.markers if marker not in text))

    def _marker(self) -> str:
        self._count += 1
        return f"qz{self._count}zq"

    def _marked(self, turn: int, field: str) -> str:
        marker = self._marker()
        self.markers.append((Lost(turn, field), marker))
        return marker

    def _message(self, turn: int, message: Message) -> Message:
        out: Message = {}
        for name, value in message.items():
            if name == "content" and isinstance(value, str):
                out[name] = self._marker() if value.strip() else ""
            elif name in REASONING and isinstance(value, str) and value.strip():
                out[name] = self._marked(turn, name)
            elif name == "tool_calls":
                out[name] = [self._call(turn, call) for call in value or ()]
            else:
                out[name] = value
        return out

    def _call(self, turn: int, call: Mapping[str, Any]) -> dict[str, Any]:
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(turn, call["function"])}
        out = dict(call)
        if isinstance(call.get("name"), str):
            out["name"] = self._marked(turn, "tool_calls")
        arguments = call.get("arguments")
        if isinstance(arguments, Mapping):
            out["arguments"] = {self._marker(): self._argument(turn, value) for value in arguments.values()}
        elif isinstance(arguments, str) and arguments.strip():
            out["arguments"] = json.dumps({self._marker(): self._marked(turn, "tool_calls")})
        return out

    def _argument(self, turn: int, value: Any) -> Any:
        return self._marked(turn, "tool_calls") if isinstance(value, str) and value.strip() else value

    def _tool(self, tool: dict[str, Any]) -> dict[str, Any]:
        """Only its name: templates differ in what else of a schema they write, and none needs more to have it read."""
        if isinstance(tool.get("function"), Mapping):
            return {**tool, "function": self._tool(dict(tool["function"]))}
        return {**tool, "name": self._marked(-1, "tools")} if isinstance(tool.get("name"), str) else tool


_answers: dict[Any, list[Lost] | None] = {}
MOST_ANSWERS = 4096


def lost_fields(
    messages: list[Message],
    tools: list[dict] | None,
    text: str,
    around: str,
    render: Callable[[list[Message], Any], str],
) -> list[Lost]:
    """Calls, reasoning and tools that the template does not write. `around`: the template and its options.

    Where it refuses the markers (some read what an argument says), the row's own strings are looked for in `text`.
    """
    probe = Probe(messages, tools)
    key = (around, probe.shape)
    if key not in _answers:
        if len(_answers) >= MOST_ANSWERS:
            _answers.clear()
        try:
            _answers[key] = probe.lost(render)
        except ValueError:
            _answers[key] = None
    answer = _answers[key]
    return list(_not_in(text, messages, tools)) if answer is None else answer


def _not_in(text: str, messages: list[Message], tools: list[dict] | None) -> Iterator[Lost]:
    for turn, message in enumerate(messages):
        yield from (Lost(turn, name) for name in REASONING if not says(text, str(message.get(name) or "")))
        names = [str(call.get("function", call).get("name")) for call in message.get("tool_calls") or ()]
        if not all(name in text for name in names):
            yield Lost(turn, "tool_calls")
    if not all(str(tool.get("function", tool).get("name") or "") in text for tool in tools or ()):
        yield Lost(-1, "tools")
