"""One worker of a run that kills itself: `torchrun --nproc_per_node 2 --max-restarts N restart_worker.py <folder> <kill> ...`

The n-th kill (from `KILLS`) ends the n-th life. When none is left the run comes to its end, and then makes itself anew in
another folder, from the first step on and undisturbed. Each of the two folders, killed/ and whole/, has a line in lives.jsonl
for what each life found as it began, and the end in result.json and weights.safetensors.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import TrainerCallback

from dpo_trainer import DPOTrainer
from dpo_trainer.checkpointing import ASIDE, atomic

torch.set_num_threads(1)

STEPS = 8
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,  # 22 rows: 6 steps an epoch, the last one of 2 rows
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "inverse_sqrt",  # never 0: a step too many would show in the weights
    "warmup_steps": 3,
    "max_grad_norm": 1.0,
    "loss_type": ["sigmoid", "bco_pair"],  # the second has a running mean over all ranks
    "logging_steps": 3,  # lines that begin before a checkpoint, and end after it
    "save_strategy": "steps",
    "save_steps": 2,
}


class Kill(NamedTuple):
    """`rank` dies in the step after `made` steps, between its two micro-batches; or as it saves after `made` steps."""

    rank: int
    made: int
    saving: bool = False


KILLS = {
    "before the first checkpoint": Kill(rank=1, made=1),
    "within a step": Kill(rank=1, made=3),
    "within a checkpoint": Kill(rank=0, made=4, saving=True),
}


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("survived")


class Mortal(DPOTrainer):
    kill: Kill | None = None  # of this worker, in this life

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        kill, between = self.kill, not self.accelerator.sync_gradients
        if kill and not kill.saving and between and self.state.global_step == kill.made:
            die()
        return loss


def die_when_sealing(kill: Kill) -> None:
    """All files of the checkpoint are written, and none is known to be whole."""
    plain = atomic.seal

    def seal(folder: Path, run: str) -> None:
        if folder.name == f"checkpoint-{kill.made}":
            die()
        plain(folder, run)

    atomic.seal = seal  # type: ignore[assignment]


class NoteLife(TrainerCallback):
    """Where this life begins, and what the one before has left."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.left = sorted(path.name for path in (folder / "out" / ASIDE).glob("*"))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = {
            "life": int(os.environ["TORCHELASTIC_RESTART_COUNT"]),
            "rank": int(os.environ["RANK"]),
            "ranks": args.world_size,
            "begins after": state.global_step,
            "unfinished": self.left,
        }
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "lives.jsonl").open("a") as lines:
            lines.write(json.dumps(found) + "\n")


def run(folder: Path, kill: Kill | None) -> None:
    note = NoteLife(folder)
    dist.barrier()  # both have looked before one begins to write
    made = Mortal(
        model=tiny.llama(),
        args=tiny.config(folder / "out", **OPTIONS),
        train_dataset=tiny.dataset(22),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora(lora_dropout=0.1),  # so that the random numbers of each rank matter
        callbacks=[note],
    )
    if kill and kill.rank == made.args.process_index:
        made.kill = kill
        if kill.saving:
            die_when_sealing(kill)
    start = tiny.weights(made.model)
    made.train(resume_from_checkpoint="auto")
    if made.is_world_process_zero():
        save_file(tiny.weights(made.model), folder / "weights.safetensors")
        lines = [line for line in made.state.log_history if "train_runtime" not in line]
        moved = tiny.moved(start, tiny.weights(made.model))
        (folder / "result.json").write_text(json.dumps({"lines": lines, "moved": moved}))


def main(folder: Path, kills: list[str]) -> None:
    life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    run(folder / "killed", KILLS[kills[life]] if life < len(kills) else None)
    run(folder / "whole", None)
    dist.barrier()


if __name__ == "__main__":
    faulthandler.dump_traceback_later(120, exit=True)
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # native threads outlive the interpreter, and at times abort it
