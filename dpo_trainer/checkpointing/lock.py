"""One run at a time in an output folder."""

from __future__ import annotations

import json
import logging
import os
import socket
import weakref
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

# `Trainer` uploads no file whose name begins with an underscore.
LOCK = "_run.lock"
"""Locked by the system (flock), which lets go of it with the process, however that ends. The file itself stays."""
HOLDER = "_run.holder.json"
"""Who locked it last."""
PATIENCE = 1.0
"""Seconds: another process may just look whether the folder is free (`is_held_elsewhere`)."""

_held: weakref.WeakValueDictionary[tuple[int, str], FileLock] = weakref.WeakValueDictionary()
"""By process, for a forked one holds nothing, and folder. The trainers of one process share its lock."""


def hold_folder(folder: Path, user: object, *, force: bool = False) -> None:
    """Lock `folder` for this process, until `user` and all others that hold it here are gone, or the process is.

    Where the file system knows no locks, filelock writes a lease; where that fails too, a warning. `force`: so does what
    another process holds.

    Raises:
        ValueError: another process holds it; says which.
    """
    where = (os.getpid(), str(folder.resolve()))
    lock = _held.get(where)
    if lock is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder.resolve() / LOCK, thread_local=False)
            lock.acquire(timeout=PATIENCE)
            (folder / HOLDER).write_text(json.dumps(_this_process()))
        except Timeout:
            _refuse_or_warn(folder, force)
            return
        except OSError as error:
            logger.warning(f"{folder} cannot be locked ({error}): see to it that no other run writes there.")
            return
        _held[where] = lock
    weakref.finalize(user, _let_go, lock)


def is_held_elsewhere(folder: Path) -> str | None:
    """The process that has a run in `folder`, in words, unless it is this one; None where there is none."""
    path = folder.resolve() / LOCK
    if (os.getpid(), str(folder.resolve())) in _held or not path.is_file():
        return None
    try:
        with FileLock(path, thread_local=False).acquire(timeout=0):
            return None
    except Timeout:
        return _holder(folder)
    except OSError:
        return None


def _let_go(lock: FileLock) -> None:
    """Nothing: the lock is released with the last reference to it, of which this call had one."""


def _refuse_or_warn(folder: Path, force: bool) -> None:
    problem = f"Another run is using --output_dir {folder}: {_holder(folder)}."
    if not force:
        raise ValueError(
            f"{problem} Two runs would overwrite each other's checkpoints. Wait until it has ended or end it, give another "
            "--output_dir, or say --force_output_dir true."
        )
    logger.warning(f"{problem} --force_output_dir: going on. What the two save can be a mix of both.")


def _this_process() -> dict[str, Any]:
    started = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": started}


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / HOLDER).read_bytes())
        return f"process {found['pid']} on {found['host']}, started {found['started']}"
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return f"a process that holds {folder / LOCK}"
