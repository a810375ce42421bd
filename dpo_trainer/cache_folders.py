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
