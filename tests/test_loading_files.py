"""Rows of text and Parquet files come out as they went in, streamed or not; what cannot is named by file and line.

Odd inputs from a file to token ids are in test_malformed.py; here are the readers themselves.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from functools import partial

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_trainer.data.files.column_types import EXACT, JSON, column_type, wider
from dpo_trainer.data.files.csv_rows import read_csv_rows
from dpo_trainer.data.files.datasets import load_dataset_splits
from dpo_trainer.data.files.json_rows import read_json_rows
from dpo_trainer.data.files.tables import BLOCK, table_of_rows

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=[False, True], ids=["map", "stream"])
def read(request, tmp_path):
    """Content of a file, and its name -> the rows that training gets."""

    def rows_of(content: str | bytes, name: str = "pairs.jsonl", **options) -> list[dict]:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(load_dataset_splits(str(tmp_path / name), streaming=request.param, **options)[0])

    return rows_of


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- JSON: nothing is guessed ---


@pytest.mark.parametrize(
    "values",
    [
        ["2024-01-01", "2024-01-02 10:00:00"],
        ["42", "007"],
        ["N/A", "null", "None", "nan", "true", ""],
        ["a\u2028b\x85c", "d\x00e", "\u202eright to left", "\U0001f600"],
        ["x" * 2_000_000, "y"],
        [0.1, 1e-300, -0.0, math.pi],
        [1, 2**63 - 1, -(2**63) + 1],
        [[1, 2], [], None, [3]],
        [{"role": "user", "content": "x"}, None],
        [[{"from": "human", "value": "x"}], []],
    ],
    ids=lambda values: str(values)[:20],
)
def test_values_of_one_kind_come_out_as_they_went_in(read, values):
    rows = [PAIR | {"value": value} for value in values]
    assert read(jsonl(*rows)) == rows
    assert read(json.dumps(rows, indent=1, ensure_ascii=False), "array.json") == rows


@pytest.mark.parametrize(
    "values",
    [
        ["a string", [{"role": "user", "content": "messages"}]],
        ["42", 42, "[1]", [1], "true", True, '{"a": 1}', {"a": 1}],
        [{"a": 1, "b": 2}, {"b": 3, "a": 4}],
        [{"a": 1}, {"b": None}, {}],
        [[{"name": "f", "parameters": {"x": {}}}], [{"name": "g", "parameters": {"y": {"type": "string"}}}]],
        [[[[1]]], "deep"],
        [2**63, -1],
        [EXACT + 1, 0.5],
    ],
    ids=lambda values: str(values)[:30],
)
@pytest.mark.parametrize("far", [0, BLOCK], ids=["near", "blocks apart"])
def test_values_of_several_kinds_come_out_as_they_went_in(read, values, far):
    """Arrow would fill up objects with None, give one the other's order of keys, and make text of lists."""
    rows = [PAIR | {"value": value} for value in values]
    rows = [rows[0]] * far + rows
    got = read(jsonl(*rows))
    assert got == rows
    assert [json.dumps(row) for row in got] == [json.dumps(row) for row in rows]  # also the order of keys


def test_a_value_that_comes_late(read):
    """After 12 MB, where the library's reader has long fixed its types; and a column that is not even there before."""
    filler = PAIR | {"tools": None, "weight": 1, "chosen": "x" * 40_000}
    last = PAIR | {"tools": [{"name": "f"}], "weight": 0.5, "prompt": [{"role": "user", "content": "x"}], "late": "y"}
    got = read(jsonl(*[filler] * 300, last))
    assert len(got) == 301
    assert {name: value for name, value in got[0].items() if value is not None} == {
        name: value for name, value in filler.items() if value is not None
    }
    assert got[-1] == last
    assert type(got[0]["weight"]) in (int, float)


def test_columns_that_only_agents_would_have(read):
    """Rows with these columns are the traces of an agent to the library, which refuses them or changes them."""
    row = {
        "id": "1",
        "source": "s",
        "model": "m",
        "system_prompt": "x",
        "messages": [{"role": "user", "content": "x"}],
    }
    assert read(jsonl(row | PAIR)) == [row | PAIR]


def test_a_fraction_among_token_ids_leaves_the_other_rows_alone(read):
    rows = [{"prompt_ids": [1, 2], "scores": [1, 2]}, {"prompt_ids": [1.5], "scores": [0.5]}]
    got = read(jsonl(*rows))
    assert got == rows
    assert [type(number) for number in got[0]["prompt_ids"]] == [int, int]


EIGHTHS = st.integers(-80, 80).map(lambda n: n / 8)  # floats that every reader of JSON gives back exactly
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | EIGHTHS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.sampled_from("abcd"), VALUES, min_size=1), min_size=1, max_size=6))
def test_any_rows_come_out_as_they_went_in(tmp_path, rows):
    """Whatever stands in a file; a table has None where a row lacks a column."""
    file = str(tmp_path / "pairs.jsonl")
    with open(file, "w") as lines:
        lines.write(jsonl(*rows))
    table = table_of_rows(partial(read_json_rows, [file]), [file], "json")
    assert list(read_json_rows([file])) == rows
    assert [{name: row.get(name) for name in table.column_names} for row in rows] == list(table)
    assert set(table.column_names) == set().union(*rows)


# --- JSON: how files may look ---


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\ufeff\n \n", " \n\n"])
def test_line_ends_blank_lines_and_a_byte_order_mark(read, start, end):
    two = json.dumps(PAIR) + end + end + json.dumps(PAIR)
    assert read(start + two) == [PAIR, PAIR]
    assert read(start + f"[{end}{json.dumps(PAIR)},{end}{json.dumps(PAIR)}]{end}", "array.json") == [PAIR, PAIR]


def test_objects_over_several_lines(read):
    """What `json.dump(row, file, indent=2)` and `jq` without -c write: one row, or one after another."""
    pretty = json.dumps(PAIR | {"value": [{"a": 1}]}, indent=2)
    assert read(pretty, "pairs.json") == [PAIR | {"value": [{"a": 1}]}]
    assert read(f"{pretty}\n{pretty}\n") == [PAIR | {"value": [{"a": 1}]}] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"data": [%s]}',
            r"line 1: no row, but one object whose 'data' holds the rows.* `jq -c '\.\[\"data\"\]\[\]'",
        ),
        ('{\n"data": [%s]}', r"line 1: no row, but one object whose 'data' holds the rows"),
        ("[%s,\n\n%s,]", r"line 3: not valid JSON \(Expecting value at column \d+\)"),
        ("[%s\n%s]", r"line 2: not valid JSON \(',' or '\]' expected after a row of the array, at column 1\)"),
        ("[%s]\n\n%s", r"line 3: not valid JSON \(something follows the array, at column 1\)"),
        ("[%s,\n7]", r"row 1 of the array \(line 2\): a row must be a JSON object .*got int"),
        (
            '[%s,\n{"a": [{"b": "\\udc00"}]}]',
            r"row 1 of the array \(line 2\), column 'a': '\\udc00' is half of a char",
        ),
        ("%s\n%s%s", r"line 2: not valid JSON \(Extra data"),
        ("%s\n{}", r"line 2: a row must be a JSON object with named columns, got an empty one"),
        ('%s\n{"a": {"b": 1, "b": 2}}', r"line 2: the key 'b' stands twice in one object"),
        ('%s\n{"a": "\\ud800"}', r"line 2, column 'a': '\\ud800' is half of a character \(a lone surrogate\)\. Write"),
        ('%s\n{"a\\ud800": 1}', r"line 2, column 'a\\ud800': '\\ud800' is half"),
        ('%s\n{"a": 18446744073709551616}', r"line 2: the integer 18446744073709551616 does not fit into 64 bits"),
        ('%s\n{"a": -9223372036854775809}', r"line 2: the integer -9223372036854775809 does not fit"),
        (
            '%s\n{"a": ' + "9" * 5000 + "}",
            r"line 2: the integer 9{30} does not fit into 64 bits: write it as a string",
        ),
        ('%s\n{"a": ' + "[" * 300 + "]" * 300 + "}", r"line 2: nested more than 200 levels deep"),
        ('%s\n{"a": ' + "[" * 9999 + "]" * 9999 + "}", r"line 2: nested "),
    ],
    ids=lambda value: value[:24],
)
def test_what_cannot_come_through_is_named_by_line(read, text, message):
    with pytest.raises(ValueError, match=rf"(?s)pairs\.json, {message}"):
        read(text.replace("%s", json.dumps(PAIR)), "pairs.json")


def test_surrogate_pairs_are_characters(read):
    assert "\\ud83d" in json.dumps("\U0001f600")
    assert read(jsonl(PAIR | {"chosen": "\U0001f600"})) == [PAIR | {"chosen": "\U0001f600"}]


def test_messages_under_a_name_of_the_users_own_are_no_shell_around_rows(read):
    row = {"turns": [{"role": "user", "content": "x"}], "good": "c", "bad": "r"}
    got = read(jsonl(row), columns={"messages": "turns", "chosen": "good", "rejected": "bad"})
    assert got == [{"messages": row["turns"], "chosen": "c", "rejected": "r"}]


def test_nan_is_a_number_where_numbers_are(read):
    [a, b] = read('{"score": NaN}\n{"score": 1}\n')
    assert math.isnan(a["score"])
    assert b["score"] == 1


