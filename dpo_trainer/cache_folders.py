"""Where what is kept between runs lies, and how a file gets there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(given: str | None, kind: str) -> Path:
    """`given`, else $DPO_TRAINER_CACHE/kind, else $HF_HOME/dpo_trainer/kind. The folder is not created.

    HF_HOME is ~/.cache/huggingface unless set.
    """
    if given:
        return Path(given).expanduser()
    if own := os.environ.get("DPO_TRAINER_CACHE"):
        return Path(own).expanduser() / kind
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(home).expanduser() / "dpo_trainer" / kind


def write_text(file: Path, text: str) -> None:
    """The file whole, or as it was.

    Raises:
        OSError: the disk refused.
    """
    with naming(file), written_whole(file) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Around what writes a file: an error of the disk has its name, which the one of a full disk lacks, and the way out."""
    try:
        yield
    except OSError as error:
        problem = f"{error.strerror}. Free space there, make the folder writable, or give another one"
        raise OSError(error.errno, problem, str(file)) from error


@contextmanager
def written_whole(file: Path) -> Iterator[Path]:
    """Where to write what shall be `file`, which is there whole or not at all: several workers, and several runs, may write the
    same one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.parent / f"{file.name}.{uuid.uuid4().hex}.part"
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
