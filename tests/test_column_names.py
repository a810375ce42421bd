"""--columns: what a dataset calls its columns -> our names, for tables and for streams that know no columns."""

from __future__ import annotations

import datasets
import pytest
from datasets import Dataset, Features, IterableDataset, Json, Value

from dpo_trainer.data.files.datasets import load_dataset_splits
from dpo_trainer.data.files.origin import name_of, named
from dpo_trainer.data.files.renaming import OURS, parse_columns, rename_columns
from dpo_trainer.data.rows.column_names import PREPARED, READ

ROWS = [{"question": f"q{i}", "best": f"b{i}", "worst": f"w{i}", "prompt": f"old {i}"} for i in range(3)]
MAPPED = [{"prompt": row["question"], "chosen": row["best"], "rejected": row["worst"]} for row in ROWS]
MAPPING = {"prompt": "question", "chosen": "best", "rejected": "worst"}


def rows_of(name: str, rows: list[dict]):
    """The rows in one of the forms that datasets have."""
    if name == "blind stream":
        dataset = IterableDataset.from_generator(generate, gen_kwargs={"rows": [rows]})
        assert dataset.column_names is None
    else:
        dataset = Dataset.from_list(rows)
        dataset = dataset.to_iterable_dataset() if name == "stream" else dataset
    return named(dataset, "pairs.jsonl")


def generate(rows):
    for part in rows:
        yield from part


@pytest.fixture(params=["table", "stream", "blind stream"])
def dataset(request):
    return rows_of(request.param, ROWS)


# --- what is written ---


@pytest.mark.parametrize(
    "given",
    ["prompt=question,chosen=best", " prompt = question , chosen = best ", '{"prompt": "question", "chosen": "best"}'],
)
def test_three_ways_to_write_a_mapping(given):
    want = {"prompt": "question", "chosen": "best"}
    assert parse_columns(given) == want
    assert parse_columns(parse_columns(given)) == want


def test_names_that_hold_signs_go_through_a_mapping():
    assert parse_columns({"prompt": "a,b=c"}) == parse_columns('{"prompt": "a,b=c"}') == {"prompt": "a,b=c"}
    assert parse_columns(None) == parse_columns({}) == {}


def test_every_column_that_is_read_can_be_mapped():
    assert set(OURS) == set(READ) - set(PREPARED)
    for ours in OURS:
        assert parse_columns(f"{ours}=x") == {ours: "x"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "promt=question",
            r"--columns: there is no column 'promt' of ours\. Did you mean 'prompt'\? There are: prompt, ",
        ),
        ("example_id=x", r"there is no column 'example_id' of ours"),
        (
            "question=prompt",
            r"'question' is no column of ours, and 'prompt' is: ours stands on the left, prompt=question",
        ),
        ("prompt=a,prompt=b", r"--columns names 'prompt' twice"),
        ('{"prompt": "a", "prompt": "b"}', r"--columns names 'prompt' twice"),
        ("chosen=a,rejected=a", r"--columns takes 'a' for several columns \(chosen, rejected\)"),
        ("prompt", r"--columns 'prompt' cannot be read\. Write ours=theirs"),
        ("prompt=a,", r"cannot be read"),
        ("=a", r"cannot be read"),
        ("prompt=a=b", r"cannot be read"),
        ("", r"cannot be read"),
        ('{"prompt"', r"is not valid JSON"),
        ('{"prompt": ["a"]}', r"'prompt' and \['a'\] must both be names"),
        ({"prompt": 3}, r"'prompt' and 3 must both be names"),
        ({"": "a"}, r"must both be names"),
        ("prompt=question,question=", r"--columns takes 'question', and leaves it out: say one of the two"),
        ("system=,system=a", r"--columns names 'system' twice"),
        (["prompt=a"], r"--columns is of type list\. Write ours=theirs"),
    ],
    ids=str,
)
def test_bad_mappings(given, message):
    with pytest.raises(ValueError, match=message):
        parse_columns(given)


# --- what it does ---


def test_columns_get_our_names_and_one_that_is_in_the_way_is_left_out(dataset, caplog):
    with caplog.at_level("INFO", logger="dpo_trainer"):
        got = list(rename_columns(dataset, MAPPING))
    assert got == MAPPED
    [line] = [record.message for record in caplog.records if "left out" in record.message]
    assert line == "pairs.jsonl: a column of its own is left out: 'prompt' ('question' takes its name)."


def test_columns_that_take_each_others_names(dataset):
    """A column that gives its values away is not in the way."""
    got = list(rename_columns(dataset, {"prompt": "best", "chosen": "question", "rejected": "prompt"}))
    want = {"prompt": "b1", "chosen": "q1", "rejected": "old 1", "worst": "w1"}
    assert got[1] == want


