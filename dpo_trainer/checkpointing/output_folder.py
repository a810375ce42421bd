"""What an output folder holds when a run comes to it, and what the run makes of that: one run for each folder.

    folder = OutputFolder(path, ...)        when the trainer is made: what is there is of earlier runs
    folder.hold(trainer)                    train() begins, or the model is saved: no other process may
    record = folder.decide(checkpoint, ...) which run this is: a new one, or the one that wrote the checkpoint
    folder.begin(record, ...)               on all ranks
    folder.claim()                          the first step: the folder belongs to this run

Only the main process takes the folder, decides and claims.
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from . import (
    ASIDE,
    WEIGHTS,
    RunRecord,
    hold_folder,
    is_held_elsewhere,
    numbered,
    read_record,
    retire,
    run_of,
    step_of,
    surplus,
    write_record,
)

logger = logging.get_logger(__name__)

RESULTS = ("*_results.json", TRAINER_STATE_NAME, WEIGHTS)
"""Files of a run that has ended, which `Trainer` would add to or leave beside those of the next."""
LOADED_FILES = (
    "*model*.safetensors*",
    "*model*.bin*",
    "*config.json",
    "token*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*tokens*.json",
    "chat_template*",
)
"""Files from which a model, a tokenizer or a processor is loaded."""
EARLIER = "earlier_run_"

Signature = tuple[int, int, int]


class OutputFolder:
    """`output_dir` of a run."""

    def __init__(self, path: Path, *, force: bool, main: bool):
        """`force`: take the folder although another run has it. `main`: whether this is the main process."""
        self.path, self.force = path, force
        self.of_earlier_runs = {path: _signature(path) for path in self._matching((*RESULTS, *LOADED_FILES))}
        self.record = RunRecord()
        self.fresh, self.claimed = True, False
        if main and (holder := is_held_elsewhere(self.path)) is not None:
            logger.warning(
                f"Another run is using --output_dir {self.path}: {holder}. Two runs cannot train in one folder."
            )

    def hold(self, user: object) -> None:
        """Lock the folder for the process, as long as `user` lives.

        Raises:
            ValueError: another process holds it, and not `--force_output_dir`.
        """
        hold_folder(self.path, user, force=self.force)

    def decide(self, checkpoint: str | None, *, named: bool, goes_on: bool = False) -> RunRecord:
        """The run that begins anew, or goes on from `checkpoint`, which the user `named` or which is the last of its run.

        A run that `goes_on` (`auto`) and has no checkpoint to go on from is the same one, from its beginning: those that failed
        or are broken are its own, and make room.
        Where later checkpoints of that run are here, a run that goes on from a named one is another from there on: else
        `auto` would return to what came after.
        """
        if checkpoint is None and goes_on and (begun := read_record(self.path)) is not None:
            return begun
        if checkpoint is None:
            self._say_what_is_there()
            return RunRecord()
        run, step = run_of(Path(checkpoint)), _step_in(Path(checkpoint))
        if run is None:
            return RunRecord()
        there = read_record(self.path)
        record = there if there is not None and there.owns(Path(checkpoint), step) else RunRecord(run)
        later = any(step_of(path) > step and record.owns(path, step_of(path)) for path in numbered(self.path))
        return record.back_at(run, step) if named and later else record

    def begin(self, record: RunRecord, *, fresh: bool, shared: bool) -> None:
        """On all ranks. `shared`: with the other trials of a search, each of which has a folder inside this one."""
        self.record, self.fresh, self.claimed = record, fresh, shared

    def claim(self) -> None:
        """The run is about to make a step: the folder belongs to it from its first one. What would mix with it goes aside."""
        if self.claimed:
            return
        self.claimed = True
        try:
            if self.fresh:
                self._move_results_aside()
            write_record(self.path, self.record, self.path / ASIDE)
        except OSError as error:  # the first checkpoint says what to do about that disk
            logger.warning(
                f"{self.path} could not be marked as this run's ({error}): --resume_from_checkpoint auto may resume another run."
            )

    def own(self, run_folder: Path) -> list[Path]:
        """The checkpoints of this run in `run_folder`, highest number first."""
        return [path for path in numbered(run_folder) if self.record.owns(path, step_of(path))]

    def keep(self, run_folder: Path, limit: int | None, step: int, best: str | None) -> None:
        """At most `limit` checkpoints of this run, the best and the newest of them."""
        if limit is not None and limit > 0:
            for checkpoint in surplus(self.own(run_folder), limit, step, best):
                retire(checkpoint)

    def keep_only(self, run_folder: Path, best: str) -> None:
        """The best checkpoint of this run, where it is there."""
        own = self.own(run_folder)
        for checkpoint in own if Path(best) in own else []:
            if checkpoint != Path(best):
                retire(checkpoint)

    def warn_of_leftovers(self) -> None:
        """After the model was saved here: say which files that would be loaded with it are older than this run."""
        left = [path.name for path in self._left(LOADED_FILES)]
        if left:
            logger.warning(
                f"{self.path} holds the model now, and beside it {', '.join(left)} of another run, which would be loaded with it. "
                "Move what does not belong to the model away."
            )

    def _say_what_is_there(self) -> None:
        others = [path.name for path in reversed(numbered(self.path))]
        if others:
            names = others if len(others) < 5 else [*others[:2], "...", *others[-2:]]
            logger.warning(
                f"--output_dir {self.path} holds checkpoints of another run ({', '.join(names)}), and this run begins anew. They stay, "
                "except where it writes one of the same name; --save_total_limit does not count them, and "
                "--resume_from_checkpoint auto resumes this run from its first step on. To resume an earlier run, name one of its checkpoints; "
                "otherwise remove them, or give another --output_dir."
            )

    def _move_results_aside(self) -> None:
        old = self._left(RESULTS)
        if not old:
            return
        number = 1
        while (self.path / f"{EARLIER}{number}").exists():
            number += 1
        place = self.path / f"{EARLIER}{number}"
        place.mkdir()
        for path in old:
            path.rename(place / path.name)
        logger.warning(
            f"{', '.join(path.name for path in old)} of another run were moved from {self.path} to {place}."
        )

    def _left(self, patterns: tuple[str, ...]) -> list[Path]:
        """Files that were there before this trainer, and that it did not write since."""
        known = self.of_earlier_runs
        return [path for path in self._matching(patterns) if path in known and _signature(path) == known[path]]

    def _matching(self, patterns: tuple[str, ...]) -> list[Path]:
        found = {path for pattern in patterns for path in self.path.glob(pattern)}
        return sorted(path for path in found if path.is_file() and not path.name.startswith("_"))


def _step_in(checkpoint: Path) -> int:
    """That it was written after, whatever its folder is called; a checkpoint where that cannot be read is refused elsewhere."""
    try:
        return int(json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())["global_step"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return 0


def _signature(path: Path) -> Signature:
    state = path.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns
