"""Ranks on this machine, as torchrun starts them: gloo, one thread each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def torchrun(script: Path, *arguments: object, ranks: int = 2, timeout: float = 300) -> None:
    """Runs `script` on every rank until all have ended well. It finds `dpo_trainer`, and what tests share, of this tree.

    `timeout`: in seconds, for all of it. Ranks that wait for each other should say so before it is over.
    """
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"),
            *(str(script), *map(str, arguments)),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
