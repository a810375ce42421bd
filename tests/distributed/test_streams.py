"""Streams and tables that do not come out even between two ranks: no hang, every pair counted once, the means of one process."""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parent))

import tiny
import uneven
from two_processes import torchrun
from uneven import EVALUATED, TRAINED

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
ATOL = 1e-5  # float32: two ranks add in another order, and pairs stand in other rows


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("uneven")
    uneven.files(folder, 10)
    torchrun(HERE / "uneven_worker.py", folder)
    both = json.loads((folder / "results.json").read_text())
    assert len(both) == 2
    return both


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("alone")
    uneven.files(folder, 10)

    @cache
    def of(kind: str, name: str) -> dict[str, Any]:
        set_seed(0)
        return getattr(uneven, kind)(name, folder, 1)

    return of


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_counts_every_pair_once(name, ranks, alone):
    """In the means, on one rank or the other, and in what `compute_metrics` receives on both."""
    n, _, options = EVALUATED[name]
    want = n - n % uneven.GLOBAL_BATCH if "dataloader_drop_last" in options else n
    one, two = alone("evaluated", name), [rank["evaluated"][name] for rank in ranks]
    for found in (one, *two):
        assert found["how many"] == len(found["received"]) == want
    counted = Counter(two[0]["counted"] + two[1]["counted"])
    assert counted == Counter(one["counted"])
    assert set(counted.values()) == {1}
    assert {str(example) for example in counted} == two[0]["received"].keys() == two[1]["received"].keys()


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_equals_one_process(name, ranks, alone):
    one = alone("evaluated", name)
    for rank in ranks:
        two = rank["evaluated"][name]
        assert two["means"] == pytest.approx(one["means"], rel=1e-6, abs=ATOL)
        assert two["received"] == pytest.approx({str(k): v for k, v in one["received"].items()}, rel=1e-6, abs=1e-4)


def test_evaluation_of_a_stream_equals_that_of_the_table(ranks):
    """The pairs of the stream of n are those of the table of n, whose means the tests of tables know."""
    for n in uneven.SIZES:
        stream, table = (ranks[0]["evaluated"][f"{kind} of {n}"]["means"] for kind in ("stream", "table"))
        assert stream == pytest.approx(table, rel=1e-6, abs=ATOL)
    losses = {ranks[0]["evaluated"][f"table of {n}"]["means"]["loss"] for n in uneven.SIZES}
    assert len(losses) == len(uneven.SIZES), "else a mean over other pairs would not show"


@pytest.mark.parametrize("name", TRAINED)
def test_training_equals_one_process(name, ranks, alone):
    one, two = alone("trained", name), [rank["trained"][name] for rank in ranks]
    assert Counter(two[0]["counted"] + two[1]["counted"]) == Counter(one["counted"])
    for found in two:
        assert len(found["lines"]) == len(one["lines"]) == TRAINED[name][0]
        for got, want in zip(found["lines"], one["lines"], strict=True):
            assert got == pytest.approx(want, rel=1e-6, abs=ATOL)


def test_some_rounds_really_were_uneven(ranks):
    """Of a table of one row the second rank has nothing; of a lopsided one it has most of the tokens."""
    counts = [len(rank["trained"]["table of 1"]["counted"]) for rank in ranks]
    assert counts == [2, 0]
    assert [len(rank["evaluated"]["stream of 5"]["counted"]) for rank in ranks] == [3, 2]
    tokens = [len(row["prompt"] + row["chosen"] + row["rejected"]) for row in uneven.lopsided(8)]
    first, second = (sum(tokens[at] for at in range(8) if at // 2 % 2 == rank) for rank in (0, 1))
    assert second > 4 * first
    assert [i % 4 for i, row in enumerate(uneven.half_useless(10)) if row["chosen"] == row["rejected"]] == [2, 3] * 5


@pytest.mark.parametrize("how", ["trained on", "evaluated"])
@pytest.mark.parametrize("name", uneven.REFUSED)
def test_stream_without_a_row_is_an_error(name, how, ranks, tmp_path):
    made = tiny.trainer(tmp_path, **({"train": uneven.REFUSED[name](tmp_path)} if how == "trained on" else {}))
    ask = made.train if how == "trained on" else lambda: made.evaluate(uneven.REFUSED[name](tmp_path))
    for said in (uneven.refusal(ask), *(rank["refused"][f"{name}, {how}"] for rank in ranks)):
        assert "A stream has no row left" in said
        assert "--max_length" in said


def test_share_of_a_stream_is_refused(ranks):
    """Of the rows of each process, half would go to the other, which does not have them."""
    for rank in ranks:
        for name in ("share of a stream", "share of a shuffled stream"):
            said = rank["refused"][name]
            assert said.startswith(
                "The train data were split between the processes by split_dataset_by_node. Give every"
            )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("share of a table", "The processes hold different train data (8, 8 rows, by process). Give every process"),
        ("share of a table, uneven", "The processes hold different train data (5, 4 rows, by process). Give every"),
        ("share of a table, evaluated", "The processes hold different eval data (5, 4 rows, by process). Give every"),
    ],
)
def test_share_of_a_table_is_refused(name, message, ranks):
    """With shares of unequal length the ranks would make different numbers of steps, and wait for each other for ever."""
    for rank in ranks:
        assert rank["refused"][name].startswith(message)


def test_share_of_a_stream_is_a_stream_to_one_process(tmp_path):
    """Half of a file, on purpose: nobody takes a share of it."""
    from datasets.distributed import split_dataset_by_node

    half = split_dataset_by_node(uneven.stream(tiny.rows(8)), rank=0, world_size=2)
    made = tiny.trainer(tmp_path)
    counted = uneven.note_counted(made)
    made.evaluate(half)
    assert len(set(counted)) == len(counted) == 4
