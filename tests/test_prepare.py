"""Whole datasets: columns, ids, counts, the cache, processes, streams, mixtures."""

from __future__ import annotations

import dataclasses
import json
import logging
import os

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, load_dataset, load_from_disk
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHAT, byte_bpe

from dpo_trainer.data import (
    FEATURES,
    DataOptions,
    Needs,
    prepare_dataset,
    prepare_mixture,
    report_table,
    write_reports,
)
from dpo_trainer.data.content import content_id
from dpo_trainer.data.mapping import PairMapper
from dpo_trainer.data.report import DROPPED, KEPT, DataReport
from dpo_trainer.data.stream import PATIENCE
from dpo_trainer.types import PairIds, Preferred

TOKENIZER = byte_bpe(chat_template=CHAT)
COLUMNS = list(FEATURES)
ONE = {"more_ids": [], "pairs": [[0, 1]], "margin": [], "unscored": [], "weight": 1.0}
"""What a prepared row has besides its ids where there is nothing to say."""


def prepare(dataset, tokenizer=TOKENIZER, **changed):
    how = {name: changed.pop(name) for name in ("name", "needs", "first_id") if name in changed}
    return prepare_dataset(dataset, tokenizer, DataOptions(disable_tqdm=True, **changed), **how)


ROWS = [
    {"prompt": "one:", "chosen": "hey", "rejected": "you"},
    {"prompt": "same", "chosen": "hey", "rejected": "hey"},  # identical
    {"prompt": "so long a prompt that no token is left", "chosen": "hey", "rejected": "you"},  # no room in 20
    {"prompt": "blank", "chosen": "hey", "rejected": " "},  # empty completion
    {"prompt": "cut", "chosen": "hey hey hey hey hey hey", "rejected": "you"},  # 3 + 24 tokens and EOS
    {"prompt": "xab", "chosen": "cd", "rejected": "you"},  # "abc" is one token
    {"prompt": "", "chosen": "hey", "rejected": "you"},  # BOS stands in
]
FOUND = {
    "identical": [1],
    "no_room": [2],
    "empty_completion": [3],
    "truncated_chosen": [4],
    "merged_boundary": [5],
    "empty_prompts": [6],
}
"""What happens to which row within 20 tokens."""
WANT = {
    "name": "train",
    "source": "",
    "streaming": False,
    "rows": 7,
    "kept": 4,
    "dropped": 3,
    "pairs": 4,
    "pairs_left_out": 0,
    "counts": {kind: len(FOUND.get(kind, [])) for kind in [*DROPPED, *KEPT]},
    "first_rows": {kind: FOUND.get(kind, []) for kind in [*DROPPED, *KEPT]},
    # rows 0, 4, 5, 6: `one:`, `cut`, `x`, BOS | hey EOS, 17 of the cut one, `abc d EOS`, hey EOS |
    # you EOS three times, and `ab y o u EOS`
    "prompt_tokens": 4 + 3 + 1 + 1,
    "completion_tokens": (4 + 17 + 3 + 4) + (4 + 4 + 5 + 4),
}
TABLE = """
 data                                                                 train
 ──────────────────────────────────────────────────────────────────────────
 rows                                                                     7
 dropped: empty completion                                        1 (row 3)
 dropped: no room for a completion after the prompt               1 (row 2)
 dropped: chosen equals rejected                                  1 (row 1)
 kept                                                                     4
 chosen completions truncated at their end                        1 (25.0%)
 prompts that end inside a token, which goes to the completions   1 (25.0%)
 prompts of no token but BOS                                      1 (25.0%)
 tokens of prompts                                                        9
 tokens of completions                                                   45
 tokens per row                                                          14
"""


# --- tables ---


def test_columns_types_and_ids():
    prepared, report = prepare(Dataset.from_list(ROWS), max_length=20)
    assert prepared.column_names == COLUMNS
    assert report.to_dict() == WANT
    assert prepared["example_id"][:] == [0, 4, 5, 6]
    assert prepared["weight"][:] == [1.0] * 4
    assert prepared["length"][:] == [4 + 4 + 4, 3 + 17 + 4, 1 + 3 + 5, 1 + 4 + 4]
    assert all(isinstance(token, int) for token in prepared[0]["prompt_ids"])
    assert prepared.features == FEATURES
    assert all(prepared[column][:] == [value] * 4 for column, value in ONE.items())


def test_the_report_reads_as_text():
    """What did not happen is left out: no prompt was truncated, no row is ranked. 54 tokens in 4 rows are 14 (13.5) each."""
    assert prepare(Dataset.from_list(ROWS), max_length=20)[1].table() == TABLE.strip("\n")


