"""Every form in which rows come, and every way in which a file or a split can be wrong. Offline."""

from __future__ import annotations

import builtins
import gzip
import json
import os
from functools import partial
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from dpo_trainer.data.files.datasets import load_dataset_splits

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


@pytest.mark.parametrize("size", [0, -1, 10, 11, 1.5, 0.99])
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


EMPTY = {
    "pairs.jsonl": "there are no rows",
    "pairs.csv": "has no names of columns",
    "pairs.parquet": "cannot be read as parquet",
}


@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_file(tmp_path, name, streaming):
    """Also of a stream at once, and not at its first step."""
    (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=rf"{name}:? {EMPTY[name]}"):
        load_dataset_splits(str(tmp_path / name), streaming=streaming)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pairs.jsonl", "line 1: a null byte"),
        ("pairs.csv", "line 1: a null byte"),
        ("pairs.jsonl.gz", "damaged, or no gzip"),
        ("pairs.parquet", "cannot be read as parquet"),
    ],
)
def test_a_file_that_is_not_what_its_name_says(tmp_path, name, message, streaming):
    (tmp_path / name).write_bytes(bytes(range(127)))
    with pytest.raises(ValueError, match=rf"{name}[,:]? {message}"):
        load_dataset_splits(str(tmp_path / name), streaming=streaming)


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
    with pytest.raises(ValueError, match=r"header\.csv: there are no rows"):
        load_dataset_splits(str(tmp_path / "header.csv"))


def test_a_name_of_nothing_and_the_name_of_a_reader(tmp_path, monkeypatch):
    """`load_dataset("json")` would read whatever lies in the current folder."""
    write(tmp_path / "private.json", "lines")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="The name of the dataset is empty"):
        load_dataset_splits(" ")
    with pytest.raises(ValueError, match="no file or folder 'json', and on the hub no dataset can have that name"):
        load_dataset_splits("json")
    with pytest.raises(ValueError, match=r"'~nobody_has_this_name/x\.jsonl' cannot be read: .*Check the path"):
        load_dataset_splits("~nobody_has_this_name/x.jsonl")


