"""What the disk refuses while any library writes a checkpoint becomes one error that says what to do."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .folders import ASIDE, discard, of_this_run
from .manifest import broken_file

RUST = re.compile(r"\(os error (\d+)\)")  # safetensors, tokenizers
# torch.save loses the errno. Seen with torch 2.13: the first two, by how far the file came.
TRUNCATED = re.compile(r"unexpected pos \d+ vs \d+|basic_ios::clear: iostream error|PytorchStreamWriter failed")

FREE_SPACE = (
    "Free space there, keep fewer checkpoints (--save_total_limit), leave the optimizer out (--save_only_model), "
    "or give another --output_dir."
)
RAISE_LIMIT = (
    "Raise the limit of file sizes (ulimit -f), leave the optimizer out (--save_only_model), or give an --output_dir on a "
    "file system that takes larger files."
)
MORE_FILES = "Raise the limit of open files (ulimit -n), or lower --dataloader_num_workers."
MEND = "Mend that, or give another --output_dir."

ADVICE = {
    errno.ENOSPC: FREE_SPACE,
    errno.EDQUOT: FREE_SPACE,
    errno.EFBIG: RAISE_LIMIT,
    errno.EMFILE: MORE_FILES,
    errno.ENFILE: MORE_FILES,
    **dict.fromkeys([errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM, errno.ESTALE], MEND),
}


class CheckpointError(OSError):
    """A checkpoint could not be written."""


@contextmanager
def saving(final: Path, *, main: bool = True) -> Iterator[None]:
    """Turn what the disk refuses while the checkpoint `final` is written into one CheckpointError; other exceptions pass.

    The unfinished folder is removed in every case, on the `main` process.
    """
    try:
        yield
    except Exception as error:
        cause = refused_by_disk(error)
        if cause is None:
            raise
        raise CheckpointError(
            f"The checkpoint {final} could not be written: {cause} {what_is_left(final.parent)}"
        ) from error
    finally:
        if main:
            discard(final.parent / ASIDE / final.name)


def refused_by_disk(error: Exception) -> str | None:
    """The cause and what to do about it; None for an exception that is no fault of the disk."""
    number = errno_of(error)
    if number in ADVICE:
        return f"{os.strerror(number)}. {ADVICE[number]}"
    if isinstance(error, RuntimeError) and TRUNCATED.search(str(error)):
        return f"a file was cut short, as on a full disk, at a quota, or at a limit of file sizes (ulimit -f). {FREE_SPACE}"
    return None


def errno_of(error: Exception) -> int | None:
    """Python tells the number; Rust has it in the text; C++ (torch) ends the text with its meaning, or loses it."""
    if isinstance(error, OSError):
        return error.errno
    if rust := RUST.search(str(error)):
        return int(rust[1])
    if isinstance(error, RuntimeError):
        return next((number for number in ADVICE if str(error).endswith(os.strerror(number))), None)
    return None


def what_is_left(output_dir: Path) -> str:
    """Free space, and the last earlier checkpoint: by sizes, since reading it could take minutes, and nothing touched it."""
    try:
        there = next(path for path in (output_dir.resolve(), *output_dir.resolve().parents) if path.exists())
        free = f"Free there now: {shutil.disk_usage(there).free / 1e9:.2f} GB."
        complete = (
            checkpoint for checkpoint in of_this_run(output_dir) if broken_file(checkpoint, read=False) is None
        )
        last = next(complete, None)
    except OSError as error:
        return f"That disk tells nothing more ({error.strerror})."
    return f"{free} " + (
        f"Earlier checkpoints are intact; the last one is {last}." if last else "There is no earlier checkpoint."
    )
