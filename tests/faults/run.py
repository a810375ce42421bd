"""One training run that can be killed at any moment and started again, to end as if nothing had happened.

    python tests/faults/run.py <folder> [--lora]

Model and rows come from fixed seeds. Everything it leaves is in the folder: rows, the caches of tokens and of reference
log-probs, checkpoints, and at its end the model and result.json, in which two runs are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Before any library reads them. One thread: sums come out in one order, and a process without threads can be forked.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
    WANDB_MODE="disabled",
)
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import tiny
import torch
from datasets import Dataset
from torch import Tensor

from dpo_trainer import DPOTrainer

torch.set_num_threads(1)

STEPS = 9
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,  # 22 rows: 6 steps an epoch, the last one of 2 rows, so that epochs end on the way
    "optim": "adamw_torch",
    "lr_scheduler_type": "inverse_sqrt",  # never 0: a step too many would show in the weights
    "warmup_steps": 3,
    "max_grad_norm": 1.0,
    "loss_type": ["sigmoid", "bco_pair"],  # the second has a running mean, which a checkpoint must hold
    "precompute_ref_log_probs": True,
    "precompute_ref_max_tokens": 400,  # a fifth or so of the rows
    "logging_steps": 3,  # lines that begin before a checkpoint, and end after it
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
}


def train(folder: Path, *, lora: bool) -> None:
    """Begin the run, or go on with it."""
    trainer = DPOTrainer(
        model=tiny.llama(),
        args=tiny.config(
            folder / "out",
            learning_rate=1e-2 if lora else 1e-3,
            ref_cache_dir=str(folder / "references"),
            **OPTIONS,
        ),
        train_dataset=stored_rows(folder, "train", 22),
        eval_dataset=stored_rows(folder, "eval", 6),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora() if lora else None,
    )
    start = digest(tiny.weights(trainer.model))
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    result = {
        "steps": trainer.state.global_step,
        "start": start,
        "weights": digest(tiny.weights(trainer.model)),
        "lines": [comparable(line) for line in trainer.state.log_history if "train_runtime" not in line],
    }
    write_whole(folder / "result.json", json.dumps(result, indent=1))


def stored_rows(folder: Path, name: str, n: int) -> Dataset:
    """Rows from a file: what is tokenized from a file is cached beside it."""
    file = folder / f"{name}.jsonl"
    if not file.exists():
        rows = tiny.rows(n, seed=len(name))
        write_whole(file, "\n".join(map(json.dumps, rows)))
    return Dataset.from_json(str(file), cache_dir=str(folder / "tokens"))


def write_whole(file: Path, text: str) -> None:
    aside = file.with_suffix(".aside")
    aside.write_text(text)
    aside.replace(file)


def digest(weights: Mapping[str, Tensor]) -> str:
    """Of names and bits."""
    state = hashlib.sha256()
    for name in sorted(weights):
        state.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return state.hexdigest()


def comparable(line: Mapping[str, float]) -> dict[str, float]:
    """A line of the log without how long things took. (The last line, of the whole run, is about one process.)"""
    return {name: value for name, value in line.items() if not name.endswith(("runtime", "_per_second"))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--lora", action="store_true")
    given = parser.parse_args()
    train(given.folder, lora=given.lora)