def test_nan_in_a_mixed_column_is_refused_rather_than_lost(tmp_path):
    """Such a column is held as JSON text, which has no NaN."""
    (tmp_path / "pairs.jsonl").write_text(jsonl(*[{"a": "x"}] * BLOCK, {"a": "y"}, {"a": {"b": [float("nan")]}}))
    with pytest.raises(
        ValueError, match=r"Row 257 of .*pairs\.jsonl, column 'a': NaN cannot stand .*Give a number, or null"
    ):
        load_dataset_splits(str(tmp_path / "pairs.jsonl"))


def test_large_integers_in_one_block_and_fractions_in_another(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(jsonl(*[{"a": EXACT + 1}] * BLOCK, {"a": 0.5}))
    with pytest.raises(
        ValueError, match=r"pairs\.jsonl: the column 'a' has values that do not go together: .*as strings"
    ):
        load_dataset_splits(str(tmp_path / "pairs.jsonl"))


# --- encodings and compression ---


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv"])
@pytest.mark.parametrize(
    ("encode", "message"),
    [
        (lambda text: text.encode("latin-1"), r"line 3: not UTF-8 text: save it as UTF-8, .*iconv -f LATIN1"),
        (lambda text: text.encode("utf-16"), r"line 1: not UTF-8 text: .*iconv -f UTF-16"),
        (lambda text: text.encode("utf-16-le"), r"line 1: a null byte, .*iconv -f UTF-16"),
        (lambda text: text.replace("é", "\0").encode(), r"line 3: a null byte, which no text holds: remove it"),
    ],
    ids=["latin-1", "utf-16", "utf-16-le", "null"],
)
def test_text_that_is_not_utf8(read, name, encode, message):
    row = {"a": "é"}
    lines = json.dumps(PAIR) + "\n" + json.dumps(PAIR) + "\n" + json.dumps(row, ensure_ascii=False) + "\n"
    text = "a,b\n1,2\né,4\n" if name.endswith("csv") else lines
    with pytest.raises(ValueError, match=rf"{name}, {message}"):
        read(encode(text), name)


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.csv.gz"])
def test_gz_that_is_cut_off_changed_or_none(read, name):
    text = ("a,b\n" + "1,2\n" * 500 if "csv" in name else jsonl(*[PAIR] * 500)).encode()
    whole = gzip.compress(text, mtime=0)
    assert len(read(whole, name)) == 500
    checksum = bytearray(whole)
    checksum[-8] ^= 1
    for damaged in (whole[:-12], bytes(checksum), text, whole + b"more"):
        with pytest.raises(
            ValueError, match=rf"{name}: damaged, or no gzip at all \(.*\)\. Download or compress it again"
        ):
            read(damaged, name)


# --- CSV ---


def test_cells_are_text(read):
    cells = ["42", "N/A", "2024-01-01", "None", "true", "1e5", " spaced ", 'a "quoted", comma', "two\r\nlines\nmore"]
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerows([["prompt", "chosen"], *[[cell, "x" * 200_000] for cell in cells]])
    assert read(text.getvalue(), "pairs.csv") == [{"prompt": cell, "chosen": "x" * 200_000} for cell in cells]


def test_weight_and_margin_are_numbers_and_empty_cells_none(read):
    text = "\ufeffquestion,chosen,rejected,w,margin,\na,b,,0.5,2,7\n\nd,e,f,,1e-1,8\n"
    assert read(text, "pairs.csv", columns="prompt=question,weight=w") == [
        {"prompt": "a", "chosen": "b", "rejected": None, "weight": 0.5, "margin": 2.0, "": "7"},
        {"prompt": "d", "chosen": "e", "rejected": "f", "weight": None, "margin": 0.1, "": "8"},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n1\n", r", line 3: 1 cells, and the first line names 2 columns\. Put texts .* between quotes"),
        ('a,b\n"x\ny",2\n1,2,3\n', r", line 4: 3 cells, and the first line names 2"),
        ('a,b\n"x,2\n', r", line 2: not valid CSV \(unexpected end of data\)"),
        ('a,b\n1,2\n"x"y,2\n', r", line 3: not valid CSV"),
        ("a,a\n1,2\n", r": the column 'a' stands twice in the first line\. Rename"),
        ("a;b\n1;2\n", r": the first line is one column, 'a;b'\. Separate columns by commas"),
        ("a,weight\n1,2\n3,much\n", r", line 3, column 'weight': a number is needed, got 'much'\. Write one"),
        (",\n1,2\n", r" has no names of columns\. Its first line must be such as: prompt,chosen,rejected"),
        ("a,b\n\n", r": there are no rows"),
    ],
    ids=lambda value: value[:14],
)
def test_bad_csv_is_named_by_line(read, text, message):
    with pytest.raises(ValueError, match=rf"pairs\.csv{message}"):
        read(text, "pairs.csv")