def test_reports_stand_side_by_side_and_are_kept(tmp_path):
    train, held_out = (
        prepare(Dataset.from_list(rows), max_length=20, name=name)[1]
        for rows, name in ((ROWS, "train"), (ROWS[4:], "eval"))
    )
    table = report_table([train, held_out])
    assert [line.split() for line in table.splitlines()[:1]] == [["data", "train", "eval"]]
    (identical,) = [line for line in table.splitlines() if "chosen equals rejected" in line]
    assert identical.split("rejected")[1].split() == ["1", "(row", "1)", "0"]
    write_reports({"train": train, "eval": held_out}, tmp_path / "new folder")
    assert json.loads((tmp_path / "new folder" / "data_report.json").read_text())["train"] == WANT


def test_names_of_datasets_are_text_in_a_table():
    """Not markup of the library that draws it."""
    assert "[bold]x[/bold] (so far)" in DataReport(name="[bold]x[/bold]", streaming=True).table()


def test_weights_and_foreign_columns():
    rows = [
        ROWS[0] | {"weight": 0.25, "length": 99, "flags": "mine"},
        ROWS[4] | {"weight": None, "length": 1, "flags": ""},
    ]
    prepared, _ = prepare(Dataset.from_list(rows))
    assert prepared.column_names == COLUMNS
    assert prepared["weight"][:] == [0.25, 1.0]
    assert prepared["length"][0] == 12


def test_the_format_of_the_given_dataset_does_not_matter():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]}]
    dataset = Dataset.from_list(rows).with_format("torch")
    assert isinstance(dataset[0]["prompt_ids"], torch.Tensor)
    prepared, _ = prepare(dataset, tokenizer=None)
    assert prepared[0] == rows[0] | ONE | {"example_id": 0, "length": 5}


@pytest.mark.parametrize("max_length", [None, 20])
def test_preparing_again_changes_nothing(max_length):
    once, _ = prepare(Dataset.from_list(ROWS), max_length=max_length)
    twice, report = prepare(once, tokenizer=None, max_length=max_length)
    assert twice.to_list() == once.to_list()
    assert twice.features == once.features
    assert (report.kept, report.dropped) == (len(once), 0)
    shuffled, _ = prepare(once.select([2, 0]), tokenizer=None, max_length=max_length)
    assert shuffled["example_id"][:] == [once[2]["example_id"], once[0]["example_id"]]


def test_tokenized_rows_are_cut_and_dropped_too():
    rows = [
        {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [2, 4]},
        {"prompt_ids": [1], "chosen_ids": [5, 3], "rejected_ids": [6, 4]},
        {"prompt_ids": [1, 2], "chosen_ids": [5, 3], "rejected_ids": [6, 4]},
    ]
    prepared, report = prepare(Dataset.from_list(rows), tokenizer=None, max_length=2)
    assert prepared["chosen_ids"][:] == [[5]]
    assert [report.counts[kind] for kind in ("identical", "no_room", "truncated_chosen")] == [1, 1, 1]


def test_two_processes_give_what_one_gives():
    dataset = Dataset.from_list(ROWS * 3)
    one, report = prepare(dataset, max_length=20)
    two, report_of_two = prepare(dataset, max_length=20, dataset_num_proc=2)
    assert two.to_list() == one.to_list()
    assert report_of_two == report
    assert report.first_rows["identical"] == [1, 8, 15]
    assert (report.counts["identical"], report.line("identical")) == (3, "3 (rows 1, 8, 15)")
    _, many = prepare(Dataset.from_list(ROWS * 6), max_length=20)
    assert many.line("identical") == "6 (rows 1, 8, 15, 22, 29, ...)"


def cut_at_a_batch(file):
    with pa.memory_map(str(file)) as source:
        stream = pa.ipc.open_stream(source)
        stream.read_next_batch()
        end = source.tell()
    assert end < file.stat().st_size - 8
    os.truncate(file, end)


def emptied(file):
    os.truncate(file, 0)


def zeroed(file):
    file.write_bytes(bytes(file.stat().st_size))


