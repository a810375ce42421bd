"""What a row's tokens must be under a template, found by rendering with transformers alone and by looking for marker words.

The promise: the scored text of each assistant turn is what the model would write after the generation prompt, with its end
of turn; every marker of the row is in the text; nothing else is scored.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .rendering import Reading, Template, joined, readings, shared_beginning
from .rows import ALIASES, MARKER, Kind, Message, markers
from .tokenizer import control_pattern

OPENED_THOUGHT = re.compile(
    r"(<(\w+:)?think(ing)?(:\w+)?>|<\|START_THINKING\|>|\[THINK\]|<\|channel>thought|<\|open\|>think<\|sep\|>"
    r"|Here are my reasoning steps:)\s*$"
)
CLOSED_THOUGHT = re.compile(
    r"</(\w+:)?think(ing)?(:\w+)?>|<\|END_THINKING\|>|\[/THINK\]|<channel\|>|<\|close\|>think|\[BEGIN FINAL RESPONSE\]"
)
ODD_ARGUMENTS = {
    "a quoted string": re.compile(r'\\+"WORD'),
    "a string in braces of the template": re.compile(r'\{\s*\{\s*"'),
    "the text of a Python dict": re.compile(r"\{'\w+': 'WORD"),
}


class Texts(NamedTuple):
    """What the package made of a row: the prompt, and of each completion all its pieces, with whether they are scored."""

    prompt: str
    completions: Sequence[Sequence[tuple[str, bool]]]


class Problem(NamedTuple):
    """A violated part of the promise. `kind` groups, `reason` is one line."""

    kind: str
    reason: str


def check(kind: Kind, texts: Texts, template: Template) -> list[Problem]:
    """Every part of the promise that the texts break, the worst first."""
    problems = []
    for completion, pieces in zip((kind.chosen, kind.rejected), texts.completions, strict=True):
        problems += list(_check_words(kind, completion, texts.prompt, pieces))
    problems += list(_check_arguments(kind, texts, template))
    if not any(problem.kind in ("prompt scored", "answer not scored") for problem in problems):
        problems += list(_check_edges(kind, texts, template))
    return problems


def keepable(kind: Kind, template: Template) -> bool:
    """Whether the template, asked in the right spelling, renders turns that keep the promise."""
    return any(_keeps(kind, reading, template) for reading in readings(kind))


def _keeps(kind: Kind, reading: Reading, template: Template) -> bool:
    made = []
    for completion in reading.completions:
        pieces, at = [], 0
        final = template.whole(kind, joined(reading.prompt, completion, kind.continued))
        for number, message in enumerate(completion):
            if _role(message) != "assistant":
                continue
            start = template.start(kind, joined(reading.prompt, completion[:number], kind.continued))
            end = template.whole(kind, joined(reading.prompt, completion[: number + 1], kind.continued))
            if not (final and start and end and final.startswith(start) and final.startswith(end.rstrip())):
                return False
            pieces += [(final[at : len(start)], False), (final[len(start) : len(end)], True)]
            at = len(end)
        made.append(pieces)
    prompt = made[0][0][0]
    return not check(kind, Texts(prompt, [[piece for piece in of[1:]] for of in made]), template)


# --- by words ---


def _check_words(
    kind: Kind, completion: list[Message], prompt: str, pieces: Sequence[tuple[str, bool]]
) -> Iterator[Problem]:
    answered, scored = ("".join(text for text, counts in pieces if counts or not only) for only in (False, True))
    answers = markers([message for message in completion if _role(message) == "assistant"])
    said = markers([kind.prompt, kind.tools or [], completion])
    if found := [marker for marker in markers(scored) if marker in said and marker not in answers]:
        yield Problem("prompt scored", f"words of {_place(kind, completion, found[0])} are scored")
    if missing := [marker for marker in answers if marker in markers(answered) and marker not in markers(scored)]:
        yield Problem("answer not scored", f"{_place(kind, completion, missing[0])} is not scored")
    lost = [marker for marker in said if marker not in markers(answered if marker in answers else prompt + answered)]
    if lost:
        yield Problem("lost", ", ".join(dict.fromkeys(_place(kind, completion, marker) for marker in lost)))


def _check_arguments(kind: Kind, texts: Texts, template: Template) -> Iterator[Problem]:
    """Of tool calls: in a form that is not meant, where an object or its text in their place gives another."""
    scored = "".join(text for pieces in texts.completions for text, counts in pieces if counts)
    odd = [form for form, pattern in ODD_ARGUMENTS.items() if pattern.search(scored)]
    if odd and any(_writes_no_odd_arguments(kind, reading, template) for reading in readings(kind)):
        yield Problem("arguments", f"arguments are written as {odd[0]}")


def _writes_no_odd_arguments(kind: Kind, reading: Reading, template: Template) -> bool:
    whole = template.whole(kind, joined(reading.prompt, reading.completions[0], kind.continued))
    written = whole is not None and set(markers(reading.completions[0])) <= set(markers(whole))
    return written and not any(pattern.search(whole or "") for pattern in ODD_ARGUMENTS.values())


def _place(kind: Kind, completion: list[Message], marker: str) -> str:
    """Which part of the row says a marker, such as "reasoning_content of the completion (assistant)"."""
    for name, turns in (("prompt", kind.prompt), ("completion", completion)):
        for message in turns:
            for part, value in message.items():
                if marker in markers(value):
                    before = str(value).split(marker)[0]
                    inside = "<think>" in before and "</think>" not in before
                    return f"{'think block' if inside else part} of the {name} ({message['role']})"
    return "tools"


def _role(message: Message) -> str:
    return ALIASES.get(message["role"], message["role"])


# --- by rendering ---


def _check_edges(kind: Kind, texts: Texts, template: Template) -> list[Problem]:
    """By the reading that the texts follow best."""
    found: list[list[Problem]] = []
    for reading in readings(kind):
        start = template.start(kind, reading.prompt)
        if start is None:
            continue
        problems = [
            problem
            for completion, pieces in zip(reading.completions, texts.completions, strict=True)
            for problem in _check_turns(kind, reading, completion, texts.prompt, pieces, template)
        ]
        if not problems:
            return []
        found.append(problems)
    return min(found, key=_badness) if found else [Problem("raises", "the template raises for the prompt alone")]


def _badness(problems: list[Problem]) -> tuple[bool, int]:
    return any(problem.kind == "raises" for problem in problems), len(problems)


def _check_turns(
    kind: Kind,
    reading: Reading,
    completion: list[Message],
    prompt: str,
    pieces: Sequence[tuple[str, bool]],
    template: Template,
) -> Iterator[Problem]:
    turns = [number for number, message in enumerate(completion) if _role(message) == "assistant"]
    runs = list(_runs(prompt, pieces))
    if len(runs) != len(turns):
        yield Problem("runs", f"{len(runs)} scored stretches of {len(turns)} assistant turns")
        return
    for turn, (before, scored) in zip(turns, runs, strict=True):
        start = template.start(kind, joined(reading.prompt, completion[:turn], kind.continued))
        whole = template.whole(kind, joined(reading.prompt, completion[: turn + 1], kind.continued))
        if start is None or whole is None:
            yield Problem("raises", "the template raises where the turn is rendered alone")
            return
        yield from _check_start(turn, before, scored, start)
        yield from _check_end(turn == turns[-1], before, scored, start, whole, template)
    if not template.writes_an_end:
        yield Problem("no end", "the template writes no end of turn")


def _runs(prompt: str, pieces: Sequence[tuple[str, bool]]) -> Iterator[tuple[str, str]]:
    """Of each scored stretch: all text before it, and its own."""
    before, current = prompt, ""
    for text, is_scored in pieces:
        if is_scored:
            current += text
        elif text:
            if current:
                yield before, current
            before, current = before + current + text, ""
    if current:
        yield before, current


def _check_start(turn: int, before: str, scored: str, start: str) -> Iterator[Problem]:
    if before == start:
        if OPENED_THOUGHT.search(start) and not CLOSED_THOUGHT.search(scored):
            yield Problem(
                "thought", f"an answer is scored as thought: the generation prompt ends with {start[-20:]!r}"
            )
        return
    shared = shared_beginning(before, start)
    if len(shared) == len(before):
        yield Problem("start", f"the generation prompt goes on with {_short(start[len(before) :])}")
    elif len(shared) == len(start):
        yield Problem("start", f"{_short(before[len(start) :])} of the answer is not scored")
    elif turn and MARKER.split(before)[-1] == MARKER.split(start)[-1]:
        yield Problem("rewritten", "an earlier turn is not as the model would see it at this turn")
    else:
        yield Problem(
            "start", f"text before is {_short(before[len(shared) :])}, for the model {_short(start[len(shared) :])}"
        )


def _check_end(last: bool, before: str, scored: str, start: str, whole: str, template: Template) -> Iterator[Problem]:
    """A turn ends as it would if it were the last one: what follows it is not known when the model writes it."""
    scored, whole = template.trim(scored), template.trim(whole)
    if before == start and whole == start + scored:
        return
    behind, wanted = MARKER.split(scored)[-1], MARKER.split(whole)[-1]
    if behind == wanted or (not last and _is_one_control_token(behind, template)):
        if before == start and whole.startswith(start) and behind == wanted:
            yield Problem(
                "differs", f"{_short(scored)} is scored, the model would write {_short(whole[len(start) :])}"
            )
    elif wanted.startswith(behind):
        yield Problem("end", f"ends before {_short(wanted[len(behind) :])}")
    elif behind.startswith(wanted) and wanted:
        yield Problem("end", f"scored behind the end of turn: {_short(behind[len(wanted) :])}")
    else:
        yield Problem("end", f"ends with {_short(behind)} in place of {_short(wanted)}")


def _is_one_control_token(behind: str, template: Template) -> bool:
    """Some templates end the last turn otherwise than those before it, and the model has both ends."""
    return control_pattern(template.tokenizer).fullmatch(behind.strip()) is not None


def _short(text: str) -> str:
    text = MARKER.sub("WORD", text)
    return repr(text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}")
