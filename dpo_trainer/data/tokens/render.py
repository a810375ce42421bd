"""Pair -> what the tokenizer reads: the chat template applied once per text, or the plain strings themselves.

Every text begins with the prompt: the prompt; the prompt with each completion; and, for a completion of several turns, the
places where an assistant's turn begins and ends. Token positions come from comparing the token ids of these texts, so no
character offset has to be turned into a token. What the texts of a conversation are is said in templated.py.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from transformers.utils.chat_template_utils import mark_control_tokens

from ...types import Flag, Message, Pair, Text
from ..errors import bad
from ..images.text import ImageText
from ..rows.image_places import check_none_is_shown, has_images, placed
from ..rows.messages import words_of
from .encode import check_writes_conversations, special_tokens
from .rendering import Rendering
from .templated import prompt_of, texts_of

MARKS = re.compile("[\U000f0000\U000f0001]")


class Rendered(NamedTuple):
    """One row as texts, or as token ids where the template had to be kept apart from control tokens in the text."""

    prompt: str | list[int]
    completions: Sequence[str | list[int]]  # each starts with the prompt, or with what the template makes of it
    edges: Sequence[Sequence[str | list[int]]]  # per completion: up to where scored stretches begin and end, in turn
    templated: bool
    control_text: bool = False  # a string of the row has the text of a control token in it
    images: bool = False  # there are tokens of images in the texts
    flags: Flag = Flag(0)

    @property
    def all(self) -> list:
        return [self.prompt, *self.completions, *(edge for edges in self.edges for edge in edges)]


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches the text of any token that steers the model: those that the tokenizer calls special, or control tokens of its chats."""
    special = special_tokens(tokenizer) | set(getattr(tokenizer, "chat_control_tokens", None) or ())
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def render(
    pair: Pair, tokenizer: Any, where: str, control: re.Pattern[str] | None, images: ImageText | None = None
) -> Rendered:
    """`control` matches what must stay text in the strings of the row; None: nothing. `images`: of a processor, if it is one."""
    if images is None:
        check_none_is_shown(has_images(pair), where)
    else:
        pair = placed(pair, images.placeholder, where)
    if not isinstance(pair.prompt, str):
        conversation = _conversation(pair, tokenizer, where, control, images)
        start, wholes, edges, flags = texts_of(conversation)
        rendered = Rendered(start, wholes, edges, templated=True, control_text=conversation.as_ids, flags=flags)
    else:
        texts = [f"{pair.prompt}{completion}" for completion in pair.completions]
        found = control is not None and any(map(control.search, texts))
        if found and images is not None and pair.images:
            found = _check_words_beside_images(pair, where, control, images)
        rendered = Rendered(pair.prompt, texts, [[]] * len(texts), templated=False, control_text=found)
    return _with_images(rendered, pair, images, where) if images is not None and pair.images else rendered


def _check_words_beside_images(pair: Pair, where: str, control: Any, images: ImageText) -> bool:
    """False: what was found are the places of images, which are to be read as such. Nothing else may be beside them."""
    prompt = images.beside_words.sub("\0", f"{pair.prompt}")  # what stands on both sides of an image does not meet
    for completion in pair.completions:
        if found := control.search(f"{prompt}{completion}"):
            problem = f"holds the text of the control token {found[0]!r} beside an image of plain text"
            remedy = "Give the row as messages, take the token out, or read it as one with --allow_special_tokens_in_text true"
            raise bad(where, "prompt or completion", problem, remedy)
    return False


def _with_images(row: Rendered, pair: Pair, images: ImageText, where: str) -> Rendered:
    """What stands in the place of each image, in the prompt and in all that begins with it."""
    sizes = images.sizes(pair.images, where)
    write: Any = images.write if isinstance(row.prompt, str) else images.write_ids
    prompt, plain = write(row.prompt, sizes, where), len(row.prompt)

    def written(text: Any) -> Any:
        if text[:plain] != row.prompt:
            raise ValueError(
                f"{where}: the chat template does not begin the conversation as it begins the prompt, so the places of images "
                "in it are not known. Use a template that keeps the prompt in front of the answer."
            )
        return prompt + text[plain:]

    return row._replace(
        prompt=prompt,
        completions=[written(text) for text in row.completions],
        edges=[[written(edge) for edge in edges] for edges in row.edges],
        images=True,
    )


def render_prompt(prompt: Text, tokenizer: Any, where: str, control: re.Pattern[str] | None) -> Rendered:
    """A prompt that waits for an answer, without one."""
    if isinstance(prompt, str):
        found = control is not None and control.search(prompt) is not None
        return Rendered(prompt, [], [], templated=False, control_text=found)
    conversation = _conversation(Pair(prompt=prompt, chosen="", rejected=""), tokenizer, where, control, None)
    return Rendered(prompt_of(conversation), [], [], templated=True, control_text=conversation.as_ids)


def _conversation(
    pair: Pair, tokenizer: Any, where: str, control: re.Pattern[str] | None, images: ImageText | None
) -> Rendering:
    found = control is not None and any(map(control.search, strings_of(pair)))
    check_writes_conversations(tokenizer, where)
    if control is None or not found:
        return Rendering(pair, tokenizer, where, images, as_ids=False)
    _check_can_stay_text(pair, where, control)
    # transformers before 5.23 marks messages and tools alone. What is marked already it marks as before.
    marked = replace(pair, chat_template_kwargs=mark_control_tokens(pair.chat_template_kwargs, control))
    return Rendering(marked, _sanitizing(tokenizer), where, images, as_ids=True)


def strings_of(pair: Pair) -> Iterator[str]:
    """Every string of a row that reaches the tokenizer, those that are joined to one (`_joined`) also as the one."""
    everything = [pair.prompt, pair.completions, pair.tools, pair.chat_template_kwargs]
    yield from _values(everything)
    yield from _keys(everything)
    last = pair.prompt if isinstance(pair.prompt, str) else _continued(pair.prompt)
    for completion in pair.completions if last else ():
        yield last + (completion if isinstance(completion, str) else completion[0].get("content", ""))


def _continued(prompt: list[Message]) -> str:
    """What an answer goes on from: the words of a prompt that ends in an assistant turn."""
    return words_of(prompt[-1]) if prompt[-1]["role"] == "assistant" else ""


def _values(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _values(item)


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from map(str, value)
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _keys(item)


def _check_can_stay_text(pair: Pair, where: str, control: re.Pattern[str]) -> None:
    """transformers marks strings, not names, and drops the characters that it marks with."""
    for name in _keys([pair.prompt, pair.completions, pair.tools, pair.chat_template_kwargs]):
        if found := control.search(name):
            problem = f"names something after the control token {found[0]!r}"
            raise bad(where, "tools or messages", problem, "Rename the key")
    if any(map(MARKS.search, strings_of(pair))):
        remedy = "Remove them, or the control token in the text"
        raise bad(where, "prompt or completion", "holds U+F0000 or U+F0001 beside the text of a control token", remedy)


def _sanitizing(tokenizer: Any) -> Any:
    """The same tokenizer, told that only special tokens steer: text such as <think> may be an assistant's own."""
    if tokenizer.chat_control_tokens is not None:
        return tokenizer
    twin = copy.copy(tokenizer)
    twin.chat_control_tokens = []
    return twin