def one_byte_changed(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


SPOILT = [cut_at_a_batch, emptied, zeroed, one_byte_changed]


def test_a_second_run_reads_the_cache(tmp_path, monkeypatch):
    Dataset.from_list(ROWS).save_to_disk(tmp_path)
    first, report = prepare(load_from_disk(tmp_path), max_length=20)
    used = byte_bpe(chat_template=CHAT)
    used(["a", "bc"], padding=True, truncation=True, max_length=1)  # leaves padding and truncation on inside

    def tokenized_again(*_):
        raise RuntimeError("tokenized again")

    monkeypatch.setattr(PairMapper, "__call__", tokenized_again)
    second, cached_report = prepare(load_from_disk(tmp_path), tokenizer=used, max_length=20)
    assert second.to_list() == first.to_list()
    assert cached_report == report
    for same in (
        {"name": "other"},
        {"useless_pairs": "drop", "deduplicate": True},
        {"needs": Needs(vocabulary_size=1000), "tokenizer": used, "dataset_num_proc": 2},
    ):
        again, _ = prepare(load_from_disk(tmp_path), **({"max_length": 20} | same))
        assert again.to_list() == first.to_list()
    for changed in (
        {"max_length": 19},
        {"max_prompt_length": 3},
        {"max_completion_length": 3},
        {"truncation_mode": "keep_end"},
        {"too_long": "drop"},
        {"max_pairs_per_prompt": 1},
        {"allow_special_tokens_in_text": True},
        {"first_id": 7},
        {"tokenizer": byte_bpe(adds="<bos> $A", chat_template=CHAT)},
        {"tokenizer": byte_bpe(chat_template=CHAT + " ")},
    ):
        with pytest.raises(RuntimeError, match="tokenized again"):
            prepare(load_from_disk(tmp_path), **({"max_length": 20} | changed))


@pytest.mark.parametrize("num_proc", [None, 2])
@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_damaged_rows_in_the_cache_are_computed_anew(tmp_path, caplog, spoil, num_proc):
    """Cut off between two record batches, `datasets` would read fewer rows without a word."""
    Dataset.from_list(ROWS * 200).save_to_disk(tmp_path)
    options = {"max_length": 20, "dataset_num_proc": num_proc}
    first, report = prepare(load_from_disk(tmp_path), **options)
    rows = first.to_list()  # now: the file is mapped into memory
    caches = sorted(tmp_path.glob("cache-*.arrow"))
    assert len(caches) == (num_proc or 1)
    whole = caches[0].read_bytes()
    spoil(caches[0])
    caplog.clear()
    again, report_again = prepare(load_from_disk(tmp_path), **options)
    assert again.to_list() == rows
    assert report_again == report
    assert caches[0].read_bytes() == whole
    assert [record.message for record in caplog.records if "are damaged" in record.message] != []
    caplog.clear()
    prepare(load_from_disk(tmp_path), **options)
    assert "are damaged" not in caplog.text


def test_cached_rows_of_an_earlier_release_have_no_checksum(tmp_path, caplog, monkeypatch):
    Dataset.from_list(ROWS * 200).save_to_disk(tmp_path)
    first = prepare(load_from_disk(tmp_path), max_length=20)[0].to_list()
    (cache,) = tmp_path.glob("cache-*.arrow")
    cache.with_name(f"{cache.name}.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(PairMapper, "__call__", None)
        assert prepare(load_from_disk(tmp_path), max_length=20)[0].to_list() == first
    cache.with_name(f"{cache.name}.json").unlink()
    cut_at_a_batch(cache)
    assert prepare(load_from_disk(tmp_path), max_length=20)[0].to_list() == first
    assert "it has no end): they are computed again" in caplog.text


def test_other_rows_are_tokenized_anew(tmp_path):
    """The key is what the rows say, not where they stand."""
    (first,), _ = prepare(_from_file(tmp_path, ROWS[:1]), max_length=20)
    (other,), _ = prepare(_from_file(tmp_path, [ROWS[0] | {"chosen": "hi"}]), max_length=20)
    assert first["rejected_ids"] == other["rejected_ids"]
    assert TOKENIZER.decode(other["chosen_ids"]) == "hi<eos>"


def _from_file(folder, rows):
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_dataset("json", data_files=str(path), split="train", cache_dir=str(folder / "cache"))


# Data frames of any rows: few examples, for each writes a table (about 10 ms).
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(*[st.text("ab c", max_size=6)] * 3), min_size=1, max_size=8),
    st.none() | st.integers(2, 8),
    st.sampled_from(["keep_start", "keep_end"]),
)
def test_counts_add_up(rows, max_length, mode):
    rows = [
        *({"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows),
        {"prompt": "a", "chosen": "x", "rejected": "y"},
    ]
    prepared, report = prepare(Dataset.from_list(rows), max_length=max_length, truncation_mode=mode)
    assert report.rows == len(rows) == report.kept + report.dropped
    assert report.kept == len(prepared)
    assert report.dropped == sum(report.counts[kind] for kind in DROPPED)
    assert sum(prepared["length"]) == report.prompt_tokens + report.completion_tokens
    assert sum(map(len, prepared["prompt_ids"])) == report.prompt_tokens
    assert max_length is None or all(len(row["prompt_ids"] + row["chosen_ids"]) <= max_length for row in prepared)
    assert all(
        row["chosen_ids"] and row["rejected_ids"] and row["chosen_ids"] != row["rejected_ids"] for row in prepared
    )
    missing = sorted(set(range(len(rows))) - set(prepared["example_id"]))
    assert missing[:1] == sorted(row for kind in DROPPED for row in report.first_rows[kind])[:1]


# --- what is refused ---


def test_useless_pairs_are_counted_or_refused(caplog):
    with caplog.at_level(logging.WARNING):
        prepare(Dataset.from_list(ROWS), max_length=20)
    assert not caplog.records  # the report says it, and the trainer shows the report
    with pytest.raises(
        ValueError,
        match=r"teach nothing: empty completion: 1 \(row 3\); no room for.*: 1 \(row 2\); chosen equals rejected: 1 \(row 1\)"
        r"\. Remove these rows.*--max_length.*--useless_pairs drop",
    ):
        prepare(Dataset.from_list(ROWS), max_length=20, useless_pairs="error")
    prepare(Dataset.from_list(ROWS[:1]), useless_pairs="error")


def test_no_pair_left_is_an_error():
    with pytest.raises(ValueError, match=r"No pair of eval is left: chosen equals.*: 2 \(rows 0, 1\).*--max_length"):
        prepare(Dataset.from_list([ROWS[1]] * 2), name="eval")
    with pytest.raises(ValueError, match=r"train has no rows"):
        prepare(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}))


