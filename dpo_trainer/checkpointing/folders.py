"""From a folder aside to the folder of that name, and back to the last one that is complete."""

from __future__ import annotations

import logging
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path

from .failed import failure
from .manifest import MANIFEST, broken_file, run_of, sync
from .run_record import read_record

logger = logging.getLogger(__name__)

ASIDE = ".incomplete"  # folder in output_dir where a checkpoint is written before it has its name
NAME = re.compile(r"checkpoint-([0-9]+)")


def fresh_aside(output_dir: Path, name: str) -> Path:
    """An empty folder in which to write the checkpoint `name`. What killed runs left unfinished is removed.

    One checkpoint at a time: an unfinished one of another name is taken for such a leftover.
    """
    recover(output_dir)
    remove(output_dir / ASIDE)
    aside = output_dir / ASIDE / name
    aside.mkdir(parents=True)
    return aside


def publish(aside: Path, final: Path) -> None:
    """Give a sealed folder (of `fresh_aside`) its name, synced. What has the name is moved aside first, and removed after."""
    if not (aside / MANIFEST).is_file():
        raise ValueError(f"{aside} has no {MANIFEST}: seal it before it is published.")
    old = final.parent / ASIDE / f"{final.name}.old"
    if os.path.lexists(final):
        final.rename(old)
    try:
        aside.rename(final)
    except BaseException:
        recover(final.parent)
        raise
    sync(final.parent)
    sync(aside.parent)
    discard(old)


def retire(checkpoint: Path) -> None:
    """Remove a checkpoint: its name first, in one rename, so that no kill leaves half of it under its name."""
    gone = checkpoint.parent / ASIDE / f"{checkpoint.name}.gone"
    gone.parent.mkdir(exist_ok=True)
    remove(gone)
    checkpoint.rename(gone)
    discard(gone)


def tidy(output_dir: Path) -> None:
    """Remove what killed runs left unfinished."""
    recover(output_dir)
    remove(output_dir / ASIDE)


def recover(output_dir: Path) -> None:
    """Finish a replacement that was cut off within `publish`: the old folder gets its name back, or goes."""
    for old in sorted((output_dir / ASIDE).glob("*.old")):
        final = output_dir / old.stem
        if os.path.lexists(final):
            discard(old)
            continue
        old.rename(final)
        sync(output_dir)
        logger.warning(f"{final} was about to be replaced when its run ended: the one from before has its name again.")


def last_complete_checkpoint(output_dir: Path, needs: str | None = None) -> Path | None:
    """The usable checkpoint-N of the highest N; others are skipped with a warning. None if there is none.

    Usable are those of the run that the folder belongs to which are whole, did not fail at once and have the file `needs`. For
    the main process alone: it reads whole checkpoints, and may give one its name back (`recover`).
    """
    recover(output_dir)
    own = of_this_run(output_dir)
    for checkpoint in numbered(output_dir):
        reason = _unusable(checkpoint, needs, own=checkpoint in own)
        if reason is None:
            return checkpoint
        logger.warning(f"{checkpoint} is skipped: {reason}.")
    return None


def _unusable(checkpoint: Path, needs: str | None, *, own: bool) -> str | None:
    if not own and run_of(checkpoint) is not None:  # where that cannot be read, it is broken
        return "it belongs to an earlier run in this folder; to resume that run, name this checkpoint"
    reason = failure(checkpoint) or broken_file(checkpoint)
    if reason is None and needs is not None and not (checkpoint / needs).is_file():
        reason = f"it has no {needs}: it was written with --save_only_model, and holds only a model"
    return reason


