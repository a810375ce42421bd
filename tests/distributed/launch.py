"""Both sides of a comparison: the cells on several ranks of an engine, and in one process that has the whole batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from cells import run, trained_weights
from torch import Tensor
from transformers import set_seed
from two_processes import torchrun

from dpo_trainer.metrics import METRICS

HERE = Path(__file__).parent

# float32: the sums of two ranks are added in another order. Worst seen 2.4e-7 in a loss, 2.1e-7 of any mean and 1.2e-7 in a
# weight; weights move by more than a hundred times the tolerance (asserted by the tests).
ATOL = 1e-5

# bfloat16: engines round in other places. Worst seen 1.1e-2, of a margin.
ATOL_BF16 = 3e-2

# Of a log line: means over pairs and tokens. (Tokens that only fill a batch are computed, so `num_tokens` counts them.)
MEANS = [name for name in METRICS if name != "aux_loss"]


def together(
    engine: str, folder: Path, names: Sequence[str], *, ranks: int = 2, write_checkpoint: bool = True
) -> dict[str, Any]:
    """What rank 0 saw: one launch for all cells. `folder` has what was saved."""
    how = [engine, folder, "yes" if write_checkpoint else "no"]
    torchrun(HERE / "worker.py", *how, *names, ranks=ranks, timeout=500)
    return json.loads((folder / f"results of {ranks}.json").read_text())


class Alone:
    """The same cells in this process, each once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.of = cache(self._run)

    def _run(self, name: str) -> dict[str, Any]:
        set_seed(0)
        return run(name, self.folder, 1)

    def weights(self, name: str) -> dict[str, Tensor]:
        self.of(name)
        return trained_weights(name, self.folder)


def tolerance(name: str) -> float:
    return ATOL_BF16 if "bf16" in name else ATOL


def differences(got: dict[str, Any], want: dict[str, Any]) -> list[dict[str, float]]:
    """Of each log line, by metric: how far the two are apart, in units of 1 + the size of the number.

    Without the accuracy where all margins are about zero, as in a first step: the last digit decides it there.
    """
    apart = []
    for a, b in zip(got["lines"], want["lines"], strict=True):
        tied = abs(b.get("rewards/margins", 1.0)) < ATOL
        means = [mean for mean in MEANS if mean in b and not (tied and mean == "rewards/accuracies")]
        apart.append({mean: abs(a[mean] - b[mean]) / (1 + abs(b[mean])) for mean in means})
    return apart


def farthest(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest difference of two sets of weights of the same names."""
    assert got.keys() == want.keys()
    return max((got[name].float() - want[name].float()).abs().max().item() for name in want)
