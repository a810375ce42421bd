"""One of the ranks: `torchrun --nproc_per_node 2 worker.py <folder>` runs every cell and writes what rank 0 saw."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.distributed as dist
from cells import CELLS, bad_rows, run
from tiny import dataset, trainer
from transformers import TrainerCallback, set_seed

from dpo_trainer import DPOTrainer

torch.set_num_threads(1)
engines: dict[str, str] = {}


def note_engine(made: DPOTrainer) -> None:
    """What a wrong launch would not have; asserted by the test, for a wrong launch exits with 0."""
    engines["world_size"] = str(made.accelerator.num_processes)
    engines["distributed_type"] = made.accelerator.distributed_type.value
    engines["engine"] = type(made.model_wrapped).__name__
    engines["backend"] = dist.get_backend()


def stopped_by_nan(folder: Path) -> str:
    """Row 2 is bad; in batches of 2 it is on rank 1. The message of this rank."""
    made = trainer(
        folder,
        train=bad_rows(4, at=2),
        loss_type="nan_for_long_chosen",
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        max_steps=1,
    )
    try:
        made.train()
    except FloatingPointError as error:
        return str(error)
    return "not stopped"


class Terminate(TrainerCallback):
    """This rank alone is told to stop, in its second step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stopped_by_signal(folder: Path, rank: int) -> list[object]:
    """Rank 1 gets the signal. What this rank did: steps, whether it knows why, what lies on the disk."""
    callbacks = [Terminate()] if rank == 1 else []
    made = trainer(folder / "stopped", train=dataset(24), max_steps=5, parts={"callbacks": callbacks})
    made.train()
    dist.barrier()
    saved = sorted(path.name for path in (folder / "stopped").glob("checkpoint-*"))
    return [made.state.global_step, made.stopped_by_signal, saved]


def main(folder: Path) -> None:
    results: dict[str, object] = {}
    for name in CELLS if not sys.argv[2:] else sys.argv[2:]:
        set_seed(0)
        # An exception ends this rank, and torchrun the other one, which would wait for it.
        results[name] = run(name, folder, int(os.environ["WORLD_SIZE"]), note_engine)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    errors: list[str | None] = [None] * ranks
    dist.all_gather_object(errors, stopped_by_nan(folder))
    stops: list[object] = [None] * ranks
    dist.all_gather_object(stops, stopped_by_signal(folder, rank))
    if rank == 0:
        seen = {"cells": results, "engine": engines, "nan": errors, "stopped": stops}
        (folder / "results.json").write_text(json.dumps(seen))
    dist.barrier()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(300, exit=True)  # ranks that wait for each other say where
    main(Path(sys.argv[1]))
    # All is written. Leaving Python the usual way aborted in some 3 of 20 launches on a busy machine ("terminate called
    # without an active exception"): native threads outlive the interpreter. An exception above still ends with its own code.
    sys.stdout.flush()
    os._exit(0)
