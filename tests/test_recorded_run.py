"""A checkpoint and a cache of log-probs that an earlier version wrote: resumed, and found."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest
import tiny

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.append(str(FIXTURES))

from record_run import SAVED, STEPS, trainer


@pytest.fixture
def recorded(tmp_path):
    with tarfile.open(FIXTURES / "recorded_run.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_checkpoint_of_an_earlier_version_is_resumed(recorded):
    """Losses within 1e-4 of those recorded: the same numbers, on a processor that may add in another order."""
    made = trainer(recorded)
    made.train(resume_from_checkpoint="auto")
    assert made.state.global_step == STEPS
    losses = json.loads((recorded / "losses.json").read_text())
    assert tiny.losses(made) == pytest.approx(losses, abs=1e-4)
    assert losses[SAVED] != pytest.approx(losses[0], abs=1e-3), "a run that began anew would show"


def test_log_probs_of_an_earlier_version_are_found(recorded):
    (filled,) = trainer(recorded).precompute_reference()
    assert (filled.found, filled.computed) == (44, 0)