def test_two_columns_in_exchange():
    for form in ("table", "stream", "blind stream"):
        dataset = rows_of(form, [{"chosen": "bad", "rejected": "good"}])
        assert list(rename_columns(dataset, {"chosen": "rejected", "rejected": "chosen"})) == [
            {"chosen": "good", "rejected": "bad"}
        ]


def test_a_column_that_is_named_right_already(dataset, caplog):
    with caplog.at_level("INFO", logger="dpo_trainer"):
        got = list(rename_columns(dataset, {"prompt": "prompt", "chosen": "best"}))
    assert [(row["prompt"], row["chosen"]) for row in got] == [(row["prompt"], row["best"]) for row in ROWS]
    assert not caplog.records


def test_a_column_that_is_not_there(dataset):
    with pytest.raises(
        ValueError,
        match=r"--columns prompt=questoin: (Row 0 of )?pairs\.jsonl has no column 'questoin'\. Did you mean 'question'\? It "
        r"has: question, best, worst, prompt\.",
    ):
        list(rename_columns(dataset, {"prompt": "questoin"}))


def test_a_column_that_one_row_of_a_stream_lacks():
    dataset = rows_of("blind stream", [*ROWS, {"question": "q", "best": "b"}])
    with pytest.raises(ValueError, match=r"Row 3 of pairs\.jsonl has no column 'worst'.*It has: question, best\."):
        list(rename_columns(dataset, MAPPING))


def test_name_types_and_fingerprint_stay(dataset):
    renamed = rename_columns(dataset, MAPPING)
    assert name_of(renamed) == "pairs.jsonl"
    assert rename_columns(dataset, {}) is dataset
    if isinstance(dataset, Dataset):
        assert renamed._fingerprint == rename_columns(dataset, MAPPING)._fingerprint != dataset._fingerprint
    if dataset.column_names is not None:
        assert renamed.column_names == ["prompt", "chosen", "rejected"] or set(renamed.column_names) == set(MAPPED[0])
        assert set(renamed.features) == set(MAPPED[0])


def test_a_string_that_looks_like_json_stays_a_string():
    """A column of several kinds is held as JSON: renaming must not read it a second time."""
    features = Features({"q": Json(), "chosen": Value("string")})
    table = Dataset.from_list([{"q": '"42"', "chosen": "x"}, {"q": [1], "chosen": "y"}], features=features)
    for dataset in (table, table.to_iterable_dataset()):
        got = [row["prompt"] for row in rename_columns(named(dataset, "x"), {"prompt": "q"})]
        assert got == ["42", [1]]
        assert type(got[0]) is str


@pytest.mark.parametrize("streaming", [False, True])
def test_it_holds_for_the_rows_to_evaluate_on_too(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.csv").write_text("question,best,worst\nq,b,w\n")
    folder, file = str(tmp_path / "data"), str(tmp_path / "data" / "test.csv")
    want = [{"prompt": "q", "chosen": "b", "rejected": "w"}]
    for options in ({}, {"eval_name_or_path": file}, {"test_split": "test"}):
        train, evaluation = load_dataset_splits(folder, columns=MAPPING, streaming=streaming, **options)
        assert (list(train), list(evaluation)) == (want, want)
    (tmp_path / "other.csv").write_text("prompt,chosen,rejected\nq,b,w\n")
    with pytest.raises(ValueError, match=r"--columns prompt=question: .*other\.csv has no column 'question'"):
        list(
            load_dataset_splits(
                folder, columns=MAPPING, eval_name_or_path=str(tmp_path / "other.csv"), streaming=streaming
            )[1]
        )


# --- columns that are left out ---


@pytest.mark.parametrize(
    "given", ["prompt=question,prompt_id=,worst=", '{"prompt": "question", "prompt_id": null, "worst": ""}']
)
def test_a_name_with_nothing_behind_it_leaves_a_column_out(given):
    assert parse_columns(given) == {"prompt": "question", "prompt_id": "", "worst": ""}
    assert parse_columns(parse_columns(given)) == parse_columns(given)


@pytest.mark.parametrize("form", ["table", "stream", "blind stream"])
def test_columns_that_are_left_out_are_gone(form):
    dataset = rows_of(form, [{**row, "system": "s", "note": "n"} for row in ROWS])
    got = list(rename_columns(dataset, parse_columns("system=,prompt=question,note=")))
    assert got == [{"prompt": row["question"], "best": row["best"], "worst": row["worst"]} for row in ROWS]


def test_one_that_is_not_there_cannot_be_left_out(dataset):
    with pytest.raises(ValueError, match=r"--columns wurst=: .* has no column 'wurst'\. Did you mean 'worst'\?"):
        list(rename_columns(dataset, {"wurst": ""}))


def test_a_file_without_one_of_its_columns(tmp_path):
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected,weight\na,b,c,3\n")
    train, _ = load_dataset_splits(str(tmp_path / "pairs.csv"), columns="weight=")
    assert train[:] == {"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]}
