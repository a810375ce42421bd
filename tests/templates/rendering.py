"""Conversations as transformers renders them with a template, in each of the spellings that mean the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product, takewhile
from typing import Any, NamedTuple

from .rows import ALIASES, Kind, Message
from .tokenizer import control_pattern


class Reading(NamedTuple):
    """One spelling of a row's messages: a template may want arguments as objects, content as parts, roles of its own."""

    prompt: list[Message]
    completions: tuple[list[Message], ...]
    plain: bool  # as the row has it


@dataclass
class Template:
    """Renders conversations, each once. Texts are None where the template raises."""

    tokenizer: Any
    seen: dict[str, str | None] = field(default_factory=dict)
    errors: list[Exception] = field(default_factory=list)

    def text(self, kind: Kind, messages: list[Message], **how: bool) -> str | None:
        key = json.dumps([messages, kind.tools, kind.kwargs, how])
        if key not in self.seen:
            try:
                self.seen[key] = self.tokenizer.apply_chat_template(
                    messages, tools=kind.tools, tokenize=False, **how, **(kind.kwargs or {})
                )
            except Exception as error:  # a template is a program and may raise anything
                self.seen[key] = None
                self.errors.append(error)
        return self.seen[key]

    def start(self, kind: Kind, messages: list[Message]) -> str | None:
        """Up to where the model goes on."""
        last = messages[-1]["role"]
        continued = ALIASES.get(last, last) == "assistant"
        return self.text(kind, messages, add_generation_prompt=not continued, continue_final_message=continued)

    def whole(self, kind: Kind, messages: list[Message]) -> str | None:
        """Up to the end of the last turn, without the generation prompt that some templates always write."""
        text = self.text(kind, messages)
        return text and text.removesuffix(self.always(kind))

    @cached_property
    def _probe(self) -> tuple[str, str] | None:
        return self._probed(None)

    def _probed(self, kwargs: Any) -> tuple[str, str] | None:
        """What stands between a question and where the model goes on, and behind an answer; None: not to be found out."""
        talk = [{"role": "user", "content": "WORDQX"}, {"role": "assistant", "content": "WORDAX"}]
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in talk]
        for asked, tools in product((talk, parts), (None, [])):
            plain = Kind(name="", prompt=[], chosen=[], rejected=[], tools=tools, kwargs=kwargs)
            start, whole = self.start(plain, asked[:1]), self.text(plain, asked)
            if start and whole and "WORDAX" in whole:
                return start.partition("WORDQX")[2], whole.partition("WORDAX")[2]
        return None

    def always(self, kind: Kind | None = None) -> str:
        """The generation prompt that the template writes behind an answer, asked or not; mostly empty."""
        before, behind = self._probed(kind and kind.kwargs) or ("", "")
        shared = shared_beginning(before[::-1], behind[::-1])[::-1]
        if not (control := control_pattern(self.tokenizer).search(shared)):
            return ""
        return shared[control.start() :].removeprefix(self.tokenizer.eos_token)

    @cached_property
    def writes_an_end(self) -> bool:
        """Of an assistant's turn. Some end it with an empty line."""
        return self._probe is None or bool(self._probe[1].removesuffix(self.always()).strip(" "))

    def trim(self, text: str) -> str:
        """Without the white space that most templates write behind the end of a turn, and the model does not."""
        return text.rstrip() if self._probe is None or self._probe[1].strip() else text.rstrip(" ")

    def renders(self, kind: Kind, reading: Reading) -> bool:
        """All completions of a row, spelt so."""
        wholes = [self.whole(kind, joined(reading.prompt, turns, kind.continued)) for turns in reading.completions]
        return all(whole is not None for whole in wholes)


def readings(kind: Kind) -> Iterator[Reading]:
    """The row as it is, and the spellings that mean the same."""
    seen = []
    conversations = (kind.prompt, kind.chosen, kind.rejected)
    for number, how in enumerate(product((False, True), repeat=4)):
        prompt, *completions = ([_spelt(message, *how) for message in turns] for turns in conversations)
        if (prompt, completions) not in seen:
            seen.append((prompt, completions))
            yield Reading(prompt, tuple(completions), plain=number == 0)


def _spelt(message: Message, in_blocks: bool, known_role: bool, without_null: bool, other_arguments: bool) -> Message:
    message = dict(message)
    if known_role:
        message["role"] = ALIASES.get(message["role"], message["role"])
    content = message["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    if content is None and without_null:
        content = ""
    message["content"] = [{"type": "text", "text": content}] if in_blocks and content else content
    if other_arguments and "tool_calls" in message:
        message["tool_calls"] = [_other_arguments(call) for call in message["tool_calls"]]
    return message


def _other_arguments(call: dict) -> dict:
    given = call["function"]["arguments"]
    other = json.loads(given) if isinstance(given, str) else json.dumps(given)
    return {**call, "function": {**call["function"], "arguments": other}}


def joined(prompt: list[Message], completion: list[Message], continued: bool) -> list[Message]:
    """The conversation; a prompt that ends in an assistant turn is continued."""
    if not continued or not completion:
        return [*prompt, *completion]
    last, first = prompt[-1], completion[0]
    contents = last["content"], first["content"]
    if isinstance(contents[0], list):
        content: Any = [{"type": "text", "text": "".join(part["text"] for content in contents for part in content)}]
    else:
        content = "".join(contents)
    return [*prompt[:-1], {**last, **first, "content": content}, *completion[1:]]


def shared_beginning(first: str, second: str) -> str:
    same = takewhile(lambda chars: chars[0] == chars[1], zip(first, second, strict=False))
    return first[: sum(1 for _ in same)]
