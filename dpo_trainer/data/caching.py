"""Where `datasets` keeps what it maps: in its cache by a fingerprint, or nowhere; and by how many processes."""

from __future__ import annotations

import logging
import tempfile
import uuid
from pathlib import Path
from typing import Any

from datasets.fingerprint import get_temporary_cache_files_directory

from .encode import works_in_processes

logger = logging.getLogger(__name__)


def how_to_map(tokenizer: Any, fingerprint: str | None, num_proc: int | None) -> dict[str, Any]:
    """Arguments of `Dataset.map`. Without a fingerprint the result lies in a folder that goes when the process ends, for no
    other run can know whether it is the right one. A tokenizer that no other process can have works in this one."""
    if (num_proc or 1) > 1 and not works_in_processes(tokenizer):
        logger.warning(
            "--dataset_num_proc %d has no effect: the tokenizer cannot be handed to other processes. One tokenizes.",
            num_proc,
        )
        num_proc = None
    if fingerprint is not None:
        return {"new_fingerprint": fingerprint, "num_proc": num_proc}
    unique = uuid.uuid4().hex[:16]
    folder = tempfile.mkdtemp(dir=get_temporary_cache_files_directory())
    return {
        "new_fingerprint": unique,
        "num_proc": num_proc,
        "cache_file_name": str(Path(folder) / "rows.arrow"),
        "load_from_cache_file": False,
    }
