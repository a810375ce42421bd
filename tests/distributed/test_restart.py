"""Two workers under torch's own launcher, one of which dies: it restarts both, and the run ends as if nobody had died."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tiny
from safetensors.torch import load_file

from dpo_trainer.checkpointing import ASIDE, broken_file

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

HERE = Path(__file__).parent


class Run(NamedTuple):
    folder: Path
    lives: list[dict[str, Any]]  # one of each worker and life
    lines: list[dict[str, float]]
    moved: float  # the weight that went farthest


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Run, Run]:
    """(the run that died three times, the same run undisturbed)."""
    folder = tmp_path_factory.mktemp("restarts")
    kills = ["before the first checkpoint", "within a step", "within a checkpoint"]
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--max-restarts",
        str(len(kills)),
    ]
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
        # Else a restarted worker finds, in the launcher's store, the address of one that is dead, and fails or hangs: torch
        # 2.13, pytorch/pytorch#135712. The static rendezvous, which torchrun takes where none is named, has no such switch.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    command = [*launch, *rendezvous, str(HERE / "restart_worker.py"), str(folder), *kills]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stderr.count("exitcode: -9") == len(kills), done.stderr[-6000:]
    return read(folder / "killed"), read(folder / "whole")


def read(folder: Path) -> Run:
    lives = [json.loads(line) for line in (folder / "lives.jsonl").read_text().splitlines()]
    assert {life["ranks"] for life in lives} == {2}
    return Run(folder, lives, **json.loads((folder / "result.json").read_text()))


def begins(run: Run) -> dict[int, list[int]]:
    """{life: steps that were made before it, on each rank}. The life is torch's own count of restarts."""
    found: dict[int, list[int]] = {}
    for life in sorted(run.lives, key=lambda life: (life["life"], life["rank"])):
        found.setdefault(life["life"], []).append(life["begins after"])
    return found


def test_each_life_begins_at_the_newest_whole_checkpoint(runs):
    """Rank 1 dies in step 2, with no checkpoint yet; then in step 4; then rank 0, with checkpoint-4 written but not sealed."""
    killed, whole = runs
    assert begins(killed) == {0: [0, 0], 1: [0, 0], 2: [2, 2], 3: [2, 2]}
    assert begins(whole) == {3: [0, 0]}


def test_half_a_checkpoint_was_there_and_is_gone(runs):
    killed, _ = runs
    assert [life["unfinished"] for life in killed.lives if life["life"] == 3] == [["checkpoint-4"]] * 2
    out = killed.folder / "out"
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert not any(map(broken_file, out.glob("checkpoint-*")))
    assert not (out / ASIDE).exists()


def test_weights_are_those_of_the_undisturbed_run(runs):
    killed, whole = runs
    got, want = (load_file(run.folder / "weights.safetensors") for run in runs)
    # To the bit: a sum of two ranks has one order only, and all that is random is in the checkpoint.
    tiny.assert_same_weights(got, want)
    assert killed.moved == whole.moved > 0.01


def test_lines_are_those_of_the_undisturbed_run(runs):
    killed, whole = runs
    assert comparable(killed.lines) == comparable(whole.lines)
    assert [line["step"] for line in killed.lines] == [3, 6]


def comparable(lines: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]
