"""Whole datasets: columns, ids, counts, the cache, processes, streams."""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset, concatenate_datasets, load_from_disk
from datasets.distributed import split_dataset_by_node
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import CHAT, byte_bpe

from dpo_trainer.data import DataOptions, prepare_dataset
from dpo_trainer.data.mapping import PairMapper, content_id
from dpo_trainer.data.report import DROPPED, DataReport
from dpo_trainer.data.stream import PATIENCE
from dpo_trainer.data.truncate import PairIds

TOKENIZER = byte_bpe(chat_template=CHAT)
COLUMNS = ["example_id", "prompt_ids", "chosen_ids", "rejected_ids", "weight", "length"]


def prepare(dataset, tokenizer=TOKENIZER, **changed):
    how = {name: changed.pop(name) for name in ("name", "requires_margin", "first_id") if name in changed}
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
WANT = {
    "name": "train",
    "streaming": False,
    "rows": 7,
    "kept": 4,
    "dropped": 3,
    "truncated_prompts": 0,
    "truncated_chosen": 1,
    "truncated_rejected": 0,
    "merged_boundary": 1,
    "empty_prompts": 1,
    "identical": 1,
    "no_room": 1,
    "empty_completion": 1,
    "first_identical": [1],
    "first_no_room": [2],
    "first_empty_completion": [3],
    # rows 0, 4, 5, 6: `one:`, `cut`, `x`, BOS | hey EOS, 17 of the cut one, `abc d EOS`, hey EOS |
    # you EOS three times, and `ab y o u EOS`
    "prompt_tokens": 4 + 3 + 1 + 1,
    "chosen_tokens": 4 + 17 + 3 + 4,
    "rejected_tokens": 4 + 4 + 5 + 4,
}


# --- tables ---


def test_columns_types_and_ids():
    prepared, report = prepare(Dataset.from_list(ROWS), max_length=20)
    assert prepared.column_names == COLUMNS
    assert report.to_dict() == WANT
    assert prepared["example_id"][:] == [0, 4, 5, 6]
    assert prepared["weight"][:] == [1.0] * 4
    assert prepared["length"][:] == [4 + 4 + 4, 3 + 17 + 4, 1 + 3 + 5, 1 + 4 + 4]
    assert all(isinstance(token, int) for token in prepared[0]["prompt_ids"])
    assert prepared.features["example_id"].dtype == "int64"


def test_the_report_reads_as_text():
    text = prepare(Dataset.from_list(ROWS), max_length=20)[1].table()
    for part in ("train: 4 of 7 pairs kept", "chosen equals rejected (row 1)", "(row 2)", "empty completion (row 3)"):
        assert part in text
    assert "1 chosen completions truncated at their end (25.0%)" in text
    assert "54 tokens: prompts 9, chosen 28, rejected 17 (14 per pair)" in text
    assert "prompts truncated" not in text  # what did not happen is left out


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
    assert prepared[0] == rows[0] | {"example_id": 0, "weight": 1.0, "length": 5}


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
    assert (report.identical, report.no_room, report.truncated_chosen) == (1, 1, 1)


def test_two_processes_give_what_one_gives():
    dataset = Dataset.from_list(ROWS * 3)
    one, report = prepare(dataset, max_length=20)
    two, report_of_two = prepare(dataset, max_length=20, dataset_num_proc=2)
    assert two.to_list() == one.to_list()
    assert report_of_two == report
    assert report.first_identical == [1, 8, 15]


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
    for changed in (
        {"max_length": 19},
        {"max_length": 20, "tokenizer": byte_bpe(adds="<bos> $A", chat_template=CHAT)},
    ):
        with pytest.raises(RuntimeError, match="tokenized again"):
            prepare(load_from_disk(tmp_path), **changed)


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
    assert report.dropped == sum(getattr(report, kind) for kind in DROPPED)
    assert sum(prepared["length"]) == report.prompt_tokens + report.chosen_tokens + report.rejected_tokens
    assert sum(map(len, prepared["chosen_ids"])) == report.chosen_tokens
    assert max_length is None or all(len(row["prompt_ids"] + row["chosen_ids"]) <= max_length for row in prepared)
    assert all(
        row["chosen_ids"] and row["rejected_ids"] and row["chosen_ids"] != row["rejected_ids"] for row in prepared
    )
    assert (
        sorted(set(range(len(rows))) - set(prepared["example_id"]))[:1]
        == sorted(report.first_identical + report.first_no_room + report.first_empty_completion)[:1]
    )


# --- what is refused ---


def test_useless_pairs_are_warned_of_or_refused(caplog):
    with caplog.at_level(logging.WARNING):
        prepare(Dataset.from_list(ROWS), max_length=20)
    assert "1 dropped: chosen equals rejected (row 1)" in caplog.text
    with pytest.raises(ValueError, match=r"teach nothing: 1: chosen equals rejected \(row 1\); 1: no room.*\(row 2\)"):
        prepare(Dataset.from_list(ROWS), max_length=20, useless_pairs="error")
    prepare(Dataset.from_list(ROWS[:1]), useless_pairs="error")


def test_no_pair_left_is_an_error():
    with pytest.raises(
        ValueError, match=r"No pair of eval is left: 2 dropped: chosen equals.*\(rows 0, 1\).*--max_length"
    ):
        prepare(Dataset.from_list([ROWS[1]] * 2), name="eval")
    with pytest.raises(ValueError, match=r"train has no rows"):
        prepare(Dataset.from_dict({"prompt": [], "chosen": [], "rejected": []}))


@pytest.mark.parametrize("num_proc", [None, 2])
def test_a_bad_row_is_named_by_its_number_in_the_dataset(num_proc):
    rows = [*ROWS, ROWS[0] | {"chosen": None}]
    with pytest.raises(ValueError, match=r"Row 7 of train, column 'chosen': is None"):
        prepare(Dataset.from_list(rows), dataset_num_proc=num_proc)


def test_bad_arguments_are_refused():
    dataset = Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match="useless_pairs must be 'drop' or 'error', got 'keep'"):
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
    rows = [{"question": "q", "chosen": "so yes", "rejected": "so no"}]
    prepared, _ = prepare(Dataset.from_list(rows))
    assert TOKENIZER.decode(prepared[0]["prompt_ids"]) == "so"
    assert "not read: question" in caplog.text


# --- streams ---


def test_a_stream_gives_the_pairs_of_the_table():
    table, table_report = prepare(Dataset.from_list(ROWS), max_length=20)
    stream, report = prepare(Dataset.from_list(ROWS).to_iterable_dataset(), max_length=20)
    assert report.rows == 0  # nothing is read yet
    assert stream.column_names == COLUMNS
    rows = list(stream)
    assert report.to_dict() == table_report.to_dict() | {"streaming": True}
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
    pairs = [PairIds(p, [c, r]) for p, c, r in ([[1], [2], [3]], [[1, 2], [3], [3]], [[1], [3], [2]], [[1], [2, 3], [3]])]
    assert len({content_id(pair) for pair in pairs}) == 4
    assert content_id(PairIds([1], [[2], [3]])) == content_id(PairIds([1], [[2], [3]], flags=2))


def test_useless_pairs_of_a_stream(caplog):
    rows = Dataset.from_list(ROWS)
    with pytest.raises(ValueError, match=r"teach nothing: 1: chosen equals rejected \(row 1\)"):
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
    assert DataReport(name="train", streaming=True).table() == "train: 0 of 0 pairs kept so far"
