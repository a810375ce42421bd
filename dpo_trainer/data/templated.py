"""A row of messages -> its texts, by the tokenizer's chat template: the prompt, and the prompt with each completion.

The promise: the tokens of a completion are what the model would generate after the prompt as it will see it
(`add_generation_prompt`), and all that the row says is in the text. Templates were not written for it, so a row may need one of
these, and is refused where none of them helps:

    the whole conversation does not begin    the finished turn lacks text that the generation prompt ends with: it is put
    as the generation prompt does            before the answer where the answer can follow it, else both are cut where they part
    the template writes the prompt anew      what it writes of the answer is put behind the generation prompt
    once an answer follows
    the template opens another answer        left off
    behind every one
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, cast

from transformers.utils.chat_template_utils import render_jinja_template

from ..batch import Message, Pair
from .errors import bad, clean
from .image_text import ImageText
from .implicit import shared_length
from .messages import is_blank, words_of
from .report import Flag
from .template_calls import CallForm, call_form, has_calls
from .template_traits import TAG, Traits, in_parts, traits
from .template_words import REASONING, Lost, has_fields, lost_fields, lost_words, says, without_thought

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
CLOSING = re.compile(r"(?:</[^<>\s]+>|\[/[A-Z_]+\]|<\|END_[A-Z_]+\|>|<[^<>|\s]+\|>)\s*\Z")
"""A generation prompt that ends so leaves no block open: an answer follows it."""
OPENING = re.compile(r"(<(\w*think\w*)>|\[(THINK)\]|<\|START_(THINKING)\|>)\s*\Z")
"""One that ends so leaves the reasoning open."""


class Texts(NamedTuple):
    """What a row becomes; `edges` per completion: up to where scored stretches begin and end, in turn."""

    prompt: Any
    completions: Sequence[Any]
    edges: Sequence[Sequence[Any]]
    flags: Flag


class Templated:
    """Renders one row of messages. `as_ids`: control tokens in its strings stay text, which only token ids can say."""

    def __init__(self, pair: Pair, tokenizer: Any, where: str, images: ImageText | None, *, as_ids: bool):
        self.tokenizer, self.where, self.images, self.as_ids = tokenizer, where, images, as_ids
        self.tools, self.options = pair.tools, pair.chat_template_kwargs
        self.flags = Flag.ROLES_RENAMED if pair.roles_renamed else Flag(0)
        self.prompt = self._known_roles(cast("list[Message]", pair.prompt))
        self.completions = cast("tuple[list[Message], ...]", pair.completions)
        self.continued = self.prompt[-1]["role"] == "assistant"

    def _note(self, flag: Flag, found: bool) -> None:
        if found:
            self.flags |= flag

    # --- rendering ---

    @cached_property
    def template(self) -> str:
        return self.tokenizer.get_chat_template(tools=self.tools)

    def _known_roles(self, messages: list[Message]) -> list[Message]:
        """`developer`, as newer data calls the system turn, where the template does not know it."""
        roles = [message["role"] for message in messages]
        if "developer" not in roles or "system" in roles or "developer" in self.template:
            return messages
        self.flags |= Flag.ROLES_RENAMED
        return [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in messages]

    @cached_property
    def _form(self) -> CallForm | None:
        """How this row's tool calls are handed to the template; None where it has none."""
        whole = [self._joined(completion) for completion in self.completions if completion]
        calling = next(filter(has_calls, whole or [self.prompt]), None)
        return call_form(self.template, calling, self._plain) if calling else None

    def _plain(self, messages: list[Message], tools: Any = None, *, as_given: bool = False, **how: bool) -> str:
        """The text of a conversation, its calls as they are."""
        return self._apply(messages, tools or self.tools, as_given=as_given, tokenize=False, **how)

    def _in_form(self, messages: list[Message]) -> list[Message]:
        """Contents as strings or as lists of parts, whichever the template reads."""
        if self.images is not None:
            return self.images.for_template(messages)
        return in_parts(messages) if self._traits.takes_parts else messages

    def _apply(self, messages: list[Message], tools: Any, *, as_given: bool = False, **how: Any) -> Any:
        messages = messages if as_given else self._in_form(messages)
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

    def _text(self, messages: list[Message], **how: bool) -> Any:
        """Text, or token ids."""
        how |= {"sanitize_control_tokens": True, "return_dict": False} if self.as_ids else {}
        messages = self._form.of(messages) if self._form else messages
        text = self._apply(messages, self.tools, tokenize=self.as_ids, **how)
        return text if self.images is None else self.images.opened(text)

    def _read(self, text: Any) -> str:
        """Token ids as text."""
        return self.tokenizer.decode(text) if self.as_ids else text

    def _joined(self, completion: list[Message]) -> list[Message]:
        """One conversation. A prompt that ends in an assistant turn is continued, not answered anew."""
        prompt = self.prompt
        if not self.continued:
            return [*prompt, *completion]
        last, first = prompt[-1], completion[0]
        content = last.get("content", "") + first.get("content", "")
        return [*prompt[:-1], {**last, **first, "content": content}, *completion[1:]]

    # --- the texts of the row ---

    def start(self) -> Any:
        """The prompt, up to where the answer begins."""
        start = self._generation_prompt(self.prompt)
        self._check_prompt(start)
        return start

    def parts(self) -> Texts:
        start = self._generation_prompt(self.prompt)
        wholes = [self._without_opening(self._text(self._joined(each))) for each in self.completions]
        begins = [self._begins(whole, start) for whole in wholes]
        prompt, moved = start, wholes
        if not all(begins):
            prompt, moved = self._fitted(start, wholes)
        edges = [
            self._edges(number, start, whole, prompt, new) for number, (whole, new) in enumerate(zip(wholes, moved))
        ]
        self._check_prompt(prompt)
        for number, whole in enumerate(moved):
            self._check_completion(number, whole, prompt)
        self._note(Flag.NO_END_OF_TURN, not self._traits.ends_turns)
        return Texts(prompt, moved, edges, self.flags)

    def _generation_prompt(self, messages: list[Message]) -> Any:
        continued = messages[-1]["role"] == "assistant"
        return self._text(messages, add_generation_prompt=not continued, continue_final_message=continued)

    def _begins(self, whole: Any, edge: Any) -> bool:
        """As texts: token ids may differ where a token spans the edge."""
        return self._read(whole).startswith(self._read(edge))

    def _fitted(self, start: Any, wholes: list[Any]) -> tuple[Any, list[Any]]:
        """The prompt, and the prompt with each completion, where the template does not begin one with the other."""
        bare = start if self.continued else self._without_opening(self._text(self.prompt))
        if not all(self._begins(text, bare) for text in (start, *wholes)) or bare == start:
            return start, [self._behind(start, whole, number) for number, whole in enumerate(wholes)]
        ends = [self._shared(start, whole) for whole in wholes]
        if all(_can_follow(self._read(start[end:]), self._read(whole[end:])) for end, whole in zip(ends, wholes)):
            return start, [start + whole[end:] for end, whole in zip(ends, wholes)]
        self.flags |= Flag.GENERATION_DIFFERS
        return start[: min(ends)], wholes

    def _shared(self, first: Any, second: Any) -> int:
        """Length of the common beginning; of texts, not inside a tag."""
        end = shared_length(first, second)
        if self.as_ids:
            return end
        cut = [
            match.start()
            for text in (first, second)
            for match in TAG.finditer(text)
            if match.start() < end < match.end()
        ]
        return min(cut, default=end)

    def _behind(self, start: Any, whole: Any, number: int) -> Any:
        """The generation prompt, and behind it what the template writes of the answer after the prompt's last words.

        The template writes the prompt otherwise once an answer follows it, such as a system text that stands before the last
        question. The model will be asked with the generation prompt, so it is trained with it.
        """
        last = words_of(self.prompt[-1]).strip()
        at = start.rfind(last) if last and not (self.as_ids or self.continued) else -1
        ending = start[at:]
        found = _nth(whole, ending, start.count(ending)) if at >= 0 else -1
        if found < 0:
            raise bad(
                self.where,
                completion_name(number, len(self.completions)),
                "comes out of the chat template behind another prompt than the generation prompt, so words of the prompt would "
                "be scored",
                "Use a template that keeps the prompt in front of the answer"
                + (", or take the text of the control token out of the row" if self.as_ids else ""),
            )
        return start + whole[found + len(ending) :]

    @cached_property
    def _traits(self) -> Traits:
        return traits(self.template, self.options, lambda messages, **how: self._plain(messages, as_given=True, **how))

    def _without_opening(self, whole: Any) -> Any:
        """Without the generation prompt that some templates put behind every conversation."""
        opening = self._traits.opening
        if not opening or not self._read(whole).endswith(opening):
            return whole
        if not self.as_ids:
            return whole[: -len(opening)]
        return whole[: -len(self.tokenizer(opening, add_special_tokens=False)["input_ids"])]

    # --- completions of several turns ---

    def _edges(self, number: int, start: Any, whole: Any, prompt: Any, new: Any) -> list:
        """Where the assistant's turns begin and end in `new`: by the template's generation markers, else by rendering up to
        there. `whole` is what the template wrote, behind `start` or not."""
        completion = self.completions[number]
        if len(completion) == 1:
            return []
        if self.as_ids:
            edges = self._rendered_edges(number, start, whole)
            if new != whole:
                raise self._cannot_tell(number)
            return [prompt, *edges[1:]]
        if GENERATION.search(self.template):
            at = self._marked(completion, start, whole)
            self._note(Flag.GENERATION_DIFFERS, not self._generates(at, number, start, whole))
        else:
            at = [len(edge) for edge in self._rendered_edges(number, start, whole)]
        self._note(Flag.GENERATION_DIFFERS, new != whole)  # what stands before a later turn is not as it is here
        shift = len(new) - len(whole)
        first = prompt if at[0] <= len(start) else new[: at[0] + shift]
        return [first, *(new[: edge + shift] for edge in at[1:])]

    def _rendered_edges(self, number: int, start: Any, whole: Any) -> list:
        completion = self.completions[number]
        edges = []
        for turn, message in enumerate(completion):
            if message["role"] != "assistant":
                continue
            edges.append(self._turn_start(self._joined(completion[:turn]), whole) if turn else start)
            edges.append(self._without_opening(self._text(self._joined(completion[: turn + 1]))))
        if not all(self._begins(whole, edge) for edge in edges[1:]):
            raise self._cannot_tell(number)
        return edges

    def _generates(self, at: list[int], number: int, start: str, whole: str) -> bool:
        """Whether what lies between the edges is what the model would generate at each turn, white space aside."""
        try:
            rendered = [len(edge) for edge in self._rendered_edges(number, start, whole)]
        except ValueError:
            return False
        return _outside(rendered, at, whole) == _outside(at, rendered, whole) == ""

    def _turn_start(self, before: list[Message], whole: Any) -> Any:
        """Up to where a later turn of the assistant begins: behind the generation prompt, or where the turn leaves it."""
        start = self._text(before, add_generation_prompt=True)
        if self._begins(whole, start):
            return start
        bare = self._text(before)
        if not self._begins(whole, bare):
            return start
        self.flags |= Flag.GENERATION_DIFFERS
        return whole[: max(len(bare), self._shared(start, whole))]

    def _marked(self, completion: list[Message], start: str, whole: str) -> list[int]:
        messages = self._joined(completion)
        messages = self._form.of(messages) if self._form else messages
        (plain,), (stretches,) = render_jinja_template(
            [self._in_form(messages)],
            tools=self.tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.options},
        )
        bos = max(0, len(whole) - len(plain))  # that no template wrote
        found = [(bos + begin, min(bos + end, len(whole))) for begin, end in stretches if bos + end > len(start)]
        if not found:
            return [len(start), len(start)]
        # What the marker holds of the generation prompt is no more the model's in a later turn than in the first.
        opened = start[found[0][0] :]
        later = [(begin + shared_length(opened, whole[begin:end]), end) for begin, end in found[1:]]
        first = (max(found[0][0], len(start)), found[0][1])
        return [edge for stretch in [first, *later] for edge in stretch]

    def _cannot_tell(self, number: int) -> ValueError:
        problem = "has several turns, and the chat template rewrites earlier turns: which words are the assistant's is not known"
        remedy = "Use a template with {% generation %} markers, or end the completion after its first turn"
        if self.as_ids:
            remedy = "Take the text of the control token out of the row, or end the completion after its first turn"
        return bad(self.where, completion_name(number, len(self.completions)), problem, remedy)

    # --- is all of it there? ---

    def _check_prompt(self, prompt: Any) -> None:
        text = self._read(prompt)
        for number in lost_words(self.prompt, text):
            turn = self.prompt[number]
            if turn["role"] == "assistant" and says(text, without_thought(words_of(turn))):
                self.flags |= Flag.REASONING_LEFT_OUT
            else:
                raise self._not_written("prompt", turn["role"], "content")
        if has_fields(self.prompt, self.tools):
            for lost in self._lost_fields(self.prompt, text, add_generation_prompt=not self.continued):
                self._check_lost("prompt", lost, self.prompt)

    def _check_completion(self, number: int, whole: Any, prompt: Any) -> None:
        completion, name = self.completions[number], completion_name(number, len(self.completions))
        text = self._read(whole[len(prompt) :]) if not self.as_ids else self._read(whole)[len(self._read(prompt)) :]
        if self.continued:
            text = self._read(whole)
        for turn in lost_words(completion, text):
            raise self._not_written(name, completion[turn]["role"], "content")
        opened = None if self.continued else OPENING.search(self._read(prompt))
        if opened and not _closes(opened, text) and not is_blank(completion):
            problem = f"does not close the reasoning that the generation prompt opens ({opened[1]}), so it would be trained as a thought"
            remedy = (
                "Give each answer with its reasoning (reasoning_content, or in front of the closing tag), or switch reasoning off for "
                "the template in a column chat_template_kwargs"
            )
            raise bad(self.where, name, problem, remedy)
        if has_fields(completion, None):
            joined = self._joined(completion)
            for lost in self._lost_fields(joined, self._read(whole)):
                at = lost.turn - (len(joined) - len(completion))
                if at >= 0:
                    self._check_lost(name, lost._replace(turn=at), completion)

    def _lost_fields(self, messages: list[Message], text: str, **how: bool) -> list[Lost]:
        messages = self._form.of(messages) if self._form else messages
        around = f"{self.template}\0{self.options}\0{how}"
        return lost_fields(messages, self.tools, text, around, lambda turns, tools: self._plain(turns, tools, **how))

    def _check_lost(self, column: str, lost: Lost, messages: list[Message]) -> None:
        if column == "prompt" and lost.field in REASONING:
            self.flags |= Flag.REASONING_LEFT_OUT
        elif lost.turn >= 0:
            raise self._not_written(column, messages[lost.turn]["role"], lost.field)
        elif column == "prompt":
            problem = "are not written by the chat template, so the model would not know them"
            raise bad(self.where, "tools", problem, "Use a template that writes tools, or leave the column out")

    def _not_written(self, column: str, role: str, field: str) -> ValueError:
        if field == "content":
            problem = f"has words of the role {role!r} that the chat template does not write"
            remedy = "Use roles that the template knows, such as user and assistant, or a template that writes all of a turn"
            if role == "assistant":
                remedy = "Use a template that writes all of an assistant's turn, or take out what it leaves out (such as reasoning)"
        else:
            problem = f"has {field} of the role {role!r}, which the chat template does not write"
            remedy = f"Use a template that writes {field}, or take the field out"
        return bad(self.where, column, problem, remedy)


