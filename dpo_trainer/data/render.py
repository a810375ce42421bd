"""Pair -> what the tokenizer reads: the chat template applied once per text, or the plain strings themselves.

Every text is a beginning of the conversation: the prompt; the prompt with each completion; and, for a completion of
several turns, the places where an assistant's turn begins and ends. Token positions come from comparing the token ids of
these texts, so no character offset has to be turned into a token.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

from transformers.utils.chat_template_utils import mark_control_tokens, render_jinja_template

from ..batch import Message, Pair, Text
from .errors import bad, clean
from .image_places import check_none_is_shown, has_images, placed
from .image_text import ImageText
from .messages import words_of

MARKS = re.compile("[\U000f0000\U000f0001]")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Rendered(NamedTuple):
    """One row as texts, or as token ids where the template had to be kept apart from control tokens in the text."""

    prompt: str | list[int]
    completions: Sequence[str | list[int]]  # each starts with the prompt, or with what the template makes of it
    edges: Sequence[Sequence[str | list[int]]]  # per completion: up to where scored stretches begin and end, in turn
    templated: bool
    control_text: bool = False  # a string of the row has the text of a control token in it
    images: bool = False  # there are tokens of images in the texts

    @property
    def all(self) -> list:
        return [self.prompt, *self.completions, *(edge for edges in self.edges for edge in edges)]


def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches the text of any token that steers the model: those that the tokenizer calls special, or control tokens of its chats."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= {*tokenizer.all_special_tokens, *(getattr(tokenizer, "chat_control_tokens", None) or ())}
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
        rendered = _conversation(pair, tokenizer, where, control, images).rendered()
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
    return Rendered(conversation.start(), [], [], templated=True, control_text=conversation.as_ids)


def _conversation(
    pair: Pair, tokenizer: Any, where: str, control: re.Pattern[str] | None, images: ImageText | None
) -> _Conversation:
    found = control is not None and any(map(control.search, strings_of(pair)))
    if not tokenizer.chat_template:
        raise ValueError(
            f"{where} is a conversation, and the tokenizer has no chat template. Set tokenizer.chat_template to the one the "
            "model is to be used with, or give the row as plain strings."
        )
    if control is not None and found:
        _check_can_stay_text(pair, where, control)
    return _Conversation(pair, tokenizer, where, images, control if found else None)


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


class _Conversation:
    """Renders one row of messages. `control`: what matches in its strings stays text, which only token ids can say."""

    def __init__(
        self, pair: Pair, tokenizer: Any, where: str, images: ImageText | None, control: re.Pattern[str] | None
    ):
        self.pair, self.where, self.images, self.as_ids = pair, where, images, control is not None
        # transformers before 5.23 marks messages and tools alone. What is marked already it marks as before.
        self.options = (
            pair.chat_template_kwargs if control is None else mark_control_tokens(pair.chat_template_kwargs, control)
        )
        self.prompt = cast("list[Message]", pair.prompt)
        self.completions = cast("tuple[list[Message], ...]", pair.completions)
        self.tokenizer = _sanitizing(tokenizer) if self.as_ids else tokenizer
        self.continued = self.prompt[-1]["role"] == "assistant"

    def rendered(self) -> Rendered:
        start = self.start()
        wholes = [self._text(self._joined(completion)) for completion in self.completions]
        edges = [self._edges(number, start, whole) for number, whole in enumerate(wholes)]
        return Rendered(start, wholes, edges, templated=True, control_text=self.as_ids)

    def start(self) -> Any:
        """The prompt, up to where the answer begins."""
        return self._text(self.prompt, add_generation_prompt=not self.continued, continue_final_message=self.continued)

    def _text(self, messages: list[Message], **how: bool) -> Any:
        how |= {"sanitize_control_tokens": True, "return_dict": False} if self.as_ids else {}
        options = self.options
        messages = messages if self.images is None else self.images.for_template(messages)
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=self.pair.tools, tokenize=self.as_ids, **how, **options
            )
        except Exception as error:  # a template is a program of the model's author and may raise anything
            raise ValueError(
                f"{self.where}: the chat template refuses these messages: {clean(error)}. Change their roles or order, or the "
                "template."
            ) from error
        return text if self.images is None else self.images.opened(text)

    def _joined(self, completion: list[Message]) -> list[Message]:
        """One conversation. A prompt that ends in an assistant turn is continued, not answered anew."""
        prompt = self.prompt
        if not self.continued:
            return [*prompt, *completion]
        last, first = prompt[-1], completion[0]
        content = last.get("content", "") + first.get("content", "")
        return [*prompt[:-1], {**last, **first, "content": content}, *completion[1:]]

    # --- completions of several turns ---

    def _edges(self, number: int, start: Any, whole: Any) -> list:
        """Where the assistant's turns begin and end: by the template's generation markers, else by rendering up to there."""
        completion = self.completions[number]
        if len(completion) == 1:
            return []
        if not self.as_ids and GENERATION.search(self.tokenizer.get_chat_template(tools=self.pair.tools)):
            return self._marked(completion, start, whole)
        edges = []
        for turn, message in enumerate(completion):
            if message["role"] != "assistant":
                continue
            edges.append(self._text(self._joined(completion[:turn]), add_generation_prompt=True) if turn else start)
            edges.append(self._text(self._joined(completion[: turn + 1])))
        if not all(self._begins(whole, edge) for edge in edges):
            raise self._cannot_tell(number)
        return edges

    def _begins(self, whole: Any, edge: Any) -> bool:
        """As texts: token ids may differ where a token spans the edge."""
        if self.as_ids:
            whole, edge = self.tokenizer.decode(whole), self.tokenizer.decode(edge)
        return whole.startswith(edge)

    def _marked(self, completion: list[Message], start: str, whole: str) -> list[str]:
        template = self.tokenizer.get_chat_template(tools=self.pair.tools)
        (plain,), (stretches,) = render_jinja_template(
            [self._joined(completion) if self.images is None else self.images.for_template(self._joined(completion))],
            tools=self.pair.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.pair.chat_template_kwargs},
        )
        bos = len(whole) - len(plain)  # that no template wrote
        return [whole[: bos + edge] for stretch in stretches if bos + stretch[1] > len(start) for edge in stretch]

    def _cannot_tell(self, number: int) -> ValueError:
        problem = "has several turns, and the chat template rewrites earlier turns: nobody can tell which are the assistant's words"
        remedy = "Use a template with {% generation %} markers, or end the completion after its first turn"
        if self.as_ids:
            remedy = "Take the text of the control token out of the row, or end the completion after its first turn"
        return bad(self.where, completion_name(number, len(self.completions)), problem, remedy)


def completion_name(number: int, count: int) -> str:
    """What an error calls a completion: its column where it has one of its own."""
    return "chosen" if number == 0 else "rejected" if count == 2 else f"completion {number}"


def _sanitizing(tokenizer: Any) -> Any:
    """The same tokenizer, told that only special tokens steer: text such as <think> may be an assistant's own."""
    if tokenizer.chat_control_tokens is not None:
        return tokenizer
    twin = copy.copy(tokenizer)
    twin.chat_control_tokens = []
    return twin
