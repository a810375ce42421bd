"""One of the ranks: `torchrun --nproc_per_node 2 worker.py ENGINE FOLDER NEW_CHECKPOINTS CELL ...` runs these cells, and
writes what rank 0 saw."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import torch.distributed as dist
from cells import bad_rows, run
from engines import start
from tiny import dataset, trainer
from torch import Tensor
from transformers import TrainerCallback, set_seed

from dpo_trainer import DPOTrainer

torch.set_num_threads(1)


def engine_of(made: DPOTrainer) -> dict[str, str]:
    """What a wrong launch would not have; asserted by the test, for a wrong launch exits with 0."""
    plugin = made.accelerator.state.deepspeed_plugin
    return {
        "world_size": str(made.accelerator.num_processes),
        "distributed_type": made.accelerator.distributed_type.value,
        "wrapper": type(made.model_wrapped).__name__,
        "stage": "none" if plugin is None else str(plugin.zero_stage),
        "backend": dist.get_backend(),
    }


def share_of_weights(made: DPOTrainer) -> float:
    """Of the parameters of the policy, and of a reference model: how many this rank holds. 1.0 where nothing is cut."""
    models = [made.model, *(model for _, model in made.reference.own)]
    parameters = [parameter for model in models for parameter in model.parameters()]
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in parameters)
    return sum(_held(p) for p in parameters) / whole


def _held(parameter: Any) -> int:
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.numel()
    return parameter.to_local().numel() if hasattr(parameter, "to_local") else parameter.numel()


def bytes_held(folder: Path, engine: dict[str, Any]) -> dict[str, float]:
    """Bytes per parameter on this rank between two steps of Adam in bfloat16: weights, and what the optimizer keeps."""
    made = trainer(folder, max_steps=2, optim="adamw_torch", bf16=True, **engine)
    made.train()
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in made.model.parameters())
    optimizer = getattr(made.optimizer, "optimizer", made.optimizer)
    kept = [value for state in optimizer.state.values() for value in state.values()]
    kept += [p for p in _float32_weights(optimizer) if p is not None]
    return {
        "weights": sum(_held(p) * p.element_size() for p in made.model.parameters()) / parameters,
        # The counter of steps is one number per tensor.
        "optimizer": sum(_held(v) * v.element_size() for v in kept if isinstance(v, Tensor) and v.dim()) / parameters,
    }


def _float32_weights(optimizer: Any) -> list[Tensor]:
    """DeepSpeed's: of stages 1 and 2, or of stage 3."""
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return [part for name in names for part in getattr(optimizer, name, [])]


def stopped_by_nan(folder: Path, engine: dict[str, Any]) -> str:
    """Row 2 is bad; in batches of 2 it is on rank 1. The message of this rank."""
    made = trainer(
        folder,
        train=bad_rows(4, at=2),
        loss_type="nan_for_long_chosen",
        train_sampling_strategy="sequential",
        per_device_train_batch_size=2,
        max_steps=1,
        **engine,
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


def stopped_by_signal(folder: Path, rank: int, engine: dict[str, Any]) -> list[object]:
    """Rank 1 gets the signal. What this rank did: steps, whether it knows why, what lies on the disk."""
    callbacks = [Terminate()] if rank == 1 else []
    made = trainer(folder / "stopped", train=dataset(24), max_steps=5, parts={"callbacks": callbacks}, **engine)
    made.train()
    dist.barrier()
    saved = sorted(path.name for path in (folder / "stopped").glob("checkpoint-*"))
    return [made.state.global_step, made.stopped_by_signal, saved]


def gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def main(engine: str, folder: Path, names: list[str], *, write_checkpoint: bool) -> None:
    seen: dict[str, Any] = {"cells": {}, "engine": {}, "share": {}}

    def look(made: DPOTrainer) -> None:
        seen["engine"][name] = engine_of(made)
        seen["share"][name] = share_of_weights(made)

    ranks = int(os.environ["WORLD_SIZE"])
    for name in names:
        set_seed(0)
        # An exception ends this rank, and torchrun the other one, which would wait for it.
        seen["cells"][name] = run(
            name, folder, ranks, engine=start(engine), look=look, write_checkpoint=write_checkpoint
        )
    if ranks > 1:
        seen["held"] = bytes_held(folder, start(engine))
        seen["stopped"] = gathered(stopped_by_signal(folder, dist.get_rank(), start(engine)))
        seen["nan"] = gathered(stopped_by_nan(folder, start(engine)))
    if dist.get_rank() == 0:
        (folder / f"results of {ranks}.json").write_text(json.dumps(seen))
    dist.barrier()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(400, exit=True)  # ranks that wait for each other say where
    engine, folder, new, *names = sys.argv[1:]
    main(engine, Path(folder), names, write_checkpoint=new == "yes")
    # All is written. Leaving Python the usual way aborted in some 3 of 20 launches on a busy machine ("terminate called
    # without an active exception"): native threads outlive the interpreter. An exception above still ends with its own code.
    sys.stdout.flush()
    os._exit(0)
