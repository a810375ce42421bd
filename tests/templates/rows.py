"""Kinds of conversational rows. Every string that a row says holds a marker word of its own, at the end of what it says.

A marker (WORD17X) is found again in any text that a template makes, also in JSON, whatever stands around it. Sentences hold
theirs twice: where a text is cut at its beginning, one of the two is still whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

Message = dict[str, Any]
MARKER = re.compile(r"WORD\d+X")
NUMBERS = count(1)
ALIASES = {"human": "user", "prompter": "user", "gpt": "assistant", "developer": "system"}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """One row, as its owner means it."""

    name: str
    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[dict] | None = None
    kwargs: Mapping[str, Any] | None = None
    implicit: bool = False  # chosen and rejected are whole conversations
    fields: tuple[str, ...] = ()  # a refusal must name one of them where another spelling of the same row works

    @property
    def row(self) -> dict[str, Any]:
        options = {"tools": self.tools and json.dumps(self.tools), "chat_template_kwargs": self.kwargs}
        completions = {"chosen": self.chosen, "rejected": self.rejected}
        if self.implicit:
            return {name: self.prompt + turns for name, turns in completions.items()} | options
        return {"prompt": self.prompt, **completions, **options}

    @property
    def continued(self) -> bool:
        return ALIASES.get(self.prompt[-1]["role"], self.prompt[-1]["role"]) == "assistant"


KINDS: list[Kind] = []


def kind(make: Callable[[], Mapping[str, Any]]) -> None:
    KINDS.append(Kind(name=make.__name__.replace("_", " "), **make()))


def markers(value: Any) -> list[str]:
    """All marker words in a value, in order, each once."""
    return list(dict.fromkeys(marker for text in _strings(value) for marker in MARKER.findall(text)))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from [key, *_strings(item)]
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def word() -> str:
    return f"WORD{next(NUMBERS)}X"


def says(text: str = "says") -> str:
    marker = word()
    return f"{marker} {text} {marker}"


def turn(role: str, content: Any = says, **more: Any) -> Message:
    return {"role": role, "content": content() if callable(content) else content, **more}


def user(content: Any = says) -> Message:
    return turn("user", content)


def assistant(content: Any = says, **more: Any) -> Message:
    return turn("assistant", content, **more)


def system() -> Message:
    return turn("system")


def call(name: str, arguments: Any = dict) -> list[dict]:
    given = {"city": word()}
    made = given if arguments is dict else json.dumps(given)
    return [{"id": "abcdef123", "type": "function", "function": {"name": name, "arguments": made}}]


def result(name: str) -> Message:
    return turn("tool", name=name, tool_call_id="abcdef123")


def tool(name: str) -> dict:
    city = {"type": "string", "description": says("the city")}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    return {"type": "function", "function": {"name": name, "description": says("finds"), "parameters": parameters}}


def pair(make: Callable[[], Any], **more: Any) -> dict[str, Any]:
    """chosen and rejected made alike, with markers of their own."""
    return {"chosen": _turns(make()), "rejected": _turns(make()), **more}


def _turns(made: Any) -> list[Message]:
    return made if isinstance(made, list) else [made]


def with_tools(completion: Callable[[str], Any], **more: Any) -> dict[str, Any]:
    name = f"find_{word()}"
    row = {"prompt": [user()], "tools": [tool(name)], "fields": ("arguments",)}
    return {**row, **pair(lambda: completion(name)), **more}


@kind
def one_turn():
    return {"prompt": [user()], **pair(assistant)}


@kind
def several_turns():
    return {"prompt": [user(), assistant(), user(), assistant(), user()], **pair(assistant)}


@kind
def system_prompt():
    return {"prompt": [system(), user()], **pair(assistant)}


@kind
def system_prompt_and_several_turns():
    return {"prompt": [system(), user(), assistant(), user()], **pair(assistant)}


@kind
def prompt_that_ends_in_an_assistant_turn():
    return {
        "prompt": [user(), assistant("this begins with " + word())],
        **pair(lambda: assistant(f" and ends {word()}")),
    }


@kind
def completion_of_several_turns():
    return {"prompt": [user()], **pair(lambda: [assistant(), user(), assistant()])}


@kind
def system_and_completion_of_several_turns():
    return {"prompt": [system(), user()], **pair(lambda: [assistant(), user(), assistant()])}


@kind
def tool_call_alone():
    return with_tools(lambda name: assistant("", tool_calls=call(name)))


@kind
def tool_call_with_arguments_as_text():
    return with_tools(lambda name: assistant("", tool_calls=call(name, str)))


@kind
def tool_call_with_content_null():
    return with_tools(lambda name: assistant(None, tool_calls=call(name)), fields=("content", "arguments"))


@kind
def tool_call_beside_words():
    return with_tools(lambda name: assistant(tool_calls=call(name)))


@kind
def tool_call_result_and_answer():
    return with_tools(lambda name: [assistant("", tool_calls=call(name)), result(name), assistant()])


@kind
def tools_and_an_answer_in_words():
    return with_tools(lambda name: assistant())


@kind
def tool_result_in_the_prompt():
    name = f"find_{word()}"
    return {
        "prompt": [user(), assistant("", tool_calls=call(name)), result(name)],
        "tools": [tool(name)],
        "fields": ("arguments",),
        **pair(assistant),
    }


@kind
def reasoning_in_the_completion():
    return {"prompt": [user()], **pair(lambda: assistant(reasoning_content=says("I think")))}


@kind
def reasoning_in_the_prompt():
    return {"prompt": [user(), assistant(reasoning_content=says("I think")), user()], **pair(assistant)}


def thought() -> str:
    return f"<think>\nI think {word()}\n</think>\n\nthis is {word()}"


@kind
def think_tags_in_the_completion():
    return {"prompt": [user()], **pair(lambda: assistant(thought()))}


@kind
def think_tags_in_the_prompt():
    return {"prompt": [user(), assistant(thought()), user()], **pair(assistant)}


@kind
def roles_human_and_gpt():
    return {"prompt": [turn("human"), turn("gpt"), turn("human")], **pair(lambda: turn("gpt"))}


@kind
def role_prompter():
    return {"prompt": [turn("prompter"), assistant(), turn("prompter")], **pair(assistant)}


@kind
def role_developer():
    return {"prompt": [turn("developer"), user()], **pair(assistant)}


@kind
def surrounding_whitespace():
    return {"prompt": [user(f"\n this is {word()} \n")], **pair(lambda: assistant(f"\n\n this is {word()} \n"))}


@kind
def unicode_content():
    return {
        "prompt": [user(f"Größe 中文 🦉 {word()}")],
        **pair(lambda: assistant(f"é e\u0301 👩🏽\u200d🚀 ｜ {word()}")),
    }


@kind
def long_answers():
    return {"prompt": [user()], **pair(lambda: assistant(" ".join(["a long answer"] * 60 + [word()])))}


@kind
def enable_thinking_true():
    return {"prompt": [user()], **pair(assistant), "kwargs": {"enable_thinking": True}}


@kind
def enable_thinking_false():
    return {"prompt": [user()], **pair(assistant), "kwargs": {"enable_thinking": False}}


@kind
def content_as_a_list_of_parts():
    def parts() -> list[dict]:
        return [{"type": "text", "text": says() + " "}, {"type": "text", "text": says()}]

    return {"prompt": [user(parts())], **pair(lambda: assistant(parts()))}


@kind
def pair_that_differs_in_reasoning():
    answer = says()
    return {"prompt": [user()], **pair(lambda: assistant(answer, reasoning_content=says("I think")))}


@kind
def pair_that_differs_in_arguments():
    words = says()
    return with_tools(lambda name: assistant(words, tool_calls=call(name)))


@kind
def implicit_prompt():
    return {"prompt": [user(), assistant(), user()], **pair(assistant), "implicit": True}
