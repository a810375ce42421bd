"""Every form in which rows come, and every way in which a file or a split can be wrong. Offline."""

from __future__ import annotations

import gzip
import json

import datasets
import huggingface_hub
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from dpo_trainer.loading import load_dataset_splits

ROWS = [{"prompt": f"p{i}?", "chosen": f"good {i}", "rejected": f"bad, {i}"} for i in range(10)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(params=[False, True], ids=["map", "stream"])
def streaming(request):
    return request.param


def write(path, form: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "array":
        path.write_text("\n " + json.dumps(ROWS, indent=2))
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(JSONL.encode()))
    elif form == "table":
        rows = Dataset.from_list(ROWS)
        rows.to_csv(path) if path.suffix == ".csv" else rows.to_parquet(path)
    else:
        path.write_text(JSONL)
    return str(path)


FILES = {
    "pairs.jsonl": "lines",
    "pairs.json": "lines",
    "array.json": "array",
    "pairs.jsonl.gz": "lines",
    "pairs.json.gz": "lines",
    "pairs.csv": "table",
    "pairs.parquet": "table",
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, streaming):
    train, evaluation = load_dataset_splits(write(tmp_path / name, FILES[name]), streaming=streaming)
    assert isinstance(train, IterableDataset if streaming else Dataset)
    assert list(train) == ROWS
    assert evaluation is None


def test_folder_of_files_has_the_splits_that_they_are_named_after(tmp_path, streaming):
    write(tmp_path / "csv" / "train.jsonl", "lines")  # "csv" is also the name of a reader inside `datasets`
    (tmp_path / "csv" / "test.jsonl").write_text(JSONL.splitlines()[3])
    train, evaluation = load_dataset_splits(str(tmp_path / "csv"), streaming=streaming)
    assert list(train) == ROWS
    assert list(evaluation) == [ROWS[3]]


def test_saved_dataset_and_saved_dict(tmp_path, streaming):
    rows, other = Dataset.from_list(ROWS), Dataset.from_list(ROWS[:2])
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train_prefs": rows, "test_prefs": other}).save_to_disk(tmp_path / "two")

    train, evaluation = load_dataset_splits(str(tmp_path / "one"), streaming=streaming)
    assert (list(train), evaluation) == (ROWS, None)
    splits = {"train_split": "train_prefs", "test_split": "test_prefs"}
    train, evaluation = load_dataset_splits(str(tmp_path / "two"), streaming=streaming, **splits)
    assert isinstance(train, IterableDataset if streaming else Dataset)
    assert (list(train), list(evaluation)) == (ROWS, ROWS[:2])


# --- evaluation rows ---


@pytest.mark.parametrize(("size", "n_eval"), [(0.2, 2), (3, 3), (1, 1)])
def test_rows_split_off_are_disjoint_in_order_and_chosen_by_the_seed(tmp_path, size, n_eval):
    file = write(tmp_path / "pairs.jsonl", "lines")
    train, evaluation = load_dataset_splits(file, test_split_size=size, seed=1)
    train_ids, eval_ids = ([ROWS.index(row) for row in rows] for rows in (train, evaluation))
    assert len(eval_ids) == n_eval
    assert sorted(train_ids + eval_ids) == list(range(10))
    assert train_ids == sorted(train_ids)

    again = load_dataset_splits(file, test_split_size=size, seed=1)[1]
    assert list(again) == list(evaluation)
    others = [list(load_dataset_splits(file, test_split_size=size, seed=seed)[1]) for seed in range(2, 6)]
    assert any(other != list(evaluation) for other in others), "the seed has no effect"


def test_a_stream_holds_out_its_first_rows(tmp_path):
    file = write(tmp_path / "pairs.jsonl.gz", "lines")
    train, evaluation = load_dataset_splits(file, test_split_size=3, streaming=True)
    assert (list(evaluation), list(train)) == (ROWS[:3], ROWS[3:])
    with pytest.raises(ValueError, match=r"--test_split_size 0\.3: a stream has no known length"):
        load_dataset_splits(file, test_split_size=0.3, streaming=True)


def test_a_second_dataset_to_evaluate_on(tmp_path, streaming):
    train_file = write(tmp_path / "pairs.jsonl", "lines")
    (tmp_path / "eval.jsonl").write_text(JSONL.splitlines()[7])
    train, evaluation = load_dataset_splits(
        train_file, eval_name_or_path=str(tmp_path / "eval.jsonl"), streaming=streaming
    )
    assert (list(train), list(evaluation)) == (ROWS, [ROWS[7]])


def test_no_split_to_evaluate_on_is_said(tmp_path, caplog):
    file = write(tmp_path / "pairs.jsonl", "lines")
    with caplog.at_level("INFO", logger="dpo_trainer"):
        assert load_dataset_splits(file)[1] is None
    assert "has no split 'test' (it has: train): nothing is held out" in caplog.text


@pytest.mark.parametrize("size", [0, -1, 10, 11, 1.5, 0.01, 0.99])
def test_sizes_that_leave_a_side_empty_or_make_no_sense(tmp_path, size):
    with pytest.raises(ValueError, match=r"--test_split_size .* leave rows on both sides of a split of 10"):
        load_dataset_splits(write(tmp_path / "pairs.jsonl", "lines"), test_split_size=size)


def test_two_sources_of_evaluation_rows(tmp_path):
    file = write(tmp_path / "pairs.jsonl", "lines")
    with pytest.raises(ValueError, match=r"--dataset_test_split test and --test_split_size 0\.1 both say"):
        load_dataset_splits(file, test_split="test", test_split_size=0.1)
    with pytest.raises(ValueError, match=r"--eval_dataset x\.jsonl and --test_split_size 2 both say"):
        load_dataset_splits(file, eval_name_or_path="x.jsonl", test_split_size=2)


# --- what can be wrong ---


def test_missing_splits_are_refused_with_those_there_are(tmp_path, streaming):
    file = write(tmp_path / "pairs.jsonl", "lines")
    with pytest.raises(ValueError, match=r"--dataset_train_split 'trian': .*It has: train\. Did you mean 'train'\?"):
        load_dataset_splits(file, train_split="trian", streaming=streaming)
    with pytest.raises(ValueError, match=r"--dataset_test_split 'test': .*It has: train\."):
        load_dataset_splits(file, test_split="test", streaming=streaming)


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "x", ', r"line 4: not valid JSON \(Expecting property name .* at column"),
        ('["x"]', r"line 4: a row must be a JSON object with named columns, got list"),
    ],
    ids=["cut", "list"],
)
def test_a_broken_line_is_named_by_file_and_number(tmp_path, line, message, compressed, streaming):
    lines = JSONL.splitlines()
    text = "\n".join([*lines[:2], "", line, *lines[2:]])  # an empty line counts, and is no row
    file = tmp_path / ("pairs.jsonl.gz" if compressed else "pairs.jsonl")
    file.write_bytes(gzip.compress(text.encode()) if compressed else text.encode())
    with pytest.raises(ValueError, match=rf"{file.name}, {message}"):
        list(load_dataset_splits(str(file), streaming=streaming)[0])


