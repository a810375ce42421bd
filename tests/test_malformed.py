"""Odd inputs, each from a file on disk to token ids: an error that names file, row and remedy, or a documented behaviour.

None is a stack trace of a library below, none a silent skip. The cases are in malformed/, one table per kind of oddness.
"""

from __future__ import annotations

import re

import datasets
import pytest

pytest.register_assert_rewrite("malformed.case")

from malformed.case import STREAM, TEXT, Case, Prepared, lines, tokenizer
from malformed.conversations import MESSAGES, OPTIONS, ROLES, TEMPLATES
from malformed.files import CSV, FOLDERS, JSON, OTHER_FILES
from malformed.rows import COLUMNS, LISTS, NUMBERS, STRINGS, TOKEN_IDS
from malformed.texts import CHARACTERS, CONTROL, DEEP, LARGE, SPLITS

from dpo_trainer.data import DataOptions, Needs, prepare_dataset
from dpo_trainer.data.files.datasets import load_dataset_splits

TABLES = {
    "strings": STRINGS,
    "lists": LISTS,
    "numbers": NUMBERS,
    "ids": TOKEN_IDS,
    "columns": COLUMNS,
    "roles": ROLES,
    "messages": MESSAGES,
    "options": OPTIONS,
    "templates": TEMPLATES,
    "characters": CHARACTERS,
    "control": CONTROL,
    "splits": SPLITS,
    "deep": DEEP,
    "large": LARGE,
    "json": JSON,
    "csv": CSV,
    "files": OTHER_FILES,
    "folders": FOLDERS,
}
CASES = {f"{kind}: {name}": case for kind, table in TABLES.items() for name, case in table.items()}
LONGEST = 2000
"""Characters of an error: a few sentences, and two names of files that pytest makes long."""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def both_ways() -> list:
    return [pytest.param(case, way, id=f"{name}, {way}") for name, case in CASES.items() for way in case.ways]


@pytest.mark.parametrize(("case", "way"), both_ways())
def test_every_odd_input_is_refused_or_handled_as_documented(case: Case, way, tmp_path, caplog, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a name without a folder leads
    name = case.make(tmp_path)
    if case.check is None:
        with pytest.raises(Exception) as caught:
            prepared(case, name, way, caplog)
        check_refusal(caught.value, case, name)
    else:
        out = prepared(case, name, way, caplog)
        # No silent skip: every row of the file is kept, or dropped for a reason that the report counts.
        assert out.report.rows == case.rows
        assert out.report.kept + out.report.dropped == case.rows
        assert len(out.rows) == out.report.kept
        case.check(out)


def prepared(case: Case, name: str, way: str, caplog) -> Prepared:
    """What a user's run does with --dataset_name before it trains."""
    with caplog.at_level("INFO", logger="dpo_trainer"):
        rows, _ = load_dataset_splits(name, streaming=way == STREAM)
        needs = Needs(vocabulary_size=len(case.tokenizer) if case.tokenizer else None)
        ids, report = prepare_dataset(
            rows, case.tokenizer, DataOptions(disable_tqdm=True, **case.options), needs=needs
        )
        return Prepared(rows=list(ids), report=report, log=caplog.text, tokenizer=case.tokenizer)


def check_refusal(error: BaseException, case: Case, name: str) -> None:
    message = str(error)
    assert type(error) is ValueError, repr(error)[:LONGEST]
    assert raised_in(error).startswith("dpo_trainer."), f"raised in {raised_in(error)}: {message[:LONGEST]}"
    assert len(message) < LONGEST, message[:200]
    assert message.replace("\n", "").isprintable(), ascii(message)  # data must not steer the terminal
    assert not case.names_file or name in message, message
    if case.at is not None:
        assert re.search(rf"\b{case.at}\b", message.replace(name, "")), message
    for said in case.said:
        assert re.search(said, message.replace(name, ""), re.DOTALL), f"{said!r} is not in: {message}"


def raised_in(error: BaseException) -> str:
    """The module of the deepest frame."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_globals["__name__"]


def test_a_worker_process_says_the_same(tmp_path, caplog):
    file = lines(TEXT, TEXT, TEXT | {"chosen": 7}, TEXT)(tmp_path)
    messages = []
    for processes in (1, 2):
        rows, _ = load_dataset_splits(file)
        with pytest.raises(ValueError) as caught:
            prepare_dataset(rows, tokenizer(), DataOptions(disable_tqdm=True, dataset_num_proc=processes))
        assert type(caught.value) is ValueError
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert f"Row 2 of train ({file})" in messages[0]


def test_rows_that_are_held_out_keep_their_numbers(tmp_path):
    """Of ten rows four are drawn for evaluation; wherever the bad one goes, it is row 7 of its file."""
    file = lines(*[TEXT] * 7, TEXT | {"chosen": 7}, *[TEXT] * 2)(tmp_path)
    refusals = []
    for seed in range(4):
        for part in load_dataset_splits(file, test_split_size=4, seed=seed):
            try:
                prepare_dataset(part, tokenizer(), DataOptions(disable_tqdm=True))
            except ValueError as error:
                refusals.append((len(part), str(error)))
    assert {rows for rows, _ in refusals} == {6, 4}, "choose other seeds: it never went to both sides"
    assert len(refusals) == 4
    assert all(f"Row 7 of train ({file})" in message for _, message in refusals)


def test_the_corpus_is_as_large_as_promised():
    assert len(CASES) >= 90
    assert sum(case.check is None for case in CASES.values()) >= 60
