"""What a row's tokens must be under a template, found by rendering with transformers alone and by looking for marker words.

The promise: the scored text of each assistant turn is what the model would write after the generation prompt, with its end
of turn; every marker of the row is in the text; nothing else is scored.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any, NamedTuple

from .rows import ALIASES, MARKER, Kind, Message, markers
from .tokenizer import control_pattern

OPENED_THOUGHT = re.compile(r"(<think>|<\|START_THINKING\|>|<seed:think>|<thinking>|\[THINK\]|<mm:think>|<\|channel>thought)\s*$")
CLOSED_THOUGHT = re.compile(r"</think>|<\|END_THINKING\|>|</seed:think>|</thinking>|\[/THINK\]|</mm:think>|<channel\|>")


class Texts(NamedTuple):
    """What the package made of a row: the prompt, and of each completion all its pieces, with whether they are scored."""

    prompt: str
    completions: Sequence[Sequence[tuple[str, bool]]]


class Problem(NamedTuple):
    """A violated part of the promise. `kind` groups, `reason` is one line."""

    kind: str
    reason: str


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
    errors: dict[str, str] = field(default_factory=dict)

    def text(self, kind: Kind, messages: list[Message], **how: bool) -> str | None:
        key = json.dumps([messages, kind.tools, kind.kwargs, how])
        if key not in self.seen:
            try:
                self.seen[key] = self.tokenizer.apply_chat_template(
                    messages, tools=kind.tools, tokenize=False, **how, **(kind.kwargs or {})
                )
            except Exception as error:  # a template is a program and may raise anything
                self.seen[key], self.errors[key] = None, str(error)
        return self.seen[key]

    def start(self, kind: Kind, messages: list[Message]) -> str | None:
        """Up to where the model goes on."""
        last = messages[-1]["role"]
        continued = ALIASES.get(last, last) == "assistant"
        return self.text(kind, messages, add_generation_prompt=not continued, continue_final_message=continued)

    def whole(self, kind: Kind, messages: list[Message]) -> str | None:
        """Up to the end of the last turn, without the generation prompt that some templates always write."""
        text = self.text(kind, messages)
        if text is None or not self.always:
            return text
        return text.removesuffix(self.always)

    @cached_property
    def _probe(self) -> tuple[str, str]:
        """What stands between a question and its answer, and behind the answer."""
        plain = Kind(name="", prompt=[], chosen=[], rejected=[])
        asked = [{"role": "user", "content": "WORDQX"}, {"role": "assistant", "content": "WORDAX"}]
        parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in asked]
        text = self.text(plain, asked) or self.text(plain, parts) or ""
        return text.partition("WORDQX")[2].partition("WORDAX")[0], text.partition("WORDAX")[2]

    @cached_property
    def always(self) -> str:
        """The generation prompt that the template writes behind an answer, asked or not; mostly empty."""
        between, behind = self._probe
        shared = os.path.commonprefix([between[::-1], behind[::-1]])[::-1]
        control = control_pattern(self.tokenizer).search(shared)
        return shared[control.start() :] if control and shared != behind else ""

    @cached_property
    def writes_an_end(self) -> bool:
        """Of an assistant's turn."""
        behind = self._probe[1].removesuffix(self.always)
        return bool(behind.strip()) or not self._probe[0]


def readings(kind: Kind) -> Iterator[Reading]:
    """The row as it is, and the spellings that mean the same."""
    seen = []
    conversations = (kind.prompt, kind.chosen, kind.rejected)
    for number, how in enumerate(product((False, True), repeat=4)):
        prompt, *completions = ([_spelt(message, *how) for message in turns] for turns in conversations)
        if (prompt, completions) not in seen:
            seen.append((prompt, completions))
            yield Reading(prompt, tuple(completions), plain=number == 0)


def _spelt(message: Message, in_parts: bool, known_role: bool, without_null: bool, other_arguments: bool) -> Message:
    message = dict(message)
    if known_role:
        message["role"] = ALIASES.get(message["role"], message["role"])
    content = message["content"]
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    if content is None and without_null:
        content = ""
    message["content"] = [{"type": "text", "text": content}] if in_parts and content else content
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
    return [*prompt[:-1], {**last, **first, "content": last["content"] + first["content"]}, *completion[1:]]


