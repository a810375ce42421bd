"""Two real processes over gloo equal one with the same global batch: losses, metrics, weights, and what is gathered."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parent))

import tiny
from cells import CELLS, EVAL_ROWS, run, trained_weights
from engines import ENGINES
from launch import ATOL, MEANS, Alone, differences, farthest, together, tolerance

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder) -> dict[str, Any]:
    return together("ddp", folder, list(CELLS))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Alone:
    return Alone(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("name", CELLS)
def test_there_really_were_two_processes(name, two):
    """A wrong launch exits with 0 as well."""
    expected = ENGINES["ddp"]
    assert two["engine"][name] == {
        "world_size": "2",
        "distributed_type": expected.distributed_type,
        "wrapper": expected.wrapper,
        "stage": "none",
        "backend": "gloo",
    }
    assert two["share"][name] == 1.0


@pytest.mark.parametrize("name", CELLS)
def test_every_line_equals_one_process(name, two, alone):
    want, got = alone.of(name), two["cells"][name]
    assert len(want["lines"]) == CELLS[name]["max_steps"] // CELLS[name].get("logging_steps", 1)
    for line, expected in zip(got["lines"], want["lines"], strict=True):
        assert line.keys() == expected.keys()  # a step that was left out has no loss
    for step, by_metric in enumerate(differences(got, want), start=1):
        assert max(by_metric.values(), default=0.0) <= tolerance(name), (step, by_metric)
    assert len({line["loss"] for line in want["lines"] if "loss" in line}) > 1


@pytest.mark.parametrize("name", CELLS)
def test_trained_weights_equal_one_process(name, two, alone, folder):
    got = trained_weights(name, folder)
    assert farthest(got, alone.weights(name)) <= tolerance(name)
    if name.startswith("full"):
        assert tiny.moved(tiny.weights(tiny.llama()), got) > 100 * ATOL


@pytest.mark.parametrize("name", ["full flat", "full padded", "lora flat accumulated", "aot", "bco_pair"])
def test_evaluation_counts_every_pair_once(name, two, alone):
    """7 rows, 2 ranks x 2: accelerate repeats the first row to fill the last batch."""
    want, got = alone.of(name), two["cells"][name]
    means = [f"eval_{mean}" for mean in MEANS]
    assert {m: got["eval"][m] for m in means} == pytest.approx({m: want["eval"][m] for m in means}, rel=1e-6, abs=ATOL)
    assert got["example_ids"] == want["example_ids"] == list(range(EVAL_ROWS))
    assert got["logps"] == pytest.approx(want["logps"], abs=1e-4)


def test_evaluation_of_a_stream_counts_every_pair_once(two, alone):
    want, got = alone.of("stream")["eval of the stream"], two["cells"]["stream"]["eval of the stream"]
    means = [f"eval_{mean}" for mean in MEANS]
    assert {m: got[m] for m in means} == pytest.approx({m: want[m] for m in means}, rel=1e-6, abs=ATOL)


@pytest.mark.parametrize("name", [name for name in CELLS if name.startswith("resumed")])
def test_two_processes_go_on_as_one(name, two, alone, folder, tmp_path):
    """The checkpoint of two ranks, resumed by one process that has the whole batch and no launcher."""
    shutil.copytree(folder / name, tmp_path / name)
    set_seed(0)
    got = run(name, tmp_path, 1, write_checkpoint=False)
    for step, by_metric in enumerate(differences(got, alone.of(name)), start=1):
        assert max(by_metric.values()) <= ATOL, (step, by_metric)
    assert farthest(trained_weights(name, tmp_path), alone.weights(name)) <= ATOL


def test_running_shift_counts_every_pair_once(two, alone):
    """bco_pair's delta, after 22 pairs and the 8 of the next epoch's first batch, gathered over the ranks."""
    want, got = alone.of("bco_pair")["state"]["delta"], two["cells"]["bco_pair"]["state"]["delta"]
    assert got["count"] == want["count"] == 30
    assert got["mean"] == pytest.approx(want["mean"], abs=ATOL)
    assert abs(want["mean"]) > 100 * ATOL


def test_aot_sorts_all_that_it_should(alone):
    """Sorting 8 pairs is not sorting 4 and 4, or the comparison of ranks above would show nothing."""
    whole, halves = alone.of("aot")["lines"][0]["loss"], alone.of("aot halves")["lines"][0]["loss"]
    assert abs(whole - halves) > 20 * ATOL


def test_nan_on_one_rank_stops_both(two):
    here, there = two["nan"]
    assert "on another rank" in here
    assert "example_ids [2]" in there


def test_a_signal_to_one_rank_stops_and_saves_on_both(two):
    assert two["stopped"] == [[2, True, ["checkpoint-2"]]] * 2


def test_a_bad_number_on_one_rank_leaves_the_step_out_on_both(alone):
    """That the two agree is asserted above; here, that there was something to agree on."""
    lines = alone.of("skipped step")["lines"]
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 1]
