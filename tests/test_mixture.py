"""Mixtures: which rows of which datasets, and everything that can be wrong in a list of them."""

from __future__ import annotations

import json

import datasets
import numpy as np
import pytest
from datasets import Dataset, IterableDataset

from dpo_trainer.data.files.mixture import KEYS, load_mixture, parse_mixture
from dpo_trainer.data.files.origin import named
from dpo_trainer.data.files.splits import use_share


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    """Three datasets: a with 10 rows and a split "test", b with 6 rows in a split "train_prefs", c in other columns."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name, splits in {"a": {"train": 10, "test": 2}, "b": {"train_prefs": 6, "test_prefs": 3}}.items():
        (tmp_path / name).mkdir()
        configs = "".join(f"  - split: {split}\n    path: {split}.jsonl\n" for split in splits)
        (tmp_path / name / "README.md").write_text(
            f"---\nconfigs:\n- config_name: default\n  data_files:\n{configs}---\n"
        )
        for split, count in splits.items():
            rows = [json.dumps({"chosen": f"{name} {split} {i}", "rejected": "r"}) for i in range(count)]
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(rows))
    (tmp_path / "c.csv").write_text("best,worst\n" + "".join(f"c {i},r\n" for i in range(4)))
    return tmp_path


@pytest.fixture(params=[False, True], ids=["map", "stream"])
def streaming(request):
    return request.param


A, B, C = "a", {"name": "b", "split": "train_prefs"}, {"name": "c.csv", "columns": "chosen=best,rejected=worst"}


def texts(parts) -> list[list[str]] | None:
    return parts if parts is None else [[row["chosen"] for row in part] for part in parts]


def numbered(start: str, count: int) -> list[str]:
    return [f"{start} {i}" for i in range(count)]


def test_every_entry_is_loaded_on_its_own_and_in_order(streaming):
    train, evaluation = load_mixture([C, B, A], streaming=streaming)
    assert all(isinstance(part, IterableDataset if streaming else Dataset) for part in train)
    assert texts(train) == [numbered("c", 4), numbered("b train_prefs", 6), numbered("a train", 10)]
    assert texts(evaluation) == [numbered("a test", 2)]
    assert [part.info.dataset_name for part in train] == ["c.csv", "b", "a"]


def test_json_says_the_same_as_a_list():
    entries = [A, B, C]
    assert texts(load_mixture(json.dumps(entries))[0]) == texts(load_mixture(entries)[0])
    assert parse_mixture(json.dumps(entries)) == parse_mixture(entries)


def test_a_dataset_may_be_listed_twice(streaming):
    train, _ = load_mixture([A, {"name": "a", "split": "test"}, A], streaming=streaming)
    assert texts(train) == [numbered("a train", 10), numbered("a test", 2), numbered("a train", 10)]


# --- fractions ---


@pytest.mark.parametrize(("fraction", "count"), [(0.5, 5), (0.26, 3), ("1e-1", 1), (1, 10), (1.0, 10)])
def test_a_fraction_of_a_table_is_that_many_rows_drawn_by_the_seed_in_their_order(fraction, count):
    def drawn(seed: int) -> list[str]:
        [[*rows]] = texts(load_mixture([{"name": "a", "fraction": fraction}], seed=seed)[0])
        return rows

    assert len(drawn(1)) == count
    assert drawn(1) == sorted(drawn(1))  # the numbers have one digit
    assert drawn(1) == drawn(1)
    if count < 10:
        assert len({tuple(drawn(seed)) for seed in range(6)}) > 1, "the seed has no effect"


def test_what_is_drawn_does_not_depend_on_the_other_entries(streaming):
    half = {"name": "a", "fraction": 0.5}
    alone, _ = load_mixture([half], streaming=streaming)
    among, _ = load_mixture([B, half, C], streaming=streaming)
    assert texts(alone) == [texts(among)[1]]


def big_stream(parts: int = 4, rows: int = 500) -> IterableDataset:
    return named(
        IterableDataset.from_generator(
            count_up, gen_kwargs={"starts": [rows * part for part in range(parts)], "n": rows}
        ),
        "big",
    )


def count_up(starts, n):
    for start in starts:
        for number in range(start, start + n):
            yield {"number": number, "text": f"row {number}"}


def numbers(stream) -> list[int]:
    return [row["number"] for row in stream]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_a_fraction_of_a_stream_keeps_about_that_share(fraction):
    """2000 rows, each kept with probability f: five standard deviations, sqrt(2000 f (1 - f)), are 67 to 112 rows."""
    kept = numbers(use_share(big_stream(), fraction, seed=1))
    assert abs(len(kept) - 2000 * fraction) < 5 * np.sqrt(2000 * fraction * (1 - fraction))
    assert kept == sorted(kept)
    other = numbers(use_share(big_stream(), fraction, seed=2))
    # Independent draws: rows that both keep are f^2 of all, and not f as with one draw.
    both = len(set(kept) & set(other))
    assert abs(both - 2000 * fraction**2) < 5 * np.sqrt(2000 * fraction**2 * (1 - fraction**2))


def test_a_fraction_of_a_stream_is_the_same_however_it_is_dealt_out():
    """Ranks and workers get shards of it, whose rows are numbered anew."""
    whole = numbers(use_share(big_stream(), 0.3, seed=1))
    shards = [numbers(use_share(big_stream(), 0.3, seed=1).shard(4, index)) for index in range(4)]
    assert all(shards)
    assert sorted(number for shard in shards for number in shard) == whole


def test_a_fraction_of_a_stream_goes_on_where_it_was():
    stream = use_share(big_stream(), 0.3, seed=1)
    rows = iter(stream)
    first = [next(rows)["number"] for _ in range(50)]
    state = stream.state_dict()
    resumed = use_share(big_stream(), 0.3, seed=1)
    resumed.load_state_dict(state)
    assert first + numbers(resumed) == numbers(use_share(big_stream(), 0.3, seed=1))


def test_names_say_that_rows_are_a_part():
    """Of a table each row knows its number; of a stream nobody does any more."""
    stream = use_share(big_stream(), 0.25, seed=1)
    assert stream.info.dataset_name == "0.25 of big"
    [table], _ = load_mixture([{"name": "a", "fraction": 0.5}], seed=1)
    assert table.info.dataset_name == "a"
    chosen = table._indices.column(0).to_pylist()
    assert texts([table]) == [[f"a train {number}" for number in chosen]]


def test_a_fraction_that_is_not_one_row():
    with pytest.raises(ValueError, match=r"fraction 0\.01 of a, which has 10 rows, is not one row\. Raise it"):
        load_mixture([{"name": "a", "fraction": 0.01}])


# --- rows to evaluate on ---


def test_a_split_is_evaluated_on_where_an_entry_has_it(streaming):
    for entries, options, want in [
        ([A, B], {}, [numbered("a test", 2)]),
        ([A, B | {"test_split": "test_prefs"}], {}, [numbered("a test", 2), numbered("b test_prefs", 3)]),
        ([A, B], {"test_split": "test_prefs"}, [numbered("b test_prefs", 3)]),
        ([B, C], {}, None),
        ([{"name": "a", "split": "test"}], {}, None),
        ([A, B], {"eval_name_or_path": "a/test.jsonl"}, [numbered("a test", 2)]),
        ([A, B], {"eval_name_or_path": "b", "test_split": "test_prefs"}, [numbered("b test_prefs", 3)]),
    ]:
        assert texts(load_mixture(entries, streaming=streaming, **options)[1]) == want


def test_splits_for_entries_that_name_none():
    train, _ = load_mixture(["b", {"name": "a", "split": "train"}], train_split="train_prefs")
    assert texts(train) == [numbered("b train_prefs", 6), numbered("a train", 10)]


def test_rows_held_out_are_taken_from_every_entry(streaming):
    """A count of each; and of what the fraction leaves, so that nobody evaluates on rows that were not to be used."""
    train, evaluation = load_mixture([A, C], test_split_size=2, streaming=streaming)
    for part, held, whole in zip(
        texts(train), texts(evaluation), [numbered("a train", 10), numbered("c", 4)], strict=True
    ):
        assert len(held) == 2
        assert sorted(part + held) == whole
    train, evaluation = load_mixture([{"name": "a", "fraction": 0.5}], test_split_size=1, streaming=streaming)
    [used] = texts(load_mixture([{"name": "a", "fraction": 0.5}], streaming=streaming)[0])
    assert sorted(texts(train)[0] + texts(evaluation)[0]) == used


def test_a_share_is_held_out_of_every_table():
    train, evaluation = load_mixture([A, B], test_split_size=0.5)
    assert [len(part) for part in train] == [len(part) for part in evaluation] == [5, 3]


# --- what can be wrong ---


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], r"--datasets must be a list of datasets, got \[\]"),
        ({"name": "a"}, r"--datasets must be a list of datasets, got \{"),
        ("a.jsonl", r"--datasets 'a\.jsonl' is not valid JSON: .*Write a list such as \[\{\"name\""),
        ('{"name": "a"}', r"must be a list"),
        ('"a"', r"must be a list"),
        ([7], r"--datasets, entry 0 is 7: it must be a name, or a mapping"),
        ([A, {"fraction": 0.5}], r"--datasets, entry 1 has no name"),
        ([{"name": None}], r"entry 0: name must be text, got None"),
        ([{"name": ""}], r"entry 0: name must be text"),
        ([{"name": "a", "frction": 1}], r"entry 0: unknown key 'frction'\. Did you mean 'fraction'\? Known: name, "),
        ([{"name": "a", 1: 1}], r"unknown key 1"),
        ([{"name": "a", "config": 7}], r"entry 0: config must be text, got 7 \(quote it"),
        ([{"name": "a", "split": ["train"]}], r"entry 0: split must be text"),
        ([{"name": "a", "fraction": 0}], r"entry 0: fraction must be above 0 and at most 1, got 0\.$"),
        ([{"name": "a", "fraction": -0.5}], r"fraction must be above 0"),
        (
            [{"name": "a", "fraction": 2}],
            r"at most 1, got 2\. To use a dataset more than once, list it more than once",
        ),
        ([{"name": "a", "fraction": float("nan")}], r"fraction must be above 0"),
        ([{"name": "a", "fraction": "half"}], r"fraction must be a number above 0 and at most 1, got 'half'"),
        ([{"name": "a", "fraction": True}], r"fraction must be a number"),
        ([{"name": "a", "fraction": [1]}], r"fraction must be a number"),
        (
            [{"name": "a", "columns": "promt=x"}],
            r"entry 0: columns: there is no column 'promt' .*Did you mean 'prompt'",
        ),
        ([{"name": "a", "columns": ["x"]}], r"entry 0: columns is of type list"),
    ],
    ids=str,
)
def test_bad_lists(entries, message):
    with pytest.raises(ValueError, match=message):
        load_mixture(entries)


@pytest.mark.parametrize(
    ("entries", "options", "message"),
    [
        ([A, "b"], {}, r"--datasets, entry 1: split 'train': 'b' has no such split\. It has: train_prefs, test_prefs"),
        (
            [{"name": "a", "test_split": "tset"}],
            {},
            r"entry 0: test_split 'tset': 'a' has no such split\. .*Did you mean 'test'",
        ),
        ([A, B], {"test_split": "dev"}, r"--dataset_test_split 'dev': none of the 2 datasets has such a split"),
        (
            [A],
            {"test_split": "test", "test_split_size": 1},
            r"--dataset_test_split test and --test_split_size 1 both say",
        ),
        ([A], {"eval_name_or_path": "x", "test_split_size": 1}, r"--eval_dataset x and --test_split_size 1 both say"),
        (
            [{"name": "a", "test_split": "test"}],
            {"test_split_size": 1},
            r"entry 0: test_split and --test_split_size 1 both say where evaluation rows come from",
        ),
        (
            [{"name": "a", "test_split": "test"}],
            {"eval_name_or_path": "x"},
            r"entry 0: test_split and --eval_dataset x both say",
        ),
        (["gone.jsonl"], {}, r"There is no dataset file or folder 'gone\.jsonl'"),
        ([{"name": "c.csv", "config": "en"}], {}, r"--dataset_config 'en' is for datasets of the hub"),
        (
            [{"name": "c.csv", "columns": {"chosen": "bset"}}],
            {},
            r"entry 0: columns chosen=bset: c\.csv has no column 'bset'\. Did you mean 'best'\? It has: best, worst",
        ),
    ],
    ids=str,
)
def test_lists_that_do_not_fit_their_datasets(entries, options, message, streaming):
    with pytest.raises(ValueError, match=message):
        load_mixture(entries, streaming=streaming, **options)


def test_more_rows_held_out_than_an_entry_has():
    with pytest.raises(
        ValueError, match=r"--test_split_size 4 must .*leave rows on both sides of a split of 4 \(c\.csv\)"
    ):
        load_mixture([A, C], test_split_size=4)


def test_a_share_of_a_stream_cannot_be_held_out():
    with pytest.raises(ValueError, match=r"--test_split_size 0\.5: a stream has no known length"):
        load_mixture([A], test_split_size=0.5, streaming=True)


def test_the_keys_are_those_that_the_help_lists():
    from dpo_trainer.cli import ScriptArguments

    text = ScriptArguments.__dataclass_fields__["datasets"].metadata["help"]
    assert f"{{{', '.join(KEYS)}}}" in text