def test_a_broken_array_is_named_by_line(tmp_path, streaming):
    (tmp_path / "pairs.json").write_text('[\n{"prompt": "x"},\n{"prompt": y}\n]')
    with pytest.raises(ValueError, match=r"pairs\.json, line 3: not valid JSON .* one array"):
        list(load_dataset_splits(str(tmp_path / "pairs.json"), streaming=streaming)[0])


def test_a_damaged_gz(tmp_path, streaming):
    (tmp_path / "pairs.jsonl.gz").write_bytes(gzip.compress(JSONL.encode())[:-20])
    with pytest.raises(ValueError, match=r"pairs\.jsonl\.gz: damaged"):
        list(load_dataset_splits(str(tmp_path / "pairs.jsonl.gz"), streaming=streaming)[0])


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.parquet"])
def test_an_empty_file(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"{name} cannot be read as"):
        load_dataset_splits(str(tmp_path / name))


@pytest.mark.parametrize("name", ["pairs.csv", "pairs.parquet"])
def test_a_file_that_is_not_what_its_name_says(tmp_path, name):
    (tmp_path / name).write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match=rf"{name} cannot be read as"):
        load_dataset_splits(str(tmp_path / name))


def test_names_that_lead_nowhere(tmp_path):
    file = write(tmp_path / "pairs.jsonl", "lines")
    with pytest.raises(ValueError, match=r"no dataset file or folder .*Did you mean 'pairs\.jsonl'\?"):
        load_dataset_splits(file.replace("pairs", "pars"))
    with pytest.raises(ValueError, match=r"no dataset file or folder 'pairs\.parquet'"):
        load_dataset_splits("pairs.parquet")
    with pytest.raises(
        ValueError, match=r"no file or folder 'some/pairs', and .* on the hub cannot be had: .*local file"
    ):
        load_dataset_splits("some/pairs")


def test_files_and_folders_that_hold_no_data(tmp_path):
    (tmp_path / "pairs.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"ends in none of \.json, \.jsonl, \.csv, \.parquet"):
        load_dataset_splits(str(tmp_path / "pairs.xlsx"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no dataset in it"):
        load_dataset_splits(str(tmp_path / "empty"))
    Dataset.from_list(ROWS).select([]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="saved' is empty or damaged"):
        load_dataset_splits(str(tmp_path / "saved"))
    (tmp_path / "header.csv").write_text("prompt,chosen,rejected\n")
    with pytest.raises(ValueError, match=r"header\.csv cannot be read as csv: .*at least one row"):
        load_dataset_splits(str(tmp_path / "header.csv"))


def test_config_of_a_local_file(tmp_path):
    with pytest.raises(ValueError, match="--dataset_config 'en' is for datasets of the hub"):
        load_dataset_splits(write(tmp_path / "pairs.jsonl", "lines"), config="en")
