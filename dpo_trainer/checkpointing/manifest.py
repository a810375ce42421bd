"""What a checkpoint must hold: written when it is finished, compared before it is used."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import xxhash

MANIFEST = "manifest.json"

BLOCK = 8 << 20  # bytes that are read at a time
THREADS = 8  # files that are read at a time; neither xxhash nor the disk holds the interpreter's lock
LARGEST_MANIFEST = 16 << 20  # bytes: about 100 000 files


class Content(NamedTuple):
    size: int  # bytes
    xxh3_128: str  # hexadecimal


def seal(folder: Path, run: str | None = None) -> None:
    """Make a finished folder durable: every file and folder synced, then MANIFEST, which lists what they hold.

    `run`: the id of the run that wrote it. Links are followed: what they lead to belongs to the checkpoint. ValueError for an entry that is no file.
    """
    folders, files = walk(folder)
    files.pop(MANIFEST, None)
    if not files:
        raise ValueError(f"{folder} holds no file: write the checkpoint before it is sealed.")
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(sync, [*files.values(), *folders]))
        contents = dict(zip(files, pool.map(content, files.values()), strict=True))
    listed = {name: contents[name]._asdict() for name in sorted(contents)}
    (folder / MANIFEST).write_text(json.dumps({**({"run": run} if run else {}), "files": listed}, indent=1))
    sync(folder / MANIFEST)
    sync(folder)


def broken_file(checkpoint: Path, *, read: bool = True) -> str | None:
    """Why a checkpoint cannot be used, naming the file; None if it is whole. Files that were added since do no harm.

    `read=False` compares the sizes of the files alone.
    """
    try:
        files = read_manifest(checkpoint)
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    reason = first(other_size(checkpoint, name, want) for name, want in files.items())
    if reason or not read:
        return reason
    with ThreadPoolExecutor(THREADS) as pool:
        return first(pool.map(lambda name: other_content(checkpoint, name, files[name]), files))


def read_manifest(checkpoint: Path) -> dict[str, Content]:
    """{relative path: what it must hold}; ValueError says what is wrong with it. It may come from anywhere."""
    if not checkpoint.is_dir():
        raise ValueError("it is not a folder" if os.path.lexists(checkpoint) else "it does not exist")
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise ValueError(f"it has no {MANIFEST}: not written by DPOTrainer, or not finished")
    try:
        manifest = _loaded(path)
        listed = manifest.get("files") if isinstance(manifest, dict) else None
        if not isinstance(listed, dict) or not listed:
            raise ValueError("it lists no files")
        return {name: listed_content(name, entry) for name, entry in listed.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} is damaged ({error})") from error


def run_of(checkpoint: Path) -> str | None:
    """The id of the run that wrote it; "" for one of a release that gave none; None where that cannot be read."""
    try:
        run = _loaded(checkpoint / MANIFEST).get("run", "")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return run if isinstance(run, str) else None


def _loaded(manifest: Path) -> Any:
    if manifest.stat().st_size > LARGEST_MANIFEST:
        raise ValueError(f"it has more than {LARGEST_MANIFEST} bytes")
    return json.loads(manifest.read_bytes())


def listed_content(name: str, entry: object) -> Content:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"{name!r} is not a path inside the checkpoint")
    size, checksum = (entry.get("size"), entry.get("xxh3_128")) if isinstance(entry, dict) else (None, None)
    if type(size) is not int or not isinstance(checksum, str):
        raise ValueError(f"it does not tell size and checksum of {name!r}")
    return Content(size, checksum)


def other_size(checkpoint: Path, name: str, want: Content) -> str | None:
    path = checkpoint / name
    try:
        if not path.is_file():
            return f"{name!r} is not a file" if path.exists() else f"{name!r} is missing"
        size = path.stat().st_size
    except OSError as error:
        return f"{name!r} cannot be read ({error.strerror})"
    return None if size == want.size else f"{name!r} has {size} bytes instead of {want.size}"


def other_content(checkpoint: Path, name: str, want: Content) -> str | None:
    try:
        found = content(checkpoint / name)
    except OSError as error:
        return f"{name!r} cannot be read ({error.strerror})"
    return None if found == want else f"{name!r} has other content than was written (damaged, or changed since)"


def walk(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """All folders, and {relative path: file}."""

    def fail(error: OSError) -> None:
        raise error

    folders, files = [], {}
    for root, _, names in os.walk(folder, onerror=fail, followlinks=True):
        folders.append(Path(root))
        for path in (Path(root, name) for name in names):
            if not path.is_file():
                raise ValueError(f"{path} is not a file, nor a link to one: a checkpoint can hold nothing else.")
            files[path.relative_to(folder).as_posix()] = path
    return folders, files


def content(file: Path) -> Content:
    """Of what can be read of the file now."""
    size, checksum = 0, xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(BLOCK):
            size += len(block)
            checksum.update(block)
    return Content(size, checksum.hexdigest())


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems sync no folders.
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(descriptor)


def first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)
