"""One row of messages under the tokenizer's chat template: renders conversations of it, in the forms that the template takes."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

from ...types import Flag, Message, Pair
from ..errors import bad, clean
from ..images.text import ImageText
from ..rows.implicit import shared_length
from .template_calls import CallForm, call_form, has_calls
from .template_traits import Traits, in_blocks, shared_text, traits


class Rendering:
    """`as_ids`: control tokens in the strings of the row stay text, which only token ids can say. Texts are then lists of ids."""

    def __init__(self, pair: Pair, tokenizer: Any, where: str, images: ImageText | None, *, as_ids: bool):
        self.tokenizer, self.where, self.images, self.as_ids = tokenizer, where, images, as_ids
        self.tools, self.options = pair.tools, pair.chat_template_kwargs
        self.flags = Flag.ROLES_RENAMED if pair.roles_renamed else Flag(0)
        self.prompt = self._known_roles(cast("list[Message]", pair.prompt))
        self.completions = cast("tuple[list[Message], ...]", pair.completions)
        self.continued = self.prompt[-1]["role"] == "assistant"

    def note(self, flag: Flag, found: bool = True) -> None:
        """Something that is counted of the row."""
        if found:
            self.flags |= flag

    @cached_property
    def template(self) -> str:
        return self.tokenizer.get_chat_template(tools=self.tools)

    @cached_property
    def traits(self) -> Traits:
        return traits(self.template, self.options, lambda messages, **how: self.plain(messages, unchanged=True, **how))

    def _known_roles(self, messages: list[Message]) -> list[Message]:
        """`developer`, as newer data calls the system turn, where the template does not know it."""
        roles = [message["role"] for message in messages]
        if "developer" not in roles or "system" in roles or "developer" in self.template:
            return messages
        self.note(Flag.ROLES_RENAMED)
        return [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in messages]

    @cached_property
    def form(self) -> CallForm | None:
        """How this row's tool calls are handed to the template; None where it has none."""
        whole = [self.joined(completion) for completion in self.completions if completion]
        calling = next(filter(has_calls, whole or [self.prompt]), None)
        return call_form(self.template, calling, self.plain) if calling else None

    def plain(self, messages: list[Message], tools: Any = None, *, unchanged: bool = False, **how: bool) -> str:
        """The text of a conversation, its calls as they are."""
        return self._apply(messages, tools or self.tools, unchanged=unchanged, tokenize=False, **how)

    def in_form(self, messages: list[Message]) -> list[Message]:
        """Contents as strings or as lists of parts, whichever the template reads."""
        if self.images is not None:
            return self.images.for_template(messages)
        return in_blocks(messages) if self.traits.takes_blocks else messages

    def _apply(self, messages: list[Message], tools: Any, *, unchanged: bool = False, **how: Any) -> Any:
        messages = messages if unchanged else self.in_form(messages)
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, **how, **self.options)
        except Exception as error:  # a template is a program of the model's author and may raise anything
            tried = (
                " Tool calls were tried with their arguments as objects and as JSON text."
                if has_calls(messages)
                else ""
            )
            raise ValueError(
                f"{self.where}: the chat template refuses these messages: {clean(error)}.{tried} Change their roles or order, or "
                "the template."
            ) from error

    def with_calls(self, messages: list[Message]) -> list[Message]:
        """Tool calls in the form that the template takes."""
        return self.form.of(messages) if self.form else messages

    def text(self, messages: list[Message], **how: bool) -> Any:
        """Text, or token ids."""
        how |= {"sanitize_control_tokens": True, "return_dict": False} if self.as_ids else {}
        text = self._apply(self.with_calls(messages), self.tools, tokenize=self.as_ids, **how)
        return text if self.images is None else self.images.opened(text)

    def read(self, text: Any) -> str:
        """Token ids as text."""
        return self.tokenizer.decode(text) if self.as_ids else text

    def joined(self, completion: list[Message]) -> list[Message]:
        """One conversation. A prompt that ends in an assistant turn is continued, not answered anew."""
        prompt = self.prompt
        if not self.continued:
            return [*prompt, *completion]
        last, first = prompt[-1], completion[0]
        content = last.get("content", "") + first.get("content", "")
        return [*prompt[:-1], {**last, **first, "content": content}, *completion[1:]]

    def shared(self, first: Any, second: Any) -> int:
        """Length of the common beginning; of texts, not inside a tag."""
        return shared_length(first, second) if self.as_ids else shared_text(first, second)

    def generation_prompt(self, messages: list[Message]) -> Any:
        continued = messages[-1]["role"] == "assistant"
        return self.text(messages, add_generation_prompt=not continued, continue_final_message=continued)

    def begins(self, whole: Any, edge: Any) -> bool:
        """As texts: token ids may differ where a token spans the edge."""
        return self.read(whole).startswith(self.read(edge))

    def without_opening(self, whole: Any) -> Any:
        """Without the generation prompt that some templates put behind every conversation."""
        opening = self.traits.opening
        if not opening or not self.read(whole).endswith(opening):
            return whole
        if not self.as_ids:
            return whole[: -len(opening)]
        return whole[: -len(self.tokenizer(opening, add_special_tokens=False)["input_ids"])]

    def error(self, number: int, problem: str, remedy: str) -> ValueError:
        """About a completion."""
        return bad(self.where, completion_name(number, len(self.completions)), problem, remedy)


def completion_name(number: int, count: int) -> str:
    """What an error calls a completion: its column where it has one of its own."""
    return "chosen" if number == 0 else "rejected" if count == 2 else f"completion {number}"
