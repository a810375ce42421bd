"""One of two ranks that count what they say to each other: `torchrun --nproc_per_node 2 collectives_worker.py <folder>`.

Each run of `RUNS` yields {phase: {collective: times}} of this process; rank 0 writes those of both.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from dpo_trainer.metrics import METRICS

torch.set_num_threads(1)

PHASES = {
    "settle": "first batch of the run",
    "begin": "check of the reference",
    "training_step": "micro-batch",
    "_get_num_items_in_batch": "weight of the step",
    "verdict": "verdict on the step",
    "log": "our log line",
    "store_flos": "operations of transformers",
    "_maybe_log_save_evaluate": "loss of transformers",
}
"""Function -> phase. A collective belongs to the innermost of these that asked for it."""

WORDS = ("reduce", "gather", "broadcast", "scatter", "all_to_all", "alltoall", "barrier", "send", "recv")

STEPS, LINES = 4, 2
RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 4},
    "more metrics": {},
    "aot": {"loss_type": "aot"},
    "aot accumulated": {"loss_type": "aot", "gradient_accumulation_steps": 4},
}

counts: defaultdict[str, Counter[str]] = defaultdict(Counter)


def phase() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name in PHASES:
            return PHASES[frame.f_code.co_name]
        frame = frame.f_back  # type: ignore[assignment]
    return "before and after"


def count_calls(owner: Any) -> None:
    """Of every collective of a process group. All of Python comes by here, however it was imported; the C++ of DDP, which
    reduces gradients while backward runs, does not. Functional collectives, as sharded tensors use, are functions apart."""
    for name in dir(owner):
        plain = getattr(owner, name)
        if name[0] != "_" and callable(plain) and any(word in name for word in WORDS):
            setattr(owner, name, counting(name, plain))


def counting(name: str, plain: Any) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[phase()][name] += 1
        return plain(*args, **kwargs)

    return counted


@contextmanager
def more_metrics() -> Iterator[None]:
    with patch.dict(METRICS, {f"again/{number}": METRICS["loss"] for number in range(20)}):
        yield


def trained(folder: Path, name: str) -> dict[str, Any]:
    accumulation = RUNS[name].get("gradient_accumulation_steps", 1)
    rows = tiny.dataset(STEPS * accumulation * 4)
    how = {"per_device_train_batch_size": 2, "max_steps": STEPS, "logging_steps": STEPS // LINES, **RUNS[name]}
    made = tiny.trainer(folder, train=rows, **how)
    counts.clear()
    made.train()
    (line, *_) = tiny.log_lines(made)
    return {
        "counts": {name: dict(calls) for name, calls in counts.items()},
        "metrics": len(line),
        "engine": type(made.model_wrapped).__name__,
    }


def main(folder: Path) -> None:
    count_calls(dist.ProcessGroup)
    count_calls(functional)
    results = {}
    for name in RUNS:
        if name == "more metrics":
            with more_metrics():
                results[name] = trained(folder, name)
        else:
            results[name] = trained(folder, name)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, results)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(ranks))
    dist.barrier()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # native threads outlive the interpreter, and at times abort it
