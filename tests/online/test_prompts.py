"""Prompt-only data: what a prompt may be, what becomes of the rest of its row, and of prompts that are too long."""

from __future__ import annotations

import json
import logging
import re
from typing import Any

import online_tiny
import pandas
import pytest
import tiny
from datasets import Dataset, IterableDataset

from dpo_trainer.online.prompts import PromptData, collate_prompts, read_prompt
from dpo_trainer.training.datasets import prepare_evaluation

USER, ASSISTANT = 2, 3


def ids(text: str) -> list[int]:
    return online_tiny.ids_of(text, finished=False)


def data(window: int | None = None, vocabulary_size: int | None = tiny.VOCABULARY, **options: Any) -> PromptData:
    args = online_tiny.config("unused", **{"max_new_tokens": 4, **options})
    return PromptData(args, tiny.tokenizer(), window, vocabulary_size=vocabulary_size)


def table(*prompts: Any, **columns: Any) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts), **columns})


def stream(*prompts: Any, **columns: Any) -> IterableDataset:
    return table(*prompts, **columns).to_iterable_dataset()


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": "user" if n % 2 == 0 else "assistant", "content": text} for n, text in enumerate(contents)]


def prepared(rows: Any, name: str = "train", **how: Any) -> list[dict[str, Any]]:
    return list(data(**how).prepare(rows, name))


BOTH = pytest.mark.parametrize("form", [table, stream], ids=["table", "stream"])


# --- what a prompt may be ---


@BOTH
def test_strings(form):
    rows = prepared(form("cat", "the owl"))
    assert [row["prompt_ids"] for row in rows] == [ids("cat"), ids("the owl")]
    assert [(row["prompt"], row["example_id"], row["length"]) for row in rows] == [("cat", 0, 3), ("the owl", 1, 7)]


@BOTH
def test_conversations(form):
    rows = prepared(form(turns("hi"), turns("hi", "yes", "why")))
    first = [USER, *ids("hi"), tiny.END]
    assert rows[0]["prompt_ids"] == [*first, ASSISTANT]
    assert rows[1]["prompt_ids"] == [*first, ASSISTANT, *ids("yes"), tiny.END, USER, *ids("why"), tiny.END, ASSISTANT]
    assert rows[0]["prompt"] == turns("hi")


def test_other_spellings_of_a_conversation():
    want = [USER, *ids("hi"), tiny.END, ASSISTANT]
    assert prepared(table([{"from": "human", "value": "hi"}]))[0]["prompt_ids"] == want
    assert prepared(table({"role": "user", "content": "hi"}))[0]["prompt_ids"] == want, "one message alone"
    assert read_prompt([{"from": "human", "value": "hi"}], "Row 0") == turns("hi")


def test_a_prompt_is_tokenized_as_that_of_a_pair(tmp_path):
    """So that sampling goes on where the offline trainer would score."""
    row = tiny.rows(1)[0]
    pair = tiny.trainer(tmp_path, train=Dataset.from_list([row]), per_device_train_batch_size=1)
    assert pair.train_dataset[0]["prompt_ids"] == prepared(table(row["prompt"]))[0]["prompt_ids"]


@BOTH
def test_all_other_columns_stay(form):
    rows = prepared(form("cat", "dog", answer=["a", None], level=[1, 2]))
    assert [(row["answer"], row["level"]) for row in rows] == [("a", 1), (None, 2)]


@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("prompt", ["x<|end|>y", turns("x<|end|>y")], ids=["string", "conversation"])
def test_control_tokens_inside_a_text_stay_text(prompt, allow):
    """A user cannot end a turn by writing what ends one."""
    (row,) = prepared(table(prompt), allow_special_tokens_in_text=allow)
    inside = [*ids("x"), *([tiny.END] if allow else as_text("<|end|>")), *ids("y")]
    want = inside if isinstance(prompt, str) else [USER, *inside, tiny.END, ASSISTANT]
    assert row["prompt_ids"] == want


def as_text(control: str) -> list[int]:
    """Letter by letter, which is what the bytes of a text become in this tokenizer."""
    return [token for letter in control for token in ids(letter)]


# --- what it may not be ---


@BOTH
@pytest.mark.parametrize(
    ("prompts", "problem"),
    [
        (["cat", ""], "Row 1 of the train data, column 'prompt': is empty. Give a prompt"),
        (["cat", " \n"], "Row 1 of the train data, column 'prompt': is empty."),
        (["cat", None], "Row 1 of the train data, column 'prompt': is None. Give a string or a list of messages"),
        ([3, 4], "Row 0 of the train data, column 'prompt': is 3."),
        ([turns("a"), []], "Row 1 of the train data, column 'prompt': is an empty list"),
        ([turns("a", "b")], "Row 0 of the train data, column 'prompt': ends with an answer. End it with a turn that asks"),
        ([[{"role": "user", "content": None}]], "needs role and content"),
        ([["a", "b"]], r"column 'prompt[0]': is of type str"),
    ],
)  # fmt: skip
def test_no_prompt(prompts, problem, form):
    with pytest.raises(ValueError, match=re.escape(problem)):
        prepared(form(*prompts))


def test_a_missing_column_is_named():
    with pytest.raises(
        ValueError, match=r"train data have no column 'prompt' \(they have question, answer\).*--columns"
    ):
        prepared(Dataset.from_dict({"question": ["a"], "answer": ["b"]}))
    with pytest.raises(ValueError, match=r"eval data have no column 'prompt' \(they have question\)"):
        prepared(Dataset.from_dict({"question": ["a"]}).to_iterable_dataset(), name="eval")


