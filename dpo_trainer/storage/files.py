"""The files of the cache: where they are, who may read them, and how they are moved out of the way."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .sqlite import ReadOnly, connect, transaction

SUFFIX = ".sqlite"


def create(path: Path) -> None:
    """An empty file that only its owner reads, unless there is one."""
    try:
        if path.exists():
            return  # not even opened: closing it would drop the locks that this process has on it
        _make_folder(path.parent)
        with contextlib.suppress(FileExistsError):  # another process was faster
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.close(file)
            path.chmod(0o600)  # the umask may have taken rights away
    except OSError as error:
        raise ReadOnly(
            f"The reference cache {path} cannot be created: {error.strerror}. Make its folder writable, or give another "
            "--ref_cache_dir."
        ) from error


def _make_folder(folder: Path) -> None:
    """The folder, and a `dpo_trainer` around it, are the owner's alone; what stands above is made as usual."""
    private = [folder.parent, folder] if folder.parent.name == "dpo_trainer" else [folder]
    private[0].parent.mkdir(parents=True, exist_ok=True)
    for each in private:
        if not each.exists():
            each.mkdir(mode=0o700, exist_ok=True)
            each.chmod(0o700)


@contextlib.contextmanager
def only_mover(folder: Path) -> Iterator[None]:
    """Files are moved and deleted by one process at a time: two could take a new file for the damaged one."""
    # A database of its own: such locks work wherever the cache does, and end with a kill.
    lock = folder / "moving.lock"
    create(lock)
    with contextlib.closing(connect(lock)) as db, transaction(db, lock, "EXCLUSIVE"):
        yield


def move_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    # The journal goes along, or it would be played back into the next file; and first, or it could be that file's own.
    with contextlib.suppress(FileNotFoundError):
        journal_of(path).rename(journal_of(aside))
    return path.rename(aside)


def journal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")


def identity_of(path: Path) -> tuple[int, int] | None:
    """Which file stands at this path now."""
    with contextlib.suppress(FileNotFoundError):
        stat = path.stat()
        return stat.st_dev, stat.st_ino
    return None
