"""What two ranks say to each other: nothing in a micro-batch, two sums in a step, one in a log line, whatever is logged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from two_processes import torchrun

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
STEPS, LINES = 4, 2  # as in collectives_worker.py, which sets the environment of a rank where it is imported


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    """Of each rank: {run: {"counts": {phase: {collective: times}}, ...}}."""
    folder = tmp_path_factory.mktemp("collectives")
    torchrun(HERE / "collectives_worker.py", folder)
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(params=[0, 1], ids=["rank 0", "rank 1"])
def runs(request, ranks) -> dict[str, Any]:
    assert len(ranks) == 2
    assert {run["engine"] for run in ranks[request.param].values()} == {"DistributedDataParallel"}
    return ranks[request.param]


@pytest.mark.parametrize("name", ["plain", "accumulated", "more metrics"])
def test_micro_batches_issue_no_collective(name, runs):
    assert "micro-batch" not in runs[name]["counts"]


@pytest.mark.parametrize("name", ["plain", "accumulated", "more metrics", "aot", "aot accumulated"])
def test_steps_and_log_lines_issue_a_fixed_number(name, runs):
    counts = {phase: calls for phase, calls in runs[name]["counts"].items() if phase != "micro-batch"}
    del counts["before and after"]
    assert counts == {
        "first batch of the run": {"allreduce": 2},  # log-probs and gradients of the layout, one verdict for all
        "check of the reference": {"allreduce": 1},  # with the first batch: one verdict for all
        # Together with how many pairs each rank has, where a loss gathers them.
        "weight of the step": {"allgather" if name.startswith("aot") else "allreduce": STEPS},
        "verdict on the step": {"allreduce": STEPS},
        "our log line": {"allreduce": LINES + 1},  # and in the one that ends the run
        "loss of transformers": {"allgather": LINES},  # which our mean over pairs then replaces
        "operations of transformers": {"allgather": LINES + 1},  # and at the end of the run
    }


@pytest.mark.parametrize("name", ["accumulated", "more metrics"])
def test_nothing_else_depends_on_micro_batches_or_metrics(name, runs):
    assert runs[name]["counts"] == runs["plain"]["counts"]
    assert runs["more metrics"]["metrics"] == runs["plain"]["metrics"] + 20


@pytest.mark.parametrize(("name", "accumulation"), [("aot", 1), ("aot accumulated", 4)])
def test_a_collective_in_a_micro_batch_is_seen(name, accumulation, runs):
    """The control: `aot` gathers margins in every micro-batch. It knows by then how many there are, and waits for no number."""
    assert runs[name]["counts"]["micro-batch"] == {"allgather": STEPS * accumulation}