def test_links_pipes_and_folders_named_like_files(tmp_path, streaming):
    (tmp_path / "circle.jsonl").symlink_to(tmp_path / "circle.jsonl")
    (tmp_path / "nowhere.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for name in ("circle", "nowhere"):
        with pytest.raises(ValueError, match=rf"{name}\.jsonl' is a symbolic link that leads nowhere, or in a circle"):
            load_dataset_splits(str(tmp_path / f"{name}.jsonl"), streaming=streaming)
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe\.jsonl' is neither a file nor a folder"):
        load_dataset_splits(str(tmp_path / "pipe.jsonl"), streaming=streaming)
    write(tmp_path / "folder.jsonl" / "a.jsonl", "lines")
    (tmp_path / "folder.jsonl" / "self").symlink_to(tmp_path / "folder.jsonl")
    assert list(load_dataset_splits(str(tmp_path / "folder.jsonl"), streaming=streaming)[0]) == ROWS


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, streaming):
    """Root may read everything, so the refusal is staged where the file is opened."""
    file = write(tmp_path / "pairs.jsonl", "lines")
    really_open = builtins.open

    def refuse(path, *args, **kwargs):
        if str(path) == file:
            raise PermissionError(13, "Permission denied")
        return really_open(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(
        ValueError, match=r"pairs\.jsonl cannot be read \(Permission denied\)\. Check .* you may read it"
    ):
        load_dataset_splits(file, streaming=streaming)


def test_a_folder_of_other_things_or_of_several(tmp_path, caplog, streaming):
    write(tmp_path / "photos" / "cat.png", "lines")
    with pytest.raises(ValueError, match=r"holds no rows \(it holds cat\.png\)\. They must be in files that end in"):
        load_dataset_splits(str(tmp_path / "photos"), streaming=streaming)
    write(tmp_path / "packed" / "train.jsonl.zst", "lines")
    with pytest.raises(ValueError, match=r"train\.jsonl\.zst is not a plain json file"):
        load_dataset_splits(str(tmp_path / "packed"), streaming=streaming)

    write(tmp_path / "two" / "train.jsonl", "lines")
    write(tmp_path / "two" / "more.csv", "table")
    write(tmp_path / "two" / "config.json", "lines")  # by that name it is no data
    assert list(load_dataset_splits(str(tmp_path / "two"), streaming=streaming)[0]) == ROWS
    assert "two: more.csv. A folder is one dataset" in caplog.text


def test_configurations_of_a_folder_from_the_hub(tmp_path, streaming):
    write(tmp_path / "data" / "a.jsonl", "lines")
    (tmp_path / "data" / "b.jsonl").write_text(JSONL.splitlines()[4])
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    folder = str(tmp_path / "data")
    train, _ = load_dataset_splits(folder, config="b", streaming=streaming)
    assert list(train) == [ROWS[4]]
    assert train.info.dataset_name == f"{folder}, b"
    for config in (None, "c"):
        with pytest.raises(ValueError, match=r"cannot be read as a dataset: .*\['a', 'b'\].* --dataset_config"):
            load_dataset_splits(folder, config=config, streaming=streaming)


def test_what_the_hub_serves_is_untrusted_too(monkeypatch):
    def broken(*args, **kwargs):
        raise datasets.exceptions.DatasetGenerationError("generating") from TypeError("Couldn't cast array")

    monkeypatch.setattr("dpo_trainer.data.files.locate.load_dataset", broken)
    with pytest.raises(
        ValueError, match=r"'some/pairs' of the hub cannot be read: Couldn't cast array.*download its files"
    ):
        load_dataset_splits("some/pairs")


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(ValueError, match=r"The dataset cache .*cannot be written \(.*HF_DATASETS_CACHE"):
        load_dataset_splits(write(tmp_path / "pairs.jsonl", "lines"))


def cut_at_a_batch(table):
    with pa.memory_map(str(table)) as source:
        stream = pa.ipc.open_stream(source)
        stream.read_next_batch()
        end = source.tell()
    os.truncate(table, end)


@pytest.mark.parametrize(
    "spoil",
    [
        cut_at_a_batch,
        lambda table: os.truncate(table, 0),
        lambda table: os.truncate(table, table.stat().st_size - 1),
        lambda table: table.write_bytes(bytes(table.stat().st_size)),
        lambda table: table.write_bytes(table.read_bytes().replace(b"good 7", b"goof 7", 1)),
        lambda table: table.with_name("rows.arrow.json").write_text("{}"),
    ],
    ids=["cut at a batch", "empty", "last byte gone", "zeros", "one byte changed", "no checksum"],
)
def test_a_damaged_table_in_the_cache_is_made_anew(tmp_path, caplog, spoil):
    rows = [{"prompt": "q", "chosen": f"good {number}", "rejected": "bad"} for number in range(600)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, _ = load_dataset_splits(str(tmp_path / "pairs.jsonl"))
    (table,) = (tmp_path / "cache").rglob("rows.arrow")
    whole = table.read_bytes()
    assert json.loads(table.with_name("rows.arrow.json").read_text())["rows"] == 600
    spoil(table)
    again, _ = load_dataset_splits(str(tmp_path / "pairs.jsonl"))
    assert again.to_list() == rows
    assert again._fingerprint == first._fingerprint  # what was computed from it stays valid
    assert table.read_bytes() == whole
    assert [message for message in caplog.messages if "is damaged" in message and "built again" in message] != []
    assert sorted(path.name for path in table.parent.iterdir()) == ["rows.arrow", "rows.arrow.json"]
    caplog.clear()
    load_dataset_splits(str(tmp_path / "pairs.jsonl"))
    assert caplog.messages == []


def test_a_table_of_an_earlier_release_is_made_anew_in_silence(tmp_path, caplog):
    file = write(tmp_path / "pairs.jsonl", "lines")
    load_dataset_splits(file)
    (seal,) = (tmp_path / "cache").rglob("rows.arrow.json")
    seal.unlink()
    assert load_dataset_splits(file)[0].to_list() == ROWS
    assert seal.is_file()
    assert caplog.messages == []


# --- names and fingerprints ---


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.csv", "pairs.parquet", "folder", "saved"])
def test_every_dataset_knows_the_name_that_the_user_gave(tmp_path, monkeypatch, name, streaming):
    monkeypatch.chdir(tmp_path)
    if name == "saved":
        DatasetDict({split: Dataset.from_list(ROWS) for split in ("train", "test")}).save_to_disk(name)
    elif name == "folder":
        for split in ("train", "test"):
            write(tmp_path / name / f"{split}.jsonl", "lines")
    else:
        write(tmp_path / name, FILES[name])
    train, test = load_dataset_splits(name, streaming=streaming, columns="prompt=chosen,chosen=prompt")
    parts = load_dataset_splits(name, streaming=streaming, test_split_size=3)
    assert [rows and rows.info.dataset_name for rows in (train, test)] == [name, name if test else None]
    # Rows of a stream are counted from where it starts; a table remembers their numbers (`_indices`).
    assert [rows.info.dataset_name for rows in parts] == [f"{name} after 3 rows" if streaming else name, name]
    assert train.info is not (test or parts[0]).info


def test_rows_next_to_each_other_are_named_by_where_they_start(tmp_path):
    """`select` forgets the numbers of neighbouring rows: one row held out of ten is always such a case."""
    file = write(tmp_path / "pairs.jsonl", "lines")
    _, test = load_dataset_splits(file, test_split_size=1)
    number = ROWS.index(test[0])
    assert number > 0, "another seed: row 0 needs no name"
    assert test.info.dataset_name == f"{file} after {number} rows"


@pytest.mark.parametrize("name", ["pairs.jsonl", "array.json", "pairs.csv", "pairs.parquet"])
def test_fingerprints_are_the_same_in_every_run(tmp_path, name):
    """They are the key of all that is computed from the rows, such as token ids."""
    file = write(tmp_path / name, FILES[name])
    load = partial(load_dataset_splits, file, test_split_size=3, columns={"prompt": "prompt"})
    first, second = load(), load()
    assert [rows._fingerprint for rows in first] == [rows._fingerprint for rows in second]
    assert first[0]._fingerprint != first[1]._fingerprint
    assert load(seed=1)[0]._fingerprint != first[0]._fingerprint


def test_fingerprints_follow_the_content_and_not_the_place(tmp_path):
    file = write(tmp_path / "pairs.jsonl", "lines")
    there = write(tmp_path / "elsewhere" / "other.jsonl", "lines")
    before, elsewhere = (load_dataset_splits(path)[0] for path in (file, there))
    assert before._fingerprint == elsewhere._fingerprint
    assert (before.info.dataset_name, elsewhere.info.dataset_name) == (file, there)
    stat = os.stat(file)
    (tmp_path / "pairs.jsonl").write_text(JSONL.replace("good", "fine"))  # as many bytes
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after, _ = load_dataset_splits(file)
    assert after._fingerprint != before._fingerprint
    assert after[0]["chosen"] == "fine 0"


def test_a_mapped_dataset_is_read_from_the_cache(tmp_path):
    file = write(tmp_path / "pairs.jsonl", "lines")
    for run in range(2):
        rows, _ = load_dataset_splits(file, test_split_size=2)
        mapped = rows.map(lambda row: {"n": len(row["chosen"])}, load_from_cache_file=True)
        written = sorted(path.stat().st_mtime_ns for path in Path(mapped.cache_files[0]["filename"]).parent.glob("*"))
        if run == 0:
            first = written
    assert written == first


def test_a_config_of_a_local_file(tmp_path):
    with pytest.raises(ValueError, match="--dataset_config 'en' is for datasets of the hub"):
        load_dataset_splits(write(tmp_path / "pairs.jsonl", "lines"), config="en")