def check(kind: Kind, texts: Texts, template: Template) -> list[Problem]:
    """Every part of the promise that the texts break, the worst first."""
    problems = []
    for completion, pieces in zip((kind.chosen, kind.rejected), texts.completions, strict=True):
        problems += list(_check_words(kind, completion, texts.prompt, pieces))
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
    everything = prompt + "".join(text for text, _ in pieces)
    scored = " ".join(text for text, is_scored in pieces if is_scored)
    answers = markers([message for message in completion if _role(message) == "assistant"])
    others = set(markers([kind.prompt, kind.tools or [], completion])) - set(answers)
    if found := [marker for marker in MARKER.findall(scored) if marker in others]:
        yield Problem("prompt scored", f"words of {_place(kind, completion, found[0])} are scored")
    present, is_scored = set(MARKER.findall(everything)), set(MARKER.findall(scored))
    if missing := [marker for marker in answers if marker in present and marker not in is_scored]:
        yield Problem("answer not scored", f"{_place(kind, completion, missing[0])} is not scored")
    lost = [marker for marker in markers([kind.prompt, kind.tools or [], completion]) if marker not in present]
    places = dict.fromkeys(_place(kind, completion, marker) for marker in lost)
    if lost:
        yield Problem("lost", "lost: " + ", ".join(places))
    if any(re.search(r'\\+"' + marker, everything) for marker in answers):
        yield Problem("quoted", "arguments are written as a quoted string")


def _place(kind: Kind, completion: list[Message], marker: str) -> str:
    """Which part of the row says a marker: "the completion's reasoning_content"."""
    for name, turns in (("prompt", kind.prompt), ("completion", completion)):
        for message in turns:
            for part, value in message.items():
                if marker in markers(value):
                    part = "think tags" if part == "content" and "<think>" in str(value).split(marker)[0] else part
                    part = "think tags" if part == "think tags" and "</think>" not in str(value).split(marker)[0] else part
                    part = "content" if part == "think tags" and "</think>" in str(value).split(marker)[0] else part
                    part = "tool name" if part == "name" else part
                    return f"{name}'s {part} ({message['role']})"
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
    return min(found, key=len) if found else [Problem("prompt", "the template raises for the prompt alone")]


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
            yield Problem("start", "the template raises where the turn is rendered alone")
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
            yield Problem("thought", f"an answer is scored as thought: the generation prompt ends with {start[-20:]!r}")
        return
    shared = os.path.commonprefix([before, start])
    if len(shared) == len(before):
        yield Problem("start", f"the generation prompt goes on with {_short(start[len(before) :])}")
    elif len(shared) == len(start):
        yield Problem("start", f"{_short(before[len(start) :])} of the answer is not scored")
    elif turn and MARKER.split(before)[-1] == MARKER.split(start)[-1]:
        yield Problem("rewritten", "an earlier turn is not as the model would see it at this turn")
    else:
        yield Problem("start", f"text before is {_short(before[len(shared) :])}, for the model {_short(start[len(shared) :])}")


def _check_end(
    last: bool, before: str, scored: str, start: str, whole: str, template: Template
) -> Iterator[Problem]:
    """The turn as it would be if it were the last one: what follows it is not known when the model writes it."""
    if before == start and whole.startswith(start):
        if scored.rstrip() == whole[len(start) :].rstrip():
            return
        if whole[len(start) :].rstrip().startswith(scored.rstrip()):
            yield Problem("end", f"ends before {_short(whole[len(start) + len(scored.rstrip()) :])}")
            return
    behind, wanted = MARKER.split(scored)[-1].rstrip(), MARKER.split(whole)[-1].rstrip()
    if behind == wanted:
        if before == start and whole.startswith(start):
            yield Problem("differs", f"{_short(scored)} is scored where the model would write {_short(whole[len(start) :])}")
    elif wanted.startswith(behind):
        yield Problem("end", f"ends before {_short(wanted[len(behind) :])}")
    elif behind.startswith(wanted) and wanted:
        yield Problem("end", f"scored behind the end of turn: {_short(behind[len(wanted) :])}")
    else:
        name = "end" if last else "other end"
        yield Problem(name, f"ends with {_short(behind)} in place of {_short(wanted)}")


def _short(text: str) -> str:
    text = MARKER.sub("WORD", text)
    return repr(text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}")
