"""Two ranks of one run share their output folder: both are refused where another process has it, and both know their run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from two_processes import torchrun

from dpo_trainer.checkpointing import hold_folder, run_of

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent


class Holder:
    pass


def test_ranks_share_a_folder(tmp_path):
    holder = Holder()
    hold_folder(tmp_path / "held", holder)
    torchrun(HERE / "folder_worker.py", tmp_path)
    ranks = [json.loads((tmp_path / f"rank {rank}.json").read_text()) for rank in (0, 1)]
    for said in ranks:
        assert f"Another run is using --output_dir {tmp_path / 'held'}: process {os.getpid()}" in said["held"]
    assert ranks[0]["free"] == ranks[1]["free"] == run_of(tmp_path / "free" / "checkpoint-2")
    del holder