def test_rows_that_are_too_long_are_cut_dropped_or_refused():
    """Within 20 tokens, rows 2 and 4 would be cut; rows that are useless for another reason keep that one."""
    rows = Dataset.from_list(ROWS)
    prepared, report = prepare(rows, max_length=20, too_long="drop")
    assert prepared["example_id"][:] == [0, 5, 6]
    assert {kind: first for kind, first in report.first_rows.items() if first and kind in DROPPED} == {
        "identical": [1],
        "too_long": [2, 4],
        "empty_completion": [3],
    }
    said = r"would cut: 2 \(rows 2, 4\)\. Raise the limit, or choose --too_long truncate or drop"
    with pytest.raises(ValueError, match=said):
        prepare(rows, max_length=20, too_long="error")
    with pytest.raises(ValueError, match=said):
        list(prepare(rows.to_iterable_dataset(), max_length=20, too_long="error")[0])
    assert prepare(rows, max_length=100, too_long="error")[1].kept == 5
    with pytest.raises(ValueError, match=r"teach nothing: empty completion"):  # rows too long were asked to be dropped
        prepare(rows, max_length=20, too_long="drop", useless_pairs="error")
    without = rows.select([0, 2, 4, 5, 6])
    assert prepare(without, max_length=20, too_long="drop", useless_pairs="error")[1].dropped == 2


def test_rows_that_say_the_same_are_used_once():
    rows = [ROWS[0], ROWS[5], ROWS[0] | {"note": "again", "weight": 0.5}, ROWS[1], ROWS[1], ROWS[5]]
    rows = [{"note": "", "weight": 1.0} | row for row in rows]
    prepared, report = prepare(Dataset.from_list(rows), deduplicate=True)
    assert prepared["example_id"][:] == [0, 1]
    assert {kind: first for kind, first in report.first_rows.items() if first and kind in DROPPED} == {
        "duplicate": [2, 5],
        "identical": [3, 4],  # useless for what they are, however often
    }
    assert prepare(Dataset.from_list(rows))[1].kept == 4
    other_way = [ROWS[0], ROWS[0] | {"chosen": "you", "rejected": "hey"}, ROWS[0] | {"prompt": "two:"}]
    assert prepare(Dataset.from_list(other_way), deduplicate=True)[1].kept == 3
    prepare(Dataset.from_list([ROWS[0]] * 2), deduplicate=True, useless_pairs="error")  # it was asked for
    with pytest.raises(ValueError, match=r"--deduplicate would have to remember all of train, a stream.*--streaming"):
        prepare(Dataset.from_list(rows).to_iterable_dataset(), deduplicate=True)


def test_a_row_is_no_duplicate_of_one_that_is_not_used():
    tied = {"prompt": "q:", "completions": ["x", "y"], "scores": [1.0, 1.0]}
    prepared, report = prepare(Dataset.from_list([tied, tied | {"scores": [2.0, 1.0]}]), deduplicate=True)
    assert prepared["example_id"][:] == [1]
    assert report.first_rows["tied"] == [0]


def _positive(margin):
    return None if margin is not None and margin > 0 else f"its margin is {margin}. Give one above 0."


MARGIN_READ = Needs(unusable_margin=_positive)
MARGINS = [ROWS[0] | {"margin": 1.5}, ROWS[1] | {"margin": None}, ROWS[5] | {"margin": 2.0}]


