"""Where `datasets` keeps what it maps: in its cache by a fingerprint, or nowhere; and by how many processes.

`datasets` takes a file of its cache as it is. Cut off between two record batches it would give fewer rows, and a changed byte
another row: so each has a checksum beside it, and a damaged one is computed anew.
"""

from __future__ import annotations

import glob
import logging
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, is_caching_enabled
from datasets.fingerprint import Hasher, get_temporary_cache_files_directory

from ..storage.folders import damage, is_sealed, remove_sealed, seal
from .processor import works_in_processes

logger = logging.getLogger(__name__)

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
"""The last bytes of an Arrow stream that was written to its end."""


def map_cached(
    dataset: Dataset, function: Callable, tokenizer: Any, fingerprint: str | None, num_proc: int | None, **how: Any
) -> Dataset:
    """`dataset.map(function, **how)`, read from the cache where it is there and whole."""
    return _from_cache(
        dataset, fingerprint, lambda: dataset.map(function, **how_to_map(tokenizer, fingerprint, num_proc), **how)
    )


def flattened(dataset: Dataset) -> Dataset:
    """Selected rows copied into a table of their own, which lies in the cache like any other."""
    if dataset._indices is None:
        return dataset
    fingerprint = Hasher.hash([dataset._fingerprint, "flattened"])
    return _from_cache(dataset, fingerprint, lambda: dataset.flatten_indices(new_fingerprint=fingerprint))


def _from_cache(dataset: Dataset, fingerprint: str | None, compute: Callable[[], Dataset]) -> Dataset:
    """What `compute` makes of the dataset, or finds under this fingerprint in the cache."""
    if fingerprint is None or not dataset.cache_files or not is_caching_enabled():
        return compute()
    _remove_damaged(dataset, fingerprint)
    rows = compute()
    for file in [Path(entry["filename"]) for entry in rows.cache_files]:
        if file.name.startswith("cache-") and not is_sealed(file):
            _seal(file)
    return rows


def _remove_damaged(dataset: Dataset, fingerprint: str) -> None:
    folder = Path(dataset.cache_files[0]["filename"]).parent
    for file in sorted(folder.glob(f"cache-{glob.escape(fingerprint)}*.arrow")):
        # Without a checksum are those of an earlier release, or of a run that was killed as it had written them.
        reason = damage(file) if is_sealed(file) else _unfinished(file)
        if reason is not None:
            logger.warning("The cached rows %s are damaged (%s): they are computed again.", file, reason)
            remove_sealed(file)


def _unfinished(file: Path) -> str | None:
    """What is wrong with a stream of Arrow, as far as it shows without a checksum."""
    try:
        with file.open("rb") as stream:
            stream.seek(-len(END_OF_STREAM), 2)
            if stream.read() != END_OF_STREAM:
                return "it has no end"
        _rows_in(file)
    except (OSError, pa.ArrowException) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _rows_in(file: Path) -> int:
    with pa.memory_map(str(file)) as source, pa.ipc.open_stream(source) as stream:
        return sum(batch.num_rows for batch in stream)


def _seal(file: Path) -> None:
    try:
        seal(file, {"rows": _rows_in(file)})
    except OSError as error:  # a cache that may be read and not written
        logger.info("%s gets no checksum (%s).", file, error)


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
