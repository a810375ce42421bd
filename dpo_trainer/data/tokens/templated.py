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
from typing import Any, NamedTuple

from ...types import Flag
from ..rows.messages import words_of
from .rendering import Rendering
from .template_checks import OPENING, check_completion, check_prompt, closes
from .template_turns import edges_of

CLOSING = re.compile(r"(?:</[^<>\s]+>|\[/[A-Z_]+\]|<\|END_[A-Z_]+\|>|<[^<>|\s]+\|>)\s*\Z")
"""A generation prompt that ends so leaves no block open: an answer follows it."""


class Texts(NamedTuple):
    """What a row becomes; `edges` per completion: up to where scored stretches begin and end, in turn."""

    prompt: Any
    completions: Sequence[Any]
    edges: Sequence[Sequence[Any]]
    flags: Flag


def prompt_of(row: Rendering) -> Any:
    """The prompt, up to where the answer begins."""
    start = row.generation_prompt(row.prompt)
    check_prompt(row, start)
    return start


def texts_of(row: Rendering) -> Texts:
    """The prompt and the prompt with each completion, checked."""
    start = row.generation_prompt(row.prompt)
    wholes = [row.without_opening(row.text(row.joined(completion))) for completion in row.completions]
    prompt, moved = start, wholes
    if not all(row.begins(whole, start) for whole in wholes):
        prompt, moved = _fitted(row, start, wholes)
    edges = [
        edges_of(row, number, start, whole, prompt, new) for number, (whole, new) in enumerate(zip(wholes, moved))
    ]
    check_prompt(row, prompt)
    for number, whole in enumerate(moved):
        check_completion(row, number, whole, prompt)
    row.note(Flag.NO_END_OF_TURN, not row.traits.ends_turns)
    return Texts(prompt, moved, edges, row.flags)


def _fitted(row: Rendering, start: Any, wholes: list[Any]) -> tuple[Any, list[Any]]:
    """The prompt, and the prompt with each completion, where the template does not begin one with the other."""
    bare = start if row.continued else row.without_opening(row.text(row.prompt))
    if not all(row.begins(text, bare) for text in (start, *wholes)) or bare == start:
        return start, [_behind(row, start, whole, number) for number, whole in enumerate(wholes)]
    ends = [row.shared(start, whole) for whole in wholes]
    if all(_can_follow(row.read(start[end:]), row.read(whole[end:])) for end, whole in zip(ends, wholes)):
        return start, [start + whole[end:] for end, whole in zip(ends, wholes)]
    row.note(Flag.GENERATION_DIFFERS)
    return start[: min(ends)], wholes


def _behind(row: Rendering, start: Any, whole: Any, number: int) -> Any:
    """The generation prompt, and behind it what the template writes of the answer after the prompt's last words.

    The template writes the prompt otherwise once an answer follows it, such as a system text that stands before the last
    question. The model will be asked with the generation prompt, so it is trained with it.
    """
    last = words_of(row.prompt[-1]).strip()
    at = start.rfind(last) if last and not (row.as_ids or row.continued) else -1
    ending = start[at:]
    found = _nth(whole, ending, start.count(ending)) if at >= 0 else -1
    if found < 0:
        raise row.error(
            number,
            "comes out of the chat template behind another prompt than the generation prompt, so words of the prompt would "
            "be scored",
            "Use a template that keeps the prompt in front of the answer"
            + (", or take the text of the control token out of the row" if row.as_ids else ""),
        )
    return start + whole[found + len(ending) :]


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
    return opened is not None and closes(opened, answer)


def _nth(text: str, piece: str, count: int) -> int:
    """Where a piece stands for the `count`-th time, -1 where it does not."""
    at = -1
    for _ in range(count):
        at = text.find(piece, at + 1)
        if at < 0:
            return -1
    return at