@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
def test_margins_may_be_needed(stream):
    """Of rows that are used: the identical one has none, and needs none. Each pair of a row is asked."""

    def rows_of(*rows):
        dataset = Dataset.from_list(list(rows))
        return dataset.to_iterable_dataset() if stream else dataset

    prepared, _ = prepare(rows_of(*MARGINS), needs=MARGIN_READ)
    assert [row["margin"] for row in prepared] == [[1.5], [2.0]]
    ranked = {"prompt": "q:", "completions": ["a", "b"], "scores": [1.0, 4.0]}
    assert [row["margin"] for row in prepare(rows_of(ranked), needs=MARGIN_READ)[0]] == [[3.0]]
    for bad, margin in ((None, None), (0.0, 0.0), (-1, -1.0)):
        with pytest.raises(ValueError, match=rf"Row 3 of train: its margin is {margin}\. Give one above 0\."):
            list(prepare(rows_of(*MARGINS, *[MARGINS[2] | {"margin": bad}] * 2), needs=MARGIN_READ)[0])
    several = ROWS[0] | {"rejected": ["a", "b"], "margin": [1.0, -2.0]}
    with pytest.raises(ValueError, match=r"Row 0 of train: its margin is -2\.0"):
        list(prepare(rows_of(several), needs=MARGIN_READ)[0])
    assert len(list(prepare(rows_of(several), needs=MARGIN_READ, max_pairs_per_prompt=1)[0])) == 1  # it is left out
    with pytest.raises(ValueError, match=r"Row 0 of train: its margin is None"):
        list(prepare(rows_of(*ROWS), max_length=20, needs=MARGIN_READ)[0])


def test_prepared_margins_are_enough():
    once, _ = prepare(Dataset.from_list(MARGINS), needs=MARGIN_READ)
    assert prepare(once, tokenizer=None, needs=MARGIN_READ)[0].to_list() == once.to_list()
    with pytest.raises(ValueError, match="Row 1 of train: its margin is None"):
        ids = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}
        prepare(Dataset.from_list([ids | {"margin": 1.0}, ids | {"margin": None}]), tokenizer=None, needs=MARGIN_READ)


@pytest.mark.parametrize("stream", [False, True], ids=["table", "stream"])
@pytest.mark.parametrize("column", ["prompt_ids", "chosen_ids", "rejected_ids", "more_ids"])
def test_the_model_must_know_every_token(column, stream):
    """9 is the last of ten. Only rows that are used are asked, and cut tokens do not count."""
    ids = {"prompt_ids": [1, 9], "chosen_ids": [2], "rejected_ids": [3], "more_ids": [[4]], "pairs": [[0, 1], [0, 2]]}
    beyond = ids | {column: [[5, 10]] if column == "more_ids" else [5, 10]}
    useless = ids | {"prompt_ids": [99], "chosen_ids": [3], "more_ids": [[3]]}
    needs = Needs(vocabulary_size=10)

    def prepared(*rows, **how):
        dataset = Dataset.from_list(list(rows))
        return list(prepare(dataset.to_iterable_dataset() if stream else dataset, None, needs=needs, **how)[0])

    assert len(prepared(ids, useless)) == 1
    with pytest.raises(
        ValueError, match=r"Row 2 of train has the token id 10, and the model has 10 embeddings.*resize_token"
    ):
        prepared(ids, useless, beyond)
    if column != "prompt_ids":
        assert len(prepared(ids, beyond, max_completion_length=1)) == 2


# --- names and numbers in what is said ---


def test_a_dataset_that_knows_its_name_is_called_by_it():
    rows = Dataset.from_list([ROWS[0], ROWS[0] | {"chosen": None}])
    for source, called in (
        ("pairs.jsonl", "train (pairs.jsonl)"),
        ("json", "train"),
        ("generator", "train"),
        (None, "train"),
    ):
        stream = rows.to_iterable_dataset()
        rows.info.dataset_name = stream.info.dataset_name = source
        for dataset in (rows, stream):
            with pytest.raises(ValueError) as error:
                list(prepare(dataset)[0])
            assert str(error.value).startswith(f"Row 1 of {called}, column 'chosen'")
    rows.info.dataset_name = "org/pairs"
    _, report = prepare(rows.select([0]), name="eval")
    assert (report.name, report.source, report.label) == ("eval", "org/pairs", "eval (org/pairs)")
    assert report.table().splitlines()[-1].split() == ["eval:", "org/pairs"]


