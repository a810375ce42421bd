"""A run that says in a file what it is about to do, and takes its time over it, so that a kill can be aimed.

Each line is "+part" where a part of the run begins, or "-part" where it ends; parts lie within parts. A part is called
"phase" or "phase:detail".
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import run

from dpo_trainer.checkpointing import atomic, folders
from dpo_trainer.data import prepare
from dpo_trainer.data.mapping import PairMapper
from dpo_trainer.online.rollout import Rollout
from dpo_trainer.reference import precompute
from dpo_trainer.reference.cache import store
from dpo_trainer.reference.cached import CachedReference

PHASES = ("tokenization", "precompute", "sampling", "feedback", "step", "eval", "save")


class Announcer:
    """Writes to a file in one system call a line: what was written before a kill stays, and no line is torn."""

    def __init__(self, file: Path, pause: float):
        self.descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.pause = pause  # seconds, as a part begins, and again as it ends

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        os.write(self.descriptor, f"+{name}\n".encode())
        time.sleep(self.pause)
        yield
        time.sleep(self.pause)
        os.write(self.descriptor, f"-{name}\n".encode())

    def wrap(self, owner: Any, function: str, name: str) -> None:
        original = getattr(owner, function)

        @functools.wraps(original)
        def announced(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, function, announced)


def announce_phases(file: Path, pause: float) -> None:
    """For this process, for good. Only times change, and in how many pieces the work is done."""
    prepare.BATCH = 8  # rows
    precompute.FLUSH_SECONDS = 0.0  # each pack of rows is kept at once
    announcer = Announcer(file, pause)
    wrap = announcer.wrap

    wrap(run, "stored_rows", "tokenization:read")
    wrap(PairMapper, "__call__", "tokenization:map")

    wrap(precompute.Precompute, "__call__", "precompute")
    wrap(CachedReference, "compute", "precompute:forward")
    store.transaction = slow_commit(store.transaction, announcer)

    wrap(Rollout, "sampled", "sampling")
    wrap(Rollout, "scored", "feedback")

    wrap(run.DPOTrainer, "training_step", "step:micro-batch")
    wrap(run.DPOTrainer, "evaluation_loop", "eval")
    wrap(run.DPOTrainer, "prediction_step", "eval:batch")

    wrap(run.DPOTrainer, "_save_checkpoint", "save")
    wrap(run.DPOTrainer, "save_model", "save:model")  # of a checkpoint, and at the end
    wrap(run.DPOTrainer, "_save_optimizer_and_scheduler", "save:optimizer")
    wrap(atomic, "write_state", "save:state")
    wrap(atomic, "seal", "save:seal")
    wrap(atomic, "publish", "save:publish")
    wrap(folders, "sync", "save:publish")  # right behind the rename
    shutil.rmtree = slow_removal(announcer)  # type: ignore[assignment]


def slow_commit(transaction: Callable, announcer: Announcer) -> Callable:
    """Records are in the file's journal, and not yet in the file."""

    @contextlib.contextmanager
    def slow(db: Any, path: Path, kind: str) -> Iterator[Any]:
        with transaction(db, path, kind) as inside:
            yield inside
            if kind == "IMMEDIATE":
                with announcer.part("precompute:commit"):
                    pass

    return slow


def slow_removal(announcer: Announcer) -> Callable:
    """Of a checkpoint: half of its files, and later the other half."""
    rmtree = shutil.rmtree

    def remove(path: str | Path, *args: Any, **kwargs: Any) -> None:
        if Path(path).name.startswith("checkpoint-"):
            files = sorted(Path(path).iterdir())
            for file in files[: len(files) // 2]:
                file.unlink()
            with announcer.part("save:remove"):
                pass
        rmtree(path, *args, **kwargs)

    return remove


def begun(lines: list[str], phase: str) -> int:
    """How many parts of a phase have begun."""
    return sum(line[0] == "+" and phase_of(line[1:]) == phase for line in lines)


def innermost(lines: list[str]) -> str:
    """The part that had begun last and not ended."""
    inside: list[str] = []
    for line in lines:
        if line[0] == "+":
            inside.append(line[1:])
        else:
            assert inside.pop() == line[1:], "parts lie within parts"
    return inside[-1] if inside else "between"


def phase_of(part: str) -> str:
    return part.partition(":")[0]
