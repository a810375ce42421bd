"""One odd input, how it comes to be on disk, and what a user must be told or given for it."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_tokenizers import CHAT, SPECIAL, byte_bpe

from dpo_trainer.data.report import DataReport

TABLE, STREAM = "table", "stream"
BOTH = (TABLE, STREAM)


@functools.cache
def tokenizer(template: str | None = CHAT, **special: str | None) -> Any:
    return byte_bpe(adds="<bos> $A", chat_template=template, **special)


Make = Callable[[Path], str]
"""Writes into an empty folder; returns what the user gives as --dataset_name."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Either `said` (patterns that the error must match) or `check` (asserts what comes out)."""

    make: Make
    at: str | None = None  # how the error names the place, after or before the file's name: "Row 1", "line 2"
    said: Sequence[str] = ()
    check: Callable[[Prepared], None] | None = None
    rows: int = 2  # that the input has
    tokenizer: Any = field(default_factory=tokenizer)
    options: Mapping[str, Any] = field(default_factory=dict)
    ways: Sequence[str] = BOTH
    names_file: bool = True  # False: what is wrong is not in a file


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What came out of an input that was not refused."""

    rows: list[dict[str, Any]]
    report: DataReport
    log: str
    tokenizer: Any


def refused(make: Make, wrong: str, remedy: str, *, at: str | None = None, **how: Any) -> Case:
    """An input that stops the run, saying what is wrong and what to do (patterns)."""
    return Case(make=make, at=at, said=(wrong, remedy), **how)


def refused_row(make: Make, wrong: str, remedy: str, **how: Any) -> Case:
    """The same for the second of two rows: an error that names another one has not looked."""
    return refused(make, wrong, remedy, at="Row 1", **how)


def becomes(make: Make, check: Callable[[Prepared], None], **how: Any) -> Case:
    """An input of which a documented behaviour is expected."""
    return Case(make=make, check=check, **how)


# --- inputs ---

TEXT = {"prompt": "Why?", "chosen": "So.", "rejected": "No."}
RANKED = {"prompt": "Why?", "completions": ["one", "two", "three"], "scores": [1, 2, 3]}
IDS = {"prompt_ids": [1, 9], "chosen_ids": [10, 2], "rejected_ids": [11, 2]}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def human(value: Any) -> dict[str, Any]:
    return {"from": "human", "value": value}


def gpt(value: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": value}


TALK = {"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]}
SHAREGPT = {"conversations": [human("Why?")], "chosen": gpt("So."), "rejected": gpt("No.")}


def lines(*rows: Any, name: str = "pairs.jsonl") -> Make:
    """One JSON value per line, in ASCII: what is odd in the strings is written as an escape."""
    return raw("".join(json.dumps(row) + "\n" for row in rows), name)


def second(base: Mapping[str, Any], **changed: Any) -> Make:
    """A file with a good row, and the same row with changes."""
    return lines(base, {**base, **changed})


def raw(content: str | bytes, name: str = "pairs.jsonl") -> Make:
    def make(folder: Path) -> str:
        path = folder / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return str(path)

    return make


# --- what comes out ---


@dataclass(frozen=True)
class Control:
    """A control token, told apart from text that reads the same."""

    token: str


BOS, EOS, USER, ASSISTANT, SYSTEM = (Control(f"<{name}>") for name in "bos eos |user| |assistant| |system|".split())


def spelled(ids: Sequence[int], tokenizer: Any) -> list[str | Control]:
    """Control tokens by themselves, and what stands between them as text."""
    pieces: list[str | Control] = []
    text: list[int] = []
    for token in [*ids, -1]:
        if 0 <= token < len(SPECIAL) or token == -1:
            if text:
                pieces.append(tokenizer.decode(text))
                text = []
            if token >= 0:
                pieces.append(Control(SPECIAL[token]))
        else:
            text.append(token)
    return pieces


def gives(
    prompt: Any, chosen: Any, rejected: Any, *more: Any, row: int = -1, **expected: Any
) -> Callable[[Prepared], None]:
    """All tokens of one row of those kept, as `spelled`; the counts (all others are 0); other columns by name."""

    def check(out: Prepared) -> None:
        got = out.rows[row]
        columns = [got["prompt_ids"], got["chosen_ids"], got["rejected_ids"], *got["more_ids"]]
        assert [spelled(ids, out.tokenizer) for ids in columns] == [prompt, chosen, rejected, *more]
        assert counts_of(out) == expected.get("counts", {})
        for column, value in expected.items():
            assert column == "counts" or got[column] == value, column

    return check


def drops(kind: str, row: int = 1) -> Callable[[Prepared], None]:
    """Exactly this row is dropped, for this reason, and the report names it."""

    def check(out: Prepared) -> None:
        assert counts_of(out) == {kind: 1}
        assert out.report.first_rows[kind] == [row]

    return check


def logs(*patterns: str) -> Callable[[Prepared], None]:
    def check(out: Prepared) -> None:
        for pattern in patterns:
            assert re.search(pattern, out.log), out.log

    return check


def counts_of(out: Prepared) -> dict[str, int]:
    return {kind: count for kind, count in out.report.counts.items() if count}


SO = ["So.", EOS]
NO = ["No.", EOS]
ASKED = [USER, "Why?", EOS, ASSISTANT]
"""TALK's prompt, as the template CHAT writes it."""
