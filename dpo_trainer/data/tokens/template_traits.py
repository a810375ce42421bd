"""What a chat template does to every conversation, asked once with three words that occur in no template."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from ...types import Message
from ..rows.implicit import shared_length

TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
"""What is one token, or stands for one: a text is not cut inside."""
QUESTION, ANSWER, MORE = "qz1zq", "qz2zq", "qz3zq"


class Traits(NamedTuple):
    takes_blocks: bool = False  # a content must be a list of parts; a string is lost or refused
    opening: str = ""  # the generation prompt that it puts behind every conversation, asked for or not
    ends_turns: bool = True  # it writes something behind an answer


_known: dict[Any, Traits] = {}


def traits(template: str, options: dict[str, Any], render: Callable[..., str]) -> Traits:
    """`render` takes messages and raises a ValueError where the template refuses them."""
    key = (template, str(options))
    if key not in _known:
        _known[key] = _probe(render)
    return _known[key]


def shared_text(first: str, second: str) -> int:
    """Length of the common beginning of two texts, not inside a tag."""
    end = shared_length(first, second)
    cut = [
        match.start() for text in (first, second) for match in TAG.finditer(text) if match.start() < end < match.end()
    ]
    return min(cut, default=end)


def in_blocks(messages: list[Message]) -> list[Message]:
    """Each content that is a string as a list of one part."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str) and message["content"]
        else message
        for message in messages
    ]


def _probe(render: Callable[..., str]) -> Traits:
    asked: list[Message] = [{"role": "user", "content": QUESTION}]
    answered = [*asked, {"role": "assistant", "content": ANSWER}]
    longer = [*answered, {"role": "user", "content": MORE}]
    for takes_blocks in (False, True):
        form = in_blocks if takes_blocks else list
        try:
            opened = render(form(asked), add_generation_prompt=True)
            texts = [render(form(messages)) for messages in (asked, answered, longer)]
        except ValueError:
            continue
        if QUESTION in texts[0] and ANSWER in texts[1]:
            opening = _opening(opened, *texts)
            behind = texts[1][texts[1].rindex(ANSWER) + len(ANSWER) :].removesuffix(opening)
            return Traits(takes_blocks, opening, bool(behind.strip()) or "\n\n" in behind)
    return Traits()


def _opening(opened: str, asked: str, answered: str, longer: str) -> str:
    """What ends the question and the answer alike, is part of the generation prompt, and is gone once a question follows."""
    extra = answered[shared_length(answered, longer) :]
    if not extra or ANSWER in extra or not asked.endswith(extra) or extra not in opened[opened.rindex(QUESTION) :]:
        return ""
    behind_question = asked[asked.rindex(QUESTION) + len(QUESTION) :]
    end_of_turn = TAG.match(behind_question)
    opening = behind_question[end_of_turn.end() if end_of_turn else 0 :]
    return opening if answered.endswith(opening) else extra