def test_no_rows():
    with pytest.raises(ValueError, match="The train data have no rows: give at least one prompt"):
        prepared(Dataset.from_dict({"prompt": []}))


def test_several_datasets_are_not_mixed_here():
    for parts in ([table("a"), table("b")], [table("a")]):
        with pytest.raises(ValueError, match=r"list of datasets.*concatenate_datasets"):
            data().prepare(parts, "train")


def test_rows_that_are_no_dataset_yet(tmp_path):
    rows = [{"prompt": "cat", "answer": 1}, {"prompt": "the owl", "answer": 2}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for given in (rows, pandas.DataFrame(rows), path, str(path)):
        got = prepared(given)
        assert [(row["prompt_ids"], row["answer"]) for row in got] == [(ids("cat"), 1), (ids("the owl"), 2)]


@BOTH
def test_tokens_that_the_model_does_not_know(form):
    known = max(ids("cat"))
    assert prepared(form("cat"), vocabulary_size=known + 1)
    with pytest.raises(
        ValueError, match=f"holds the token id {known}, and the model knows {known}. Use the tokenizer"
    ):
        prepared(form("cat"), vocabulary_size=known)


# --- too long ---

LENGTHS = ["a" * 5, "b" * 9, "c" * 6, "d" * 7 + "e" * 6]  # and at most 6 = 10 - 4 fit


@BOTH
def test_cut_at_the_beginning(form, caplog):
    with caplog.at_level(logging.WARNING):
        rows = prepared(form(*LENGTHS), window=10)
    assert [tiny.tokenizer().decode(row["prompt_ids"]) for row in rows] == ["a" * 5, "b" * 6, "c" * 6, "e" * 6]
    said = "2 of 4 prompts of the train data are longer than 6 tokens (row 1 has 9): their beginning is cut."
    assert (said in caplog.text) == (form is table), "nobody has counted those of a stream"


@BOTH
def test_dropped(form, caplog):
    with caplog.at_level(logging.WARNING):
        rows = prepared(form(*LENGTHS), window=10, too_long="drop")
    assert [(row["example_id"], len(row["prompt_ids"])) for row in rows] == [(0, 5), (2, 6)]
    said = "2 of 4 prompts of the train data are longer than 6 tokens (row 1 has 9): dropped."
    assert (said in caplog.text) == (form is table)


@BOTH
def test_an_error(form):
    with pytest.raises(ValueError, match=r"train data are longer than 6 tokens.*row 1 has 9.*--too_long"):
        prepared(form(*LENGTHS), window=10, too_long="error")
    assert len(prepared(form(*LENGTHS), window=17, too_long="error")) == 4


def test_all_dropped():
    with pytest.raises(ValueError, match="No prompt of the train data is within 6 tokens: raise --max_length"):
        prepared(table("b" * 9), window=10, too_long="drop")


@pytest.mark.parametrize(
    ("window", "most", "limit"), [(10, None, 6), (10, 3, 3), (10, 7, 6), (None, 3, 3), (None, None, None)]
)
def test_the_narrower_limit_holds(window, most, limit):
    of_run = data(window, max_prompt_length=most)
    assert of_run.limit == limit
    rows = of_run.prepare(table("abcdefgh", "xy"), "train")
    assert [len(row) for row in rows["prompt_ids"]] == [limit or 8, 2]
    assert of_run.longest == (limit or 8)


def test_no_room_for_a_prompt():
    with pytest.raises(ValueError, match="--max_new_tokens 4 leaves no room for a prompt in the model's window of 4"):
        data(4)
    assert data(5).limit == 1


@pytest.mark.parametrize(("max_length", "window"), [(1024, 32), (20, 20), (None, 32)])
def test_the_window_is_that_of_the_model_or_max_length(max_length, window, tmp_path):
    trainer = online_tiny.trainer(tmp_path, model=tiny.llama(max_position_embeddings=32), max_length=max_length)
    assert trainer.data.limit == window - 6


def test_the_same_text_is_prepared_anew_under_other_options():
    """`datasets` keeps what a map made, by a key of ours."""
    rows = table(*LENGTHS)
    one, other = data(10).prepare(rows, "train"), data(8).prepare(rows, "train")
    assert [max(map(len, each["prompt_ids"])) for each in (one, other)] == [6, 4]
    assert data(10).prepare(rows, "train")._fingerprint == one._fingerprint != other._fingerprint


# --- datasets of a run ---


def test_evaluation_sets_by_name():
    of_run = data()
    found = prepare_evaluation(of_run, {"easy": table("a"), "hard": stream("b")})
    assert {name: next(iter(rows))["prompt_ids"] for name, rows in found.items()} == {
        "easy": ids("a"),
        "hard": ids("b"),
    }
    with pytest.raises(ValueError, match="The eval hard data have no column"):
        prepare_evaluation(of_run, {"hard": Dataset.from_dict({"x": ["a"]})})
    assert prepare_evaluation(of_run, table("c"))[0]["prompt_ids"] == ids("c")


def test_a_batch_is_its_rows():
    rows = prepared(table("cat", "dog", answer=["a", "b"]))
    batch = collate_prompts(rows)
    assert batch["example_ids"].tolist() == [0, 1]
    assert batch["prompts"].rows == rows
    assert list(batch) == ["example_ids", "prompts"], "the tensor first: accelerate takes the batch size from it"