@pytest.mark.parametrize("num_proc", [None, 2])
def test_rows_of_a_selection_have_the_numbers_of_the_file(num_proc):
    """Those that a user can look up: after shuffling, and after a selection of a selection."""
    rows = numbered(40)
    bad = Dataset.from_list(
        [*rows.to_list()[:25], {"prompt": "q", "chosen": None, "rejected": "b"}, *rows.to_list()[26:]]
    )
    for dataset in (
        bad.select([4, 25, 7]),
        bad.shuffle(seed=3),
        bad.select([3, 30, 25, 1]).select([3, 2]),
        bad.select([25, 2, 1]).skip(0),
        bad.filter(lambda row: row["prompt"] != "5:"),
    ):
        assert None in dataset["chosen"][:]
        with pytest.raises(ValueError, match="Row 25 of train, column 'chosen'"):
            prepare(dataset, dataset_num_proc=num_proc)
    prepared, report = prepare(
        rows.select([10, 17, 4, 11]), dataset_num_proc=num_proc
    )  # every seventh from 3 is useless
    assert report.first_rows["identical"] == [10, 17]
    assert prepared["example_id"][:] == [2, 3]  # ids count in the dataset given
    with pytest.raises(ValueError, match="Row 4 of train: its margin is None"):
        prepare(rows.select([10, 17, 4, 11]), needs=MARGIN_READ)


def test_ids_may_begin_anywhere():
    assert prepare(Dataset.from_list(ROWS), max_length=20, first_id=100)[0]["example_id"][:] == [100, 104, 105, 106]


def test_control_text_is_counted():
    rows = [ROWS[0], ROWS[0] | {"chosen": "hey<eos>"}, ROWS[1] | {"prompt": "<bos>"}]
    prepared, report = prepare(Dataset.from_list(rows))
    assert report.counts["control_text"] == 1  # of rows that are used
    assert report.first_rows["control_text"] == [1]
    assert TOKENIZER.eos_token_id not in prepared[1]["chosen_ids"][:-1]
    allowed, report = prepare(Dataset.from_list(rows), allow_special_tokens_in_text=True)
    assert report.counts["control_text"] == 0
    assert allowed[1]["chosen_ids"] == allowed[0]["chosen_ids"]


def test_control_text_that_an_implicit_prompt_splits_is_counted():
    prepared, report = prepare(Dataset.from_list([{"chosen": "a <eos>", "rejected": "a <bos>"}]))
    assert TOKENIZER.decode(prepared[0]["prompt_ids"] + prepared[0]["chosen_ids"]) == "a <eos><eos>"
    assert report.counts["control_text"] == 1


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_bad_row_is_named_by_its_number_in_the_dataset(num_proc):
    rows = [*ROWS, ROWS[0] | {"chosen": None}]
    with pytest.raises(ValueError, match=r"Row 7 of train, column 'chosen': is None"):
        prepare(Dataset.from_list(rows), dataset_num_proc=num_proc)


def test_bad_arguments_are_refused():
    dataset = Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match="--useless_pairs 'keep' is not one of drop, error"):
        prepare(dataset, useless_pairs="keep")
    with pytest.raises(ValueError, match=r"is a dict.*one of its splits: 'train', 'test'"):
        prepare({"train": dataset, "test": dataset})
    with pytest.raises(ValueError, match=r"is a list.*Dataset\.from_list"):
        prepare(ROWS)
    with pytest.raises(ValueError, match=r"holds text, and there is no tokenizer"):
        prepare(dataset, tokenizer=None)
    with pytest.raises(ValueError, match=r"no EOS token"):
        prepare(dataset, tokenizer=byte_bpe(eos_token=None))
    with pytest.raises(ValueError, match=r"train has no column 'chosen'.*rename_column\('choosen', 'chosen'\)"):
        prepare(dataset.rename_column("chosen", "choosen"))


def test_an_implicit_prompt_beside_unread_columns_is_announced(caplog):
    rows = [{"note": "q", "chosen": "so yes", "rejected": "so no"}]
    prepared, _ = prepare(Dataset.from_list(rows))
    assert TOKENIZER.decode(prepared[0]["prompt_ids"]) == "so"
    assert "not read: note" in caplog.text


# --- streams ---