def _can_follow(tail: str, answer: str) -> bool:
    """Whether a model that has seen `tail`, the end of the generation prompt, would go on with `answer`.

    It would where the tail leaves nothing open, as an empty block of reasoning does, and where the answer closes what it leaves
    open. An answer without reasoning behind an opened <think> would be trained as a thought.
    """
    if not tail.strip():
        return True
    if CLOSING.search(tail):
        return True
    opened = OPENING.search(tail)
    return opened is not None and _closes(opened, answer)


def _closes(opened: re.Match[str], text: str) -> bool:
    tag, scratch, script = opened.group(2, 3, 4)
    return (f"</{tag}>" if tag else f"[/{scratch}]" if scratch else f"<|END_{script}|>") in text


def _outside(stretches: list[int], others: list[int], text: str) -> str:
    """What lies in the stretches and not in the others, without white space. Both list where each begins and ends, in turn."""
    covered = [False] * len(text)
    for begin, end in zip(others[::2], others[1::2]):
        covered[begin:end] = [True] * (end - begin)
    inside = "".join(
        text[at] for begin, end in zip(stretches[::2], stretches[1::2]) for at in range(begin, end) if not covered[at]
    )
    return inside.strip()


def _nth(text: str, piece: str, count: int) -> int:
    """Where a piece stands for the `count`-th time, -1 where it does not."""
    at = -1
    for _ in range(count):
        at = text.find(piece, at + 1)
        if at < 0:
            return -1
    return at


def completion_name(number: int, count: int) -> str:
    """What an error calls a completion: its column where it has one of its own."""
    return "chosen" if number == 0 else "rejected" if count == 2 else f"completion {number}"
