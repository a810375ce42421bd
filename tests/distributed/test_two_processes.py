"""Two real processes over gloo equal one with the same global batch: losses, metrics, weights, and what is gathered."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import set_seed

sys.path.insert(0, str(Path(__file__).parent))

import tiny
from cells import CELLS, EVAL_ROWS, run

from dpo_trainer.metrics import METRICS

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent

# float32: the sums of two ranks are added in another order. Worst seen 2.4e-7 in a loss, 2.1e-7 of any mean and 1.2e-7 in a
# weight; weights move by more than a hundred times the tolerance (asserted below).
ATOL = 1e-5

# Of a log line: means over pairs and tokens. (Tokens that only fill a batch are computed, so `num_tokens` counts them.)
MEANS = [name for name in METRICS if name != "aux_loss"]


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> dict[str, Any]:
    """What two ranks saw: one launch for all cells."""
    folder = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE)])}
    done = subprocess.run(
        [*launch, str(HERE / "worker.py"), str(folder)], env=env, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "results.json").read_text()) | {"folder": folder}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("one")

    @cache
    def of(name: str) -> dict[str, Any]:
        set_seed(0)
        return run(name, folder, 1) | {"weights": load_file(folder / f"{name}.safetensors")}

    return of


def test_there_really_were_two_processes(together):
    """A wrong launch exits with 0 as well."""
    assert together["engine"] == {
        "world_size": "2",
        "distributed_type": "MULTI_CPU",
        "engine": "DistributedDataParallel",
        "backend": "gloo",
    }


@pytest.mark.parametrize("name", CELLS)
def test_every_line_equals_one_process(name, together, alone):
    want, got = alone(name)["lines"], together["cells"][name]["lines"]
    assert len(got) == len(want) == CELLS[name]["max_steps"] // CELLS[name].get("logging_steps", 1)
    for step, (a, b) in enumerate(zip(got, want, strict=True), start=1):
        assert a.keys() == b.keys()  # a step that was left out has no loss
        means = [m for m in MEANS if m in b]
        assert {m: a[m] for m in means} == pytest.approx({m: b[m] for m in means}, rel=1e-6, abs=ATOL), step
    assert len({line["loss"] for line in want if "loss" in line}) > 1


@pytest.mark.parametrize("name", CELLS)
def test_trained_weights_equal_one_process(name, together, alone):
    got = load_file(together["folder"] / f"{name}.safetensors")
    tiny.assert_same_weights(got, alone(name)["weights"], ATOL)
    if name.startswith("full"):
        assert tiny.moved(tiny.weights(tiny.llama()), got) > 100 * ATOL


@pytest.mark.parametrize("name", ["full flat", "full padded", "lora flat accumulated", "aot", "bco_pair"])
def test_evaluation_counts_every_pair_once(name, together, alone):
    """7 rows, 2 ranks x 2: accelerate repeats the first row to fill the last batch."""
    want, got = alone(name), together["cells"][name]
    means = [f"eval_{mean}" for mean in MEANS]
    assert {m: got["eval"][m] for m in means} == pytest.approx({m: want["eval"][m] for m in means}, rel=1e-6, abs=ATOL)
    assert got["example_ids"] == want["example_ids"] == list(range(EVAL_ROWS))
    assert got["logps"] == pytest.approx(want["logps"], abs=1e-4)


def test_evaluation_of_a_stream_counts_every_pair_once(together, alone):
    want, got = alone("stream")["eval of the stream"], together["cells"]["stream"]["eval of the stream"]
    means = [f"eval_{mean}" for mean in MEANS]
    assert {m: got[m] for m in means} == pytest.approx({m: want[m] for m in means}, rel=1e-6, abs=ATOL)


def test_running_shift_counts_every_pair_once(together, alone):
    """bco_pair's delta, after 22 pairs and the 8 of the next epoch's first batch, gathered over the ranks."""
    want, got = alone("bco_pair")["state"]["delta"], together["cells"]["bco_pair"]["state"]["delta"]
    assert got["count"] == want["count"] == 30
    assert got["mean"] == pytest.approx(want["mean"], abs=ATOL)
    assert abs(want["mean"]) > 100 * ATOL


def test_aot_sorts_all_that_it_should(alone):
    """Sorting 8 pairs is not sorting 4 and 4, or the comparison of ranks above would show nothing."""
    whole, halves = alone("aot")["lines"][0]["loss"], alone("aot halves")["lines"][0]["loss"]
    assert abs(whole - halves) > 20 * ATOL


def test_nan_on_one_rank_stops_both(together):
    here, there = together["nan"]
    assert "on another rank" in here
    assert "example_ids [2]" in there


def test_a_signal_to_one_rank_stops_and_saves_on_both(together):
    assert together["stopped"] == [[2, True, ["checkpoint-2"]]] * 2


def test_a_bad_number_on_one_rank_leaves_the_step_out_on_both(alone):
    """That the two agree is asserted above; here, that there was something to agree on."""
    lines = alone("skipped step")["lines"]
    assert [line.get("skipped_steps") for line in lines] == [None, 1, 1]