def test_a_stream_gives_the_pairs_of_the_table():
    table, table_report = prepare(Dataset.from_list(ROWS), max_length=20)
    stream, report = prepare(Dataset.from_list(ROWS).to_iterable_dataset(), max_length=20)
    assert report.rows == 0  # nothing is read yet
    assert stream.column_names == COLUMNS
    rows = list(stream)
    assert report.to_dict() == table_report.to_dict() | {"streaming": True}
    assert dataclasses.asdict(report)["first_rows"]["merged_boundary"] == [5]
    for row, want in zip(rows, table, strict=True):
        ids = PairIds(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"]])
        assert row["example_id"] == content_id(ids)
        assert {k: row[k] for k in COLUMNS[1:]} == {k: want[k] for k in COLUMNS[1:]}
    assert list(prepare(stream, tokenizer=None, max_length=20)[0]) == rows


def test_a_stream_that_does_not_know_its_columns():
    stream = IterableDataset.from_generator(lambda: ({"note": 1, "flags": "mine"} | row for row in ROWS))
    assert stream.column_names is None
    prepared, report = prepare(stream, max_length=20)
    assert [set(row) for row in prepared] == [set(COLUMNS)] * 4
    assert report.kept == 4
    with pytest.raises(ValueError, match="train has no column 'rejected'"):
        list(prepare(IterableDataset.from_generator(lambda: iter([{"prompt": "q", "chosen": "a"}])))[0])


def numbered(count):
    """Every seventh pair is useless."""
    return Dataset.from_list(
        [{"prompt": f"{n}:", "chosen": "hey", "rejected": "hey" if n % 7 == 3 else "you"} for n in range(count)]
    )


def test_streams_hold_rows_of_every_form():
    rows = [
        {"prompt": "q:", "chosen": "a", "rejected": ["b", "c"], "margin": [1.0, 2.0]},
        {"prompt": "q:", "completions": ["a", "b"], "scores": [1, 2]},
        {"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b", "weight": 2.0},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
    ]
    prepared, report = prepare(IterableDataset.from_generator(lambda: iter(rows)))
    got = list(prepared)
    assert [row["margin"] for row in got] == [[1.0, 2.0], [1.0], [], []]
    assert [row["weight"] for row in got] == [1.0, 1.0, 2.0, 1.0]
    assert [TOKENIZER.decode(row["prompt_ids"]) for row in got] == ["q:"] * 2 + ["<|user|>q<eos><|assistant|>"] * 2
    assert (report.rows, report.pairs) == (4, 5)


def test_ids_of_a_stream_are_the_same_on_every_rank_and_after_a_resume():
    stream, _ = prepare(numbered(600).to_iterable_dataset(num_shards=4))
    ids = [row["example_id"] for row in stream]
    assert len(set(ids)) == len(ids) == 600 - 86
    assert all(0 <= example_id < 2**63 for example_id in ids)
    ranks = [[row["example_id"] for row in split_dataset_by_node(stream, rank, 2)] for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted(ids)
    assert min(map(len, ranks)) > 200

    reader = iter(stream)
    for _ in range(300):  # beyond the first batch of rows
        next(reader)
    resumed, _ = prepare(numbered(600).to_iterable_dataset(num_shards=4))
    resumed.load_state_dict(stream.state_dict())
    assert [row["example_id"] for row in resumed] == ids[300:]


def test_workers_of_a_loader_share_a_stream():
    stream, _ = prepare(numbered(40).to_iterable_dataset(num_shards=2))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2)
    assert sorted(row["example_id"] for row in loader) == sorted(row["example_id"] for row in stream)


def test_a_content_id_tells_the_lists_apart():
    pairs = [
        PairIds(p, [c, r]) for p, c, r in ([[1], [2], [3]], [[1, 2], [3], [3]], [[1], [3], [2]], [[1], [2, 3], [3]])
    ]
    pairs.append(PairIds([1], [[2], [3], [4]], (Preferred(0, 1), Preferred(0, 2))))
    assert len({content_id(pair) for pair in pairs}) == 5
    assert content_id(PairIds([1], [[2], [3]])) == content_id(PairIds([1], [[2], [3]], flags=2))


def test_useless_pairs_of_a_stream(caplog):
    rows = Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match=r"teach nothing: .*chosen equals rejected: 1 \(row 1\)"):
        list(prepare(rows.to_iterable_dataset(), useless_pairs="error", max_length=20)[0])
    with caplog.at_level(logging.WARNING):
        list(prepare(rows.to_iterable_dataset(), max_length=20, dataset_num_proc=2)[0])
    assert "--dataset_num_proc 2 does not apply" in caplog.text
    assert "of 7 rows so far" in caplog.text
    useless = Dataset.from_list([ROWS[1]] * PATIENCE).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"No pair of train is left"):
        list(prepare(useless)[0])


def test_a_bad_row_of_a_stream_is_named():
    stream = concatenate_datasets(
        [numbered(300), Dataset.from_list([ROWS[0] | {"weight": -1.0}])]
    ).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"Row 300 of train, column 'weight'"):
        list(prepare(stream)[0])


def test_an_empty_report_reads_too():
    lines = DataReport(name="train", streaming=True).table().splitlines()
    assert lines[0].split() == ["data", "train", "(so", "far)"]
    assert [line.split()[-1] for line in lines[2:]] == [
        "0"
    ] * 5  # rows, kept, tokens of prompts, of completions, per row


# --- mixtures ---


def named(letter, count, shards=None):
    rows = Dataset.from_list([{"prompt": f"{letter}{n}:", "chosen": "hey", "rejected": "you"} for n in range(count)])
    return rows if shards is None else rows.to_iterable_dataset(num_shards=shards)


