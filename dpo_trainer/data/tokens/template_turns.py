"""Completions of several turns: where the assistant's turns begin and end in the text of the whole conversation."""

from __future__ import annotations

import re
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ...types import Flag, Message
from ..rows.implicit import shared_length
from .rendering import Rendering

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def edges_of(row: Rendering, number: int, start: Any, whole: Any, prompt: Any, new: Any) -> list:
    """Where the assistant's turns begin and end in `new`: by the template's generation markers, else by rendering up to
    there. `whole` is what the template wrote, behind `start` or not."""
    completion = row.completions[number]
    if len(completion) == 1:
        return []
    if row.as_ids:
        edges = _rendered_edges(row, number, start, whole)
        if new != whole:
            raise _cannot_tell(row, number)
        return [prompt, *edges[1:]]
    if GENERATION.search(row.template):
        at = _marked(row, completion, start, whole)
        row.note(Flag.GENERATION_DIFFERS, not _generates(row, at, number, start, whole))
    else:
        at = [len(edge) for edge in _rendered_edges(row, number, start, whole)]
    row.note(Flag.GENERATION_DIFFERS, new != whole)  # what stands before a later turn is not as it is here
    shift = len(new) - len(whole)
    first = prompt if at[0] <= len(start) else new[: at[0] + shift]
    return [first, *(new[: edge + shift] for edge in at[1:])]


def _rendered_edges(row: Rendering, number: int, start: Any, whole: Any) -> list:
    completion = row.completions[number]
    edges = []
    for turn, message in enumerate(completion):
        if message["role"] != "assistant":
            continue
        edges.append(_turn_start(row, row.joined(completion[:turn]), whole) if turn else start)
        edges.append(row.without_opening(row.text(row.joined(completion[: turn + 1]))))
    if not all(row.begins(whole, edge) for edge in edges[1:]):
        raise _cannot_tell(row, number)
    return edges


def _generates(row: Rendering, at: list[int], number: int, start: str, whole: str) -> bool:
    """Whether what lies between the edges is what the model would generate at each turn, white space aside."""
    try:
        rendered = [len(edge) for edge in _rendered_edges(row, number, start, whole)]
    except ValueError:
        return False
    return _outside(rendered, at, whole) == _outside(at, rendered, whole) == ""


def _turn_start(row: Rendering, before: list[Message], whole: Any) -> Any:
    """Up to where a later turn of the assistant begins: behind the generation prompt, or where the turn leaves it."""
    start = row.text(before, add_generation_prompt=True)
    if row.begins(whole, start):
        return start
    bare = row.text(before)
    if not row.begins(whole, bare):
        return start
    row.note(Flag.GENERATION_DIFFERS)
    return whole[: max(len(bare), row.shared(start, whole))]


def _marked(row: Rendering, completion: list[Message], start: str, whole: str) -> list[int]:
    messages = row.joined(completion)
    (plain,), (spans,) = render_jinja_template(
        [row.in_form(row.with_calls(messages))],
        tools=row.tools,
        chat_template=row.template,
        return_assistant_tokens_mask=True,
        **{**row.tokenizer.special_tokens_map, **row.options},
    )
    bos = max(0, len(whole) - len(plain))  # that no template wrote
    found = [(bos + begin, min(bos + end, len(whole))) for begin, end in spans if bos + end > len(start)]
    if not found:
        return [len(start), len(start)]
    # What the marker holds of the generation prompt is no more the model's in a later turn than in the first.
    opened = start[found[0][0] :]
    later = [(begin + shared_length(opened, whole[begin:end]), end) for begin, end in found[1:]]
    first = (max(found[0][0], len(start)), found[0][1])
    return [edge for span in [first, *later] for edge in span]


def _cannot_tell(row: Rendering, number: int) -> ValueError:
    problem = (
        "has several turns, and the chat template rewrites earlier turns: which words are the assistant's is not known"
    )
    remedy = "Use a template with {% generation %} markers, or end the completion after its first turn"
    if row.as_ids:
        remedy = "Take the text of the control token out of the row, or end the completion after its first turn"
    return row.error(number, problem, remedy)


def _outside(spans: list[int], others: list[int], text: str) -> str:
    """What lies in the stretches and not in the others, without white space. Both list where each begins and ends, in turn."""
    covered = [False] * len(text)
    for begin, end in zip(others[::2], others[1::2]):
        covered[begin:end] = [True] * (end - begin)
    inside = "".join(
        text[at] for begin, end in zip(spans[::2], spans[1::2]) for at in range(begin, end) if not covered[at]
    )
    return inside.strip()
