"""Whether the texts of a row hold all that it says; what they lack is an error, or counted where models are used without it."""

from __future__ import annotations

import re
from typing import Any

from ...types import Flag, Message
from ..errors import bad
from ..rows.messages import is_blank, words_of
from .rendering import Rendering, completion_name
from .template_words import REASONING, Lost, has_fields, lost_fields, lost_words, says, without_thought

OPENING = re.compile(r"(<(\w*think\w*)>|\[(THINK)\]|<\|START_(THINKING)\|>)\s*\Z")
"""A generation prompt that ends so leaves the reasoning open."""


def check_prompt(row: Rendering, prompt: Any) -> None:
    text = row.read(prompt)
    for number in lost_words(row.prompt, text):
        turn = row.prompt[number]
        if turn["role"] == "assistant" and says(text, without_thought(words_of(turn))):
            row.note(Flag.REASONING_LEFT_OUT)
        else:
            raise _not_written(row, "prompt", turn["role"], "content")
    if has_fields(row.prompt, row.tools):
        for lost in _lost_fields(row, row.prompt, text, add_generation_prompt=not row.continued):
            _check_lost(row, "prompt", lost, row.prompt)


def check_completion(row: Rendering, number: int, whole: Any, prompt: Any) -> None:
    completion, name = row.completions[number], completion_name(number, len(row.completions))
    text = row.read(whole[len(prompt) :]) if not row.as_ids else row.read(whole)[len(row.read(prompt)) :]
    if row.continued:
        text = row.read(whole)
    for turn in lost_words(completion, text):
        raise _not_written(row, name, completion[turn]["role"], "content")
    opened = None if row.continued else OPENING.search(row.read(prompt))
    if opened and not closes(opened, text) and not is_blank(completion):
        problem = f"does not close the reasoning that the generation prompt opens ({opened[1]}), so it would be trained as a thought"
        remedy = (
            "Give each answer with its reasoning (reasoning_content, or in front of the closing tag), or switch reasoning off for "
            "the template in a column chat_template_kwargs"
        )
        raise bad(row.where, name, problem, remedy)
    if has_fields(completion, None):
        joined = row.joined(completion)
        for lost in _lost_fields(row, joined, row.read(whole)):
            at = lost.turn - (len(joined) - len(completion))
            if at >= 0:
                _check_lost(row, name, lost._replace(turn=at), completion)


def _lost_fields(row: Rendering, messages: list[Message], text: str, **how: bool) -> list[Lost]:
    around = f"{row.template}\0{row.options}\0{how}"
    return lost_fields(
        row.with_calls(messages), row.tools, text, around, lambda turns, tools: row.plain(turns, tools, **how)
    )


def _check_lost(row: Rendering, column: str, lost: Lost, messages: list[Message]) -> None:
    if column == "prompt" and lost.field in REASONING:
        row.note(Flag.REASONING_LEFT_OUT)
    elif lost.turn >= 0:
        raise _not_written(row, column, messages[lost.turn]["role"], lost.field)
    elif column == "prompt":
        problem = "are not written by the chat template, so the model would not know them"
        raise bad(row.where, "tools", problem, "Use a template that writes tools, or leave the column out")


def _not_written(row: Rendering, column: str, role: str, field: str) -> ValueError:
    if field == "content":
        problem = f"has words of the role {role!r} that the chat template does not write"
        remedy = (
            "Use roles that the template knows, such as user and assistant, or a template that writes all of a turn"
        )
        if role == "assistant":
            remedy = "Use a template that writes all of an assistant's turn, or take out what it leaves out (such as reasoning)"
    else:
        problem = f"has {field} of the role {role!r}, which the chat template does not write"
        remedy = f"Use a template that writes {field}, or take the field out"
    return bad(row.where, column, problem, remedy)


def closes(opened: re.Match[str], text: str) -> bool:
    tag, scratch, script = opened.group(2, 3, 4)
    return (f"</{tag}>" if tag else f"[/{scratch}]" if scratch else f"<|END_{script}|>") in text
