"""Two ranks train as one process does, also where one of them has nothing but ties, and stop together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import two_ranks
from two_processes import torchrun

from dpo_trainer.online.metrics import ONLINE_METRICS, TALLIED

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
ATOL = 1e-5  # float32: two ranks add in another order


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("two")
    torchrun(HERE / "two_ranks.py", folder)
    both = json.loads((folder / "results.json").read_text())
    assert len(both) == 2
    return both


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    return two_ranks.run(tmp_path_factory.mktemp("one"), 1)


def test_weights_and_every_metric_are_those_of_one_process(ranks, alone):
    names = {*ONLINE_METRICS, *TALLIED} - {"aux_loss"}
    compared = 0
    for got, want in zip(ranks[0]["plain"]["lines"], alone["lines"], strict=True):
        for name in [*names, *(f"eval_{name}" for name in names)]:
            if name in want:
                assert got[name] == pytest.approx(want[name], abs=ATOL, rel=ATOL), name
                compared += 1
    assert compared > 60
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(
            torch.tensor(ranks[0]["plain"]["weights"][name]), torch.tensor(weight), rtol=0, atol=ATOL
        )
    assert ranks[0]["plain"]["weights"] == ranks[1]["plain"]["weights"]


def test_a_step_of_ties_alone_moves_nothing_and_hangs_nobody(alone):
    first, second = alone["lines"][:2]
    assert first["tie_rate"] == 1
    assert first["grad_norm"] == 0
    assert second["tie_rate"] == 0
    assert second["grad_norm"] > 0


def test_held_out_prompts_count_once(alone):
    """Five prompts on two ranks: the sixth row repeats one. Four of them tie, as do their first answers with the reference's."""
    evaluated = next(line for line in alone["lines"] if "eval_loss" in line)
    assert evaluated["eval_tie_rate"] == pytest.approx(4 / 5)
    assert evaluated["eval_win_rate"] == pytest.approx(0.5)
    assert evaluated["eval_completions/length"] == pytest.approx(3)  # 2, 3 and 4 tokens with their end


def test_both_stop_when_one_is_not_answered(ranks):
    """Prompt 7 is in the second step: the first is saved, by both, and only one of them knows why."""
    said = sorted(rank["down"]["said"] for rank in ranks)
    assert all("saved at step 1" in text and "--resume_from_checkpoint auto" in text for text in said)
    assert sum("Down for good." in text for text in said) == 1