def mix(*parts, **changed):
    how = {name: changed.pop(name) for name in ("name", "needs") if name in changed}
    return prepare_mixture(parts, TOKENIZER, DataOptions(disable_tqdm=True, **changed), **how)


def prompts(rows):
    return [TOKENIZER.decode(row["prompt_ids"]).rstrip(":") for row in rows]


def test_tables_of_a_mixture_follow_each_other():
    """Ids go on from one to the next by the rows of the tables, dropped ones included."""
    mixed, reports = mix(named("a", 3), Dataset.from_list(ROWS), named("b", 2), max_length=20)
    assert mixed["example_id"][:] == [0, 1, 2, 3, 7, 8, 9, 10, 11]
    assert prompts(mixed) == ["a0", "a1", "a2", "one", "cut", "x", "<bos>", "b0", "b1"]
    assert {name: (report.name, report.rows, report.kept) for name, report in reports.items()} == {
        "train 0": ("train 0", 3, 3),
        "train 1": ("train 1", 7, 4),
        "train 2": ("train 2", 2, 2),
    }
    assert mixed.features == FEATURES


def test_a_mixture_of_one_is_that_one():
    mixed, reports = mix(named("a", 3), name="eval")
    assert mixed.to_list() == prepare(named("a", 3))[0].to_list()
    assert [*reports] == ["eval"]
    stream, reports = mix(named("a", 3, shards=1))
    assert prompts(stream) == ["a0", "a1", "a2"]
    assert reports["train"].rows == 3


def test_the_parts_of_a_mixture_are_named_in_errors():
    bad = Dataset.from_list([ROWS[0], ROWS[0] | {"chosen": None}])
    with pytest.raises(ValueError, match="Row 1 of train 1, column 'chosen'"):
        mix(named("a", 3), bad)
    bad.info.dataset_name = "mine.jsonl"
    with pytest.raises(ValueError, match=r"Row 1 of train 1 \(mine\.jsonl\), column 'chosen'"):
        mix(named("a", 3), bad)
    with pytest.raises(ValueError, match=r"Row 0 of train 0: its margin is None"):
        mix(named("a", 3), Dataset.from_list(MARGINS), needs=MARGIN_READ)
    with pytest.raises(ValueError, match=r"Row 0 of train 1: its margin is None"):
        mix(Dataset.from_list(MARGINS), named("a", 3), needs=MARGIN_READ)
    for parts in ((), (named("a", 3), named("b", 3, shards=1))):
        with pytest.raises(
            ValueError, match=r"train: a mixture needs at least one dataset, and all of them tables or all"
        ):
            mix(*parts)


def test_streams_of_a_mixture_take_turns_until_all_have_ended():
    mixed, _ = mix(named("a", 2, shards=1), named("b", 5, shards=1), named("c", 3, shards=1))
    assert prompts(mixed) == ["a0", "b0", "c0", "a1", "b1", "c1", "b2", "c2", "b3", "b4"]
    assert mixed.column_names == COLUMNS
    uneven, _ = mix(named("a", 300, shards=2), named("b", 700, shards=4))
    got = prompts(uneven)
    assert sorted(got) == sorted([f"a{n}" for n in range(300)] + [f"b{n}" for n in range(700)])  # each row once
    assert len(set(got[:100]) & {f"a{n}" for n in range(300)}) == 50


def test_the_reports_of_a_mixture_of_streams_fill_as_it_is_read():
    mixed, reports = mix(named("a", 4, shards=1), Dataset.from_list(ROWS).to_iterable_dataset(), max_length=20)
    assert len(list(mixed)) == 8
    assert {name: (report.rows, report.kept) for name, report in reports.items()} == {
        "train 0": (4, 4),
        "train 1": (7, 4),
    }


@pytest.mark.parametrize("read", [0, 1, 7, 11, 14])
def test_a_mixture_of_streams_resumes_where_it_stopped(read):
    def parts():
        return named("a", 10, shards=2), named("b", 5, shards=1)

    whole = prompts(mix(*parts())[0])
    mixed, _ = mix(*parts())
    reader = iter(mixed)
    assert prompts([next(reader) for _ in range(read)]) == whole[:read]
    resumed, _ = mix(*parts())
    resumed.load_state_dict(mixed.state_dict())
    assert prompts(resumed) == whole[read:]


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_two_ranks_share_a_mixture_of_streams(shards):
    mixed, _ = mix(named("a", 40, shards=shards), named("b", 24, shards=shards))
    ranks = [prompts(split_dataset_by_node(mixed, rank, 2)) for rank in (0, 1)]
    assert sorted(ranks[0] + ranks[1]) == sorted([f"a{n}" for n in range(40)] + [f"b{n}" for n in range(24)])
    assert min(map(len, ranks)) >= 24
