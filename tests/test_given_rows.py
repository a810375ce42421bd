"""Rows as a program may hold them: a list of dicts, a DataFrame, a path."""

from __future__ import annotations

import json

import datasets
import pandas
import pytest
import tiny
from datasets import Dataset

from dpo_trainer.data.files.dataset_inputs import datasets_of

ROWS = tiny.rows(8)
TALKS = tiny.chat_rows(8)
TOOLS = [
    {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [{"name": "x", "parameters": {"n": 1}}]},
    {
        "prompt": [tiny.chat_rows(1)[0]["prompt"][0]],
        "chosen": "b",
        "rejected": "c",
        "tools": [{"parameters": {}, "name": "y"}],
    },
]


def prepared(folder, given, **parts):
    return tiny.trainer(folder, train=given, parts=parts)


def write(folder, rows, name="pairs.jsonl"):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


@pytest.mark.parametrize("rows", [ROWS, TALKS], ids=["text", "messages"])
@pytest.mark.parametrize("form", ["list", "tuple", "frame", "str", "path"])
def test_every_form_trains_as_a_dataset_does(tmp_path, rows, form):
    given = {
        "list": lambda: rows,
        "tuple": lambda: tuple(rows),
        "frame": lambda: pandas.DataFrame(rows, index=range(5, 5 + len(rows))),
        "str": lambda: str(write(tmp_path, rows)),
        "path": lambda: write(tmp_path, rows),
    }[form]()
    want = prepared(tmp_path / "want", Dataset.from_list(rows), eval_dataset=Dataset.from_list(rows))
    got = prepared(tmp_path / "got", given, eval_dataset=given)
    assert got.train_dataset[:] == want.train_dataset[:]
    assert got.eval_dataset[:] == want.eval_dataset[:]
    assert got.evaluate(given)["eval_loss"] == want.evaluate()["eval_loss"] if form != "str" else True
    assert got.predict(given).metrics["test_loss"] == want.evaluate()["eval_loss"]


def test_rows_come_out_as_they_went_in():
    """`Dataset.from_list` would fill every object with the keys of all others, and put them into one order."""
    (dataset,) = datasets_of(TOOLS, "train")
    assert list(dataset) == TOOLS
    assert [list(tools[0]) for tools in dataset["tools"]] == [["name", "parameters"], ["parameters", "name"]]
    (again,) = datasets_of(TOOLS, "train")
    assert again._fingerprint == dataset._fingerprint  # so that what was computed from it is found again


def test_cells_of_a_frame():
    """Arrays, as a frame has them that was read from Parquet, and what is missing."""
    frame = pandas.DataFrame({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]})
    frame["margin"], frame["system"], frame["weight"] = (
        [1.5, float("nan")],
        [None, "s"],
        pandas.array([1, None], "Int64"),
    )
    frame["more"] = [pandas.array([1, 2]).to_numpy(), None]
    (dataset,) = datasets_of(frame, "train")
    assert dataset[0] == {
        **{"prompt": "a", "chosen": "c", "rejected": "e"},
        **{"margin": 1.5, "system": None, "weight": 1, "more": [1, 2]},
    }
    assert dataset[1]["margin"] is None
    assert dataset[1]["weight"] is None


def test_a_mixture_of_forms(tmp_path):
    """A list of rows is one dataset; a list of datasets, each in any form, is a mixture."""
    parts = [ROWS[:3], pandas.DataFrame(ROWS[3:5]), write(tmp_path, ROWS[5:]), Dataset.from_list(TALKS[:2])]
    made = prepared(tmp_path, parts)
    assert len(made.train_dataset) == 10
    assert list(made.data_reports) == [f"train {number}" for number in range(4)]


def test_datasets_to_evaluate_on_by_name(tmp_path):
    made = prepared(tmp_path, ROWS, eval_dataset={"few": ROWS[:2], "file": write(tmp_path, ROWS)})
    assert {name: len(rows) for name, rows in made.eval_dataset.items()} == {"few": 2, "file": 8}


def test_a_path_with_several_splits(tmp_path):
    saved = tmp_path / "saved"
    datasets.DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:2])}).save_to_disk(saved)
    made = prepared(tmp_path, saved, eval_dataset=str(saved))
    assert (len(made.train_dataset), len(made.eval_dataset)) == (8, 2)
    other = tmp_path / "other"
    datasets.DatasetDict({"a": Dataset.from_list(ROWS), "b": Dataset.from_list(ROWS)}).save_to_disk(other)
    with pytest.raises(ValueError, match=r"has no split 'train' for the train data \(it has: a, b\).*split=\.\.\."):
        prepared(tmp_path, other)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            datasets.DatasetDict({"train": Dataset.from_list(ROWS)}),
            r"DatasetDict, not one dataset\. Name one of its splits: 'train'",
        ),
        ({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}, r"dict of columns: .*Dataset\.from_dict"),
        ([], r"have no rows"),
        (pandas.DataFrame(), r"have no rows"),
        ([1, 2], r"train is a int, not a dataset.*Dataset\.from_list\(rows\)"),
        ([ROWS[0], "x"], r"a list of dict and of str.*Dataset\.from_list\(rows\)"),
        (iter(ROWS), r"train is a list_iterator, not a dataset\. Give a .*IterableDataset\.from_generator"),
        ("no/such.jsonl", r"no dataset file or folder 'no/such\.jsonl'"),
        ([{"question": "q", "chosen": "a", "rejected": "b"}], r"--columns prompt=question"),
    ],
    ids=["splits", "columns", "no rows", "empty frame", "numbers", "mixed", "iterator", "no file", "other columns"],
)
def test_what_is_no_dataset_is_refused_with_what_would_do(tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        prepared(tmp_path, given)


def test_columns_where_datasets_by_name_belong(tmp_path):
    with pytest.raises(ValueError, match=r"eval data are a dict of columns: .*Dataset\.from_dict"):
        prepared(tmp_path, ROWS, eval_dataset={"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