def test_several_csv_files_with_other_columns(tmp_path):
    """A stream knows the columns of all files beforehand; a row has None where its file lacks one."""
    for split, text in {"train-0": "a,b\n1,2\n", "train-1": "b,c\n3,4\n"}.items():
        (tmp_path / f"{split}.csv").write_text(text)
    want = [{"a": "1", "b": "2", "c": None}, {"a": None, "b": "3", "c": "4"}]
    for streaming in (False, True):
        train, _ = load_dataset_splits(str(tmp_path), streaming=streaming)
        assert (list(train), train.column_names) == (want, ["a", "b", "c"])
    assert [*read_csv_rows([str(tmp_path / "train-0.csv")])] == [{"a": "1", "b": "2"}]


# --- Parquet ---


def parquet(table: pa.Table) -> bytes:
    pq.write_table(table, sink := io.BytesIO())
    return sink.getvalue()


def test_parquet_gives_the_same_rows_streamed_or_not(read):
    rows = [
        PAIR | {"messages": [{"role": "user", "content": str(n)}], "ids": [n], "weight": n / 8} for n in range(600)
    ]
    assert read(parquet(Dataset.from_list(rows).data.table), "pairs.parquet") == rows
    mixed = pa.table({"prompt": pa.array(['"42"', "[1]", None], pa.json_())})
    assert read(parquet(mixed), "mixed.parquet") == [{"prompt": "42"}, {"prompt": [1]}, {"prompt": None}]


def test_parquet_of_strings_that_are_not_utf8(read):
    offsets, data = pa.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pa.py_buffer(b"ok\xff\xfe")
    table = pa.table({"chosen": ["a", "b"], "prompt": pa.Array.from_buffers(pa.string(), 2, [None, offsets, data])})
    with pytest.raises(
        ValueError, match=r"pairs\.parquet.*: the column 'prompt' is damaged, or not UTF-8 .*Write it again"
    ):
        read(parquet(table), "pairs.parquet")


def test_parquet_that_holds_what_a_dataset_cannot(read):
    table = pa.table({"a": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int8()))})
    with pytest.raises(ValueError, match=r"pairs\.parquet has a column of a type .*map.*\. Remove or convert it"):
        read(parquet(table), "pairs.parquet")
    whole = parquet(pa.table({"a": ["x"] * 9}))
    for damaged in (whole[:-9], b"PAR1", parquet(pa.table({"a": pa.array([], pa.string())}))):
        with pytest.raises(ValueError, match=r"pairs\.parquet cannot be read as parquet: .*write it again"):
            read(damaged, "pairs.parquet")


def test_parquet_files_of_one_dataset_with_other_columns(tmp_path):
    for name, column in {"train-0": "a", "train-1": "b"}.items():
        pq.write_table(pa.table({column: ["x"]}), tmp_path / f"{name}.parquet")
    for streaming in (False, True):
        with pytest.raises(
            ValueError, match=r"train-1\.parquet has the columns b, and .*train-0\.parquet has a\. Files"
        ):
            load_dataset_splits(str(tmp_path), streaming=streaming)


# --- types by hand ---


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ([None, None], pa.null()),
        ([1, None], pa.int64()),
        ([1, 0.5], pa.float64()),
        ([1, True], JSON),
        ([2**63], JSON),
        ([EXACT + 1, 0.5], JSON),
        ([[], [None]], pa.list_(pa.null())),
        ([[], ["x"]], pa.list_(pa.string())),
        ([["x"], "x"], JSON),
        ([{}], JSON),
        ([{"a": 1}, None, {"a": None}], pa.struct({"a": pa.int64()})),
        ([{"a": 1, "b": 1}, {"b": 1, "a": 1}], JSON),
    ],
    ids=str,
)
def test_the_type_of_a_column(values, want):
    assert column_type(values) == want


@pytest.mark.parametrize(
    ("one", "other", "want"),
    [
        ([None], ["x"], pa.string()),
        ([1], [0.5], pa.float64()),
        ([1], ["x"], JSON),
        ([[]], [[{"a": 1}]], pa.list_(pa.struct({"a": pa.int64()}))),
        ([{"a": None}], [{"a": [1]}], pa.struct({"a": pa.list_(pa.int64())})),
        ([{"a": 1}], [{"a": "x"}], JSON),
        ([{"a": 1}], [{"b": 1}], JSON),
        ([{"a": 1, "b": 1}], [{"b": 1, "a": 1}], JSON),
        ([{}], [None], JSON),
    ],
    ids=str,
)
def test_the_type_of_two_blocks_is_that_of_both_in_either_order(one, other, want):
    assert wider(column_type(one), column_type(other)) == want
    assert wider(column_type(other), column_type(one)) == want
    assert column_type(one + other) == want
