"""One training run that can be killed at any moment and started again, to end as if nothing had happened.

    python tests/faults/run.py <folder> --kind full
    torchrun --nproc_per_node 2 tests/faults/run.py <folder> --kind two_ranks

Model and rows come from fixed seeds. Everything it leaves is in the folder: rows, the caches of tokens and of reference
log-probs, checkpoints, and at its end the model and result.json, in which two runs are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

# Before any library reads them. One thread: sums come out in one order, and a process without threads can be forked.
os.environ.update(
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",
    WANDB_MODE="disabled",
)
TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "online"), str(TESTS.parent)]

import online_tiny
import tiny
import torch
from datasets import Dataset
from torch import Tensor

from dpo_trainer import DPOTrainer
from dpo_trainer.online.feedback.llm_judge import LLMJudge

torch.set_num_threads(1)

STEPS = 9
JUDGE = "FAULTS_JUDGE"  # environment variable with the address of the judge's server
OPTIONS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,  # 22 rows: 6 steps an epoch, the last one of 2 rows, so that epochs end on the way
    "learning_rate": 1e-3,
    "optim": "adamw_torch",
    "lr_scheduler_type": "inverse_sqrt",  # never 0: a step too many would show in the weights
    "warmup_steps": 3,
    "max_grad_norm": 1.0,
    "loss_type": ["sigmoid", "bco_pair"],  # the second has a running mean, which a checkpoint must hold
    "logging_steps": 3,  # lines that begin before a checkpoint, and end after it
    "eval_strategy": "steps",
    "eval_steps": 3,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
}
PASSING = re.compile(r"runtime|_per_second|_time$|^sampling|llm/")
"""Metrics that say how long something took, or what one process asked of a judge. (Another finds the verdicts on disk.)"""


def offline(
    folder: Path, *, lora: bool = False, streaming: bool = False, cached: bool = False, **options: Any
) -> DPOTrainer:
    if cached:
        options |= {"precompute_ref_log_probs": True, "ref_cache_dir": str(folder / "references")}
        options.setdefault("precompute_ref_max_tokens", 400)  # a fifth or so of the rows
    train = stored_rows(folder, "train", 22)
    return DPOTrainer(
        model=tiny.llama(),
        args=tiny.config(folder / "out", **{**OPTIONS, **options}),
        train_dataset=train.to_iterable_dataset() if streaming else train,
        eval_dataset=stored_rows(folder, "eval", 6),
        processing_class=tiny.tokenizer(),
        peft_config=tiny.lora() if lora else None,
    )


def online(folder: Path, **options: Any) -> DPOTrainer:
    """Samples its answers; a function or a judge compares them."""
    return online_tiny.trainer(
        folder / "out",
        train=Dataset.from_list(online_tiny.rows(22)),
        parts={"eval_dataset": Dataset.from_list(online_tiny.rows(6)), "peft_config": tiny.lora()},
        **{**OPTIONS, "learning_rate": 1e-2, "generate_every": 2, **options},
    )


def judged(folder: Path) -> DPOTrainer:
    """By a server, whose verdicts are kept in the folder."""
    return online(
        folder, judge=LLMJudge(model="m", base_url=os.environ[JUDGE], cache_dir=str(folder / "verdicts"), swap=False)
    )


class Kind(NamedTuple):
    build: Callable[[Path], DPOTrainer]
    phases: dict[str, int]
    """Where it is killed: up to which occurrence of a phase within one process. A run that ends before it has ended."""
    ranks: int = 1


TRAINS = {"step": 14, "eval": 6, "save": 24}
READS = {"tokenization": 5, **TRAINS}
SAMPLES = {"sampling": 6, "feedback": 6, **TRAINS}

KINDS = {
    "full": Kind(partial(offline, cached=True), {"precompute": 10, **READS}),
    "lora": Kind(partial(offline, lora=True, learning_rate=1e-2, cached=True), {"precompute": 10, **READS}),
    "moving": Kind(partial(offline, sync_ref_model=True, ref_model_sync_steps=2), READS),
    "stream": Kind(partial(offline, streaming=True), TRAINS),
    "two_ranks": Kind(
        partial(offline, cached=True, gradient_accumulation_steps=1, precompute_ref_max_tokens=200),
        {"precompute": 5, "step": 9, "eval": 4, "save": 24},
        ranks=2,
    ),
    "online": Kind(online, SAMPLES),
    "judge": Kind(judged, SAMPLES),
}


def train(folder: Path, kind: str) -> None:
    """Begin the run, or go on with it."""
    trainer = KINDS[kind].build(folder)
    start = digest(tiny.weights(trainer.model))
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model()
    result = {
        "steps": trainer.state.global_step,
        "start": start,
        "weights": digest(tiny.weights(trainer.model)),
        "lines": [comparable(line) for line in trainer.state.log_history if "train_runtime" not in line],
    }
    if trainer.is_world_process_zero():
        write_whole(folder / "result.json", json.dumps(result, indent=1))


def stored_rows(folder: Path, name: str, n: int) -> Dataset:
    """Rows from a file: what is tokenized from a file is cached beside it."""
    file = folder / f"{name}.jsonl"
    if not file.exists():
        rows = tiny.rows(n, seed=len(name))
        write_whole(file, "\n".join(map(json.dumps, rows)))
    return Dataset.from_json(str(file), cache_dir=str(folder / "tokens"))


def write_whole(file: Path, text: str) -> None:
    aside = file.with_suffix(f".aside{os.environ.get('RANK', '')}")
    aside.write_text(text)
    aside.replace(file)


def digest(weights: Mapping[str, Tensor]) -> str:
    """Of names and bits."""
    state = hashlib.sha256()
    for name in sorted(weights):
        state.update(name.encode() + weights[name].contiguous().numpy().tobytes())
    return state.hexdigest()


def comparable(line: Mapping[str, float]) -> dict[str, float]:
    """What a log line says of the run. (The last line, of the whole run, is about one process.)"""
    return {name: value for name, value in line.items() if not PASSING.search(name)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=KINDS, default="full")
    given = parser.parse_args()
    train(given.folder, given.kind)