def checked_checkpoint(path: str | Path, force: bool = False) -> Path:
    """The checkpoint that the user named. ValueError if it is no folder, or broken and not `force`d.

    For the main process alone, as `last_complete_checkpoint`.
    """
    checkpoint = Path(path).expanduser()
    if not os.path.lexists(checkpoint):
        recover(checkpoint.parent)
    reason = broken_file(checkpoint)
    if reason is None:
        return checkpoint
    if force and checkpoint.is_dir():
        logger.warning(f"{checkpoint} is used, as --force_resume asks for, though {reason}.")
        return checkpoint
    there = numbered(checkpoint) or numbered(checkpoint.parent)
    complete = [str(other) for other in there if other != checkpoint and broken_file(other) is None]
    raise ValueError(
        f"{checkpoint} is not a checkpoint to resume from: {reason}. "
        + (f"Complete ones: {', '.join(complete)}." if complete else "There is no complete one beside it either.")
        + (" --force_resume uses it as it is." if checkpoint.is_dir() else "")
    )


def names_a_folder(asked: str | bool | None) -> bool:
    """Whether `resume_from_checkpoint` says which checkpoint, and does not leave that to `checkpoint_to_resume`."""
    return str(asked).lower() not in ("none", "false", "auto", "true")


def checkpoint_to_resume(
    asked: str | bool | None, output_dir: str, *, force: bool, needs: str | None = None
) -> str | None:
    """The folder to resume from, whole; None for a fresh start. `needs`: a file without which none is resumed.

    Raises:
        ValueError: for a folder that is broken or none, and where "true" finds nothing.
    """
    word = str(asked).lower()
    if word in ("none", "false"):
        return None
    if names_a_folder(asked):
        return str(checked_checkpoint(asked, force))  # type: ignore[arg-type]  # neither None nor a bool
    found = last_complete_checkpoint(Path(output_dir), needs)
    if found is None and word == "true":
        raise ValueError(
            f"--resume_from_checkpoint true: there is no complete checkpoint in {output_dir!r} that this run can go on from"
            f"{_why_none(Path(output_dir), needs)}. Say auto to begin where there is none yet, or name the folder of one."
        )
    none = f"No checkpoint in {output_dir!r} yet" if not numbered(Path(output_dir)) else "None can be resumed"
    logger.warning(f"Resuming from {found}." if found else f"{none}: starting fresh.")
    return None if found is None else str(found)


def _why_none(output_dir: Path, needs: str | None) -> str:
    own = of_this_run(output_dir)
    return "".join(f" ({each.name}: {_unusable(each, needs, own=each in own)})" for each in numbered(output_dir)[:1])


def numbered(output_dir: Path) -> list[Path]:
    """All that is called checkpoint-N, highest N first: the one order of checkpoints. Times of files say when one was copied."""
    if not output_dir.is_dir():
        return []
    found = [path for path in output_dir.iterdir() if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (step_of(path), path), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The N of checkpoint-N."""
    return int(checkpoint.name.rpartition("-")[2])


def of_this_run(output_dir: Path) -> list[Path]:
    """Those of the run that began or was resumed last in `output_dir`, highest N first; all of them where no run left its record."""
    record = read_record(output_dir)
    return [path for path in numbered(output_dir) if record is None or record.owns(path, step_of(path))]


def surplus(own: list[Path], limit: int, step: int, best: str | None) -> list[Path]:
    """Which checkpoints are too many for `limit`, of those of a run that is at `step`, highest N first.

    The best one and the newest one of a step that was made stay. Those that failed at once are the first to go, and then those of
    later steps: the run was resumed from an earlier one, for they are broken or hold only a model.
    """
    order = sorted(own, key=lambda path: (failure(path) is not None, step_of(path) > step))  # stable
    spared = {*order[:1], *(path for path in order if str(path) == best)}
    others = [path for path in order if path not in spared]
    return others[max(0, limit - len(spared)) :][::-1]


def remove(path: Path) -> None:
    """A file, a link or a whole folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Remove what is not needed any more, and ASIDE with the last of it. If that fails, only disk space is lost."""
    try:
        remove(path)
    except OSError as error:
        logger.warning(f"{path} could not be removed ({error}): remove it to have its space back.")
    with suppress(OSError):  # not there, or not empty
        path.parent.rmdir()
