"""A row as the model sees it, token by token: what each token says, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.report import DROPPED
from ..printable import printable
from ..types import Flag, PairIds
from .checks import control_ids
from .rows import Row
from .visible import with_white_space

MOST = 400
"""Tokens shown of a prompt or a completion: the first and the last of them, which is where things go wrong."""

READ, SCORED, CUT = "read", "scored", "cut"
"""What becomes of a token: read only, read and scored by the loss, or cut away by the limits."""


@dataclass(frozen=True, slots=True)
class Token:
    text: str  # with white space and control characters visible
    ids: tuple[int, ...]  # several where it takes them to write one character
    state: str  # READ, SCORED or CUT
    control: bool = False  # a special token of the tokenizer


@dataclass(frozen=True, slots=True)
class Gap:
    """Tokens that are not shown."""

    hidden: int


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A prompt or a completion."""

    role: str  # prompt, chosen, rejected; "between" for a completion that is both, in different pairs
    title: str
    counts: dict[str, int]  # tokens by state
    tokens: list[Token | Gap]


@dataclass(frozen=True, kw_only=True)
class ShownRow:
    number: int
    form: str
    outcome: str
    stretches: list[Stretch]


def show_row(row: Row, tokenizer: Any) -> ShownRow:
    """All its completions, also those that are not used."""
    ids = row.ids
    prompt = _prompt_states(ids.prompt, row.cut.prompt)
    stretches = [_stretch("prompt", "prompt", ids.prompt, prompt, tokenizer)]
    kept = _kept_lengths(ids, row.cut)
    for number, completion in enumerate(ids.completions):
        role = _role(number, ids)
        states = [SCORED] * kept[number] + [CUT] * (len(completion) - kept[number])
        for which, start, end in ids.unscored:
            if which == number:
                states[start:end] = [READ if state == SCORED else state for state in states[start:end]]
        stretches.append(_stretch(role, _title(number, role, ids), completion, states, tokenizer))
    return ShownRow(number=row.number, form=row.form, outcome=_outcome(row.cut), stretches=stretches)


def _prompt_states(whole: list[int], kept: list[int]) -> list[str]:
    """The beginning of a prompt is cut; a BOS before it may stay."""
    cut = len(whole) - len(kept)
    first = 0 if whole[cut:] == kept else 1
    return [READ] * first + [CUT] * cut + [READ] * (len(kept) - first)


def _kept_lengths(whole: PairIds, cut: PairIds) -> list[int]:
    """How much of each completion is left. Completions that no pair needs are left out whole; the others keep their order."""
    kept, left = [], list(cut.completions)
    for completion in whole.completions:
        used = bool(left) and completion[: len(left[0])] == left[0]
        kept.append(len(left.pop(0)) if used else 0)
    return kept


def _role(number: int, ids: PairIds) -> str:
    better = any(pair.chosen == number for pair in ids.pairs)
    worse = any(pair.rejected == number for pair in ids.pairs)
    return "between" if better == worse else "chosen" if better else "rejected"


def _title(number: int, role: str, ids: PairIds) -> str:
    if len(ids.completions) == 2:
        return role
    over = ", ".join(str(pair.rejected) for pair in ids.pairs if pair.chosen == number)
    under = ", ".join(str(pair.chosen) for pair in ids.pairs if pair.rejected == number)
    parts = [f"better than {over}"] * bool(over) + [f"worse than {under}"] * bool(under)
    return f"completion {number}: {' and '.join(parts) or 'compared with none'}"


def _outcome(cut: PairIds) -> str:
    """What the limits did to the row."""
    for kind in DROPPED.values():
        if cut.flags & kind.flag:
            return f"dropped, {kind.words}"
    names = [flag.name.lower().replace("_", " ") for flag in Flag if cut.flags & flag and flag.name]
    return ", ".join(names) or "whole"


def _stretch(role: str, title: str, ids: list[int], states: list[str], tokenizer: Any) -> Stretch:
    counts = {state: states.count(state) for state in (READ, SCORED, CUT) if state in states}
    if len(ids) <= MOST:
        tokens: list[Token | Gap] = list(_tokens(ids, states, tokenizer))
    else:
        half = MOST // 2
        tokens = [
            *_tokens(ids[:half], states[:half], tokenizer),
            Gap(len(ids) - 2 * half),
            *_tokens(ids[-half:], states[-half:], tokenizer),
        ]
    return Stretch(role=role, title=title, counts=counts, tokens=tokens)


def _tokens(ids: Sequence[int], states: Sequence[str], tokenizer: Any) -> Iterator[Token]:
    control = control_ids(tokenizer)
    for start, end, text in pieces(ids, tokenizer, control):
        special = ids[start] in control
        shown = printable(text) if special else with_white_space(text)
        yield Token(shown or "∅", tuple(ids[start:end]), states[start], special)


def pieces(ids: Sequence[int], tokenizer: Any, control: set[int]) -> Iterator[tuple[int, int, str]]:
    """(start, end, text) of the shortest runs of tokens that decode to whole characters.

    A byte-level token may be part of a character, and a word's first token may lose its space when it is decoded alone:
    so each run is decoded behind the one before it, whose text is then taken off.
    """
    before = start = 0
    while start < len(ids):
        if ids[start] in control:
            yield start, start + 1, tokenizer.convert_ids_to_tokens(ids[start])
            before = start = start + 1
            continue
        prefix = _decode(ids[before:start], tokenizer)
        end = start + 1
        text = _decode(ids[before:end], tokenizer)
        while text.endswith("\ufffd") and end < min(start + 4, len(ids)) and ids[end] not in control:
            end += 1
            text = _decode(ids[before:end], tokenizer)
        yield start, end, text[len(prefix) :]
        before, start = start, end


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False) if ids else ""
