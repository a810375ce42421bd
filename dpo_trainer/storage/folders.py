"""Cache folders: where they are, how files are written to them, and checksums that detect damage.

    rows.arrow
    rows.arrow.json     {"size": 123456, "xxh3_128": "...", "rows": 1000}

A file is written under another name, synced, and renamed. What it must hold stands beside it (`seal`) and is compared before
the file is used (`damage`): a disk that was full, a copy that was cut off or a changed byte is found, and the file made anew.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash

from ..printable import printable

BLOCK = 8 << 20
"""Bytes that are read at a time."""


def cache_folder(folder: str | None, kind: str) -> Path:
    """`folder`, else $DPO_TRAINER_CACHE/kind, else $HF_HOME/dpo_trainer/kind. The folder is not created.

    HF_HOME is ~/.cache/huggingface unless set.
    """
    if folder:
        return Path(folder).expanduser()
    if own := os.environ.get("DPO_TRAINER_CACHE"):
        return Path(own).expanduser() / kind
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(home).expanduser() / "dpo_trainer" / kind


def write_text(file: Path, text: str) -> None:
    """Write the file completely, or leave it unchanged.

    Raises:
        OSError: the disk refused.
    """
    with naming(file), atomic_write(file) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Add the file name and a remedy to the OSError of a write: the error of a full disk has no file name."""
    try:
        yield
    except OSError as error:
        problem = f"{error.strerror}. Free space there, make the folder writable, or give another one"
        raise OSError(error.errno, problem, str(file)) from error


@contextmanager
def atomic_write(file: Path, about: dict[str, int] | None = None) -> Iterator[Path]:
    """Yield a temporary path, which is renamed to `file` at the end: readers never see an incomplete file, and several
    workers or runs may write the same one.

    With `about`, counts that may be filled while it is written, it is sealed as well, before it has its name: a reader finds
    the old file with its new seal at most, and makes it anew as it would have."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.parent / f"{file.name}.{uuid.uuid4().hex}.part"
    try:
        yield part
        _sync(part)
        if about is not None:
            _write_seal(part, file, about)
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def seal(file: Path, about: dict[str, int]) -> None:
    """Write beside a finished file what it holds: its size, its checksum, and `about`. The file is synced first."""
    _sync(file)
    _write_seal(file, file, about)


def is_sealed(file: Path) -> bool:
    return _seal_of(file).is_file()


def damage(file: Path) -> str | None:
    """What is wrong with a sealed file; None if it holds what was written."""
    try:
        want = json.loads(_seal_of(file).read_bytes())
        size, checksum = want["size"], want["xxh3_128"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        return f"{_seal_of(file).name} cannot be read ({type(error).__name__})"
    try:
        if (found := file.stat().st_size) != size:
            return f"it has {found} bytes instead of {size}"
        return None if _checksum(file) == checksum else "its content is not what was written"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"


def remove_sealed(file: Path) -> None:
    """The file and its seal, where they are there."""
    _seal_of(file).unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def _seal_of(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _write_seal(written: Path, file: Path, about: dict[str, int]) -> None:
    content = {"size": written.stat().st_size, "xxh3_128": _checksum(written), **about}
    with atomic_write(_seal_of(file)) as part:
        part.write_text(json.dumps(content))


def _checksum(file: Path) -> str:
    found = xxhash.xxh3_128()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(BLOCK):
            found.update(block)
    return found.hexdigest()


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def listing(folder: Path) -> str:
    """What a folder holds, for an error message."""
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "it is empty"
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"it holds {', '.join(names[:6])}{more}"


def check_folder(flag: str, value: str) -> None:
    """Refuse a name that no folder can have, or that something else has.

    Raises:
        ValueError: names the flag, the value and what is there.
    """
    shown = f"{flag} '{printable(value)}'"
    if not value.strip():
        raise ValueError(f"{shown} is empty: name a folder, such as out.")
    if "\0" in value or not _is_utf8(value):
        raise ValueError(
            f"{shown} is not UTF-8, or holds a NUL: files with weights cannot have such a name. Give another."
        )
    folder = Path(value).expanduser()
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    if there.is_symlink() and not there.exists():
        raise ValueError(
            f"{shown}: {there} is a link to {there.readlink()}, which is not there. Make that folder, or give another."
        )
    if there.exists() and not there.is_dir():
        raise ValueError(f"{shown}: {there} is a file. Give a folder.")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
