"""What the cache holds over all references of a folder, and how room is made."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple

from ...storage.files import SUFFIX, journal_of, only_mover
from ...storage.sqlite import connect, is_new, transaction

SET_ASIDE = "damaged, set aside; nothing reads it"
IN_USE = timedelta(days=1)  # a reference used since then may belong to a run that goes on


class Summary(NamedTuple):
    """What one file holds. A file that cannot be read has a `problem`, no entries, and the times of the file."""

    reference: str
    about: dict[str, str]
    entries: int
    with_tokens: int
    hits: int
    computed: int
    bytes: int
    created: datetime
    used: datetime
    problem: str | None
    path: Path


def summaries(folder: Path) -> list[Summary]:
    """All references in a folder, the most recently used first; files that were set aside as damaged included."""
    found = []
    for path in [*folder.glob(f"*{SUFFIX}"), *folder.glob(f"*{SUFFIX}.damaged-*[0-9]")]:
        with contextlib.suppress(FileNotFoundError):  # deleted in the meantime
            found.append(_summary(path))
    return sorted(found, key=lambda summary: summary.used, reverse=True)


def prune(folder: Path, *, older_than: timedelta | None = None, references: Sequence[str] = ()) -> list[Summary]:
    """Delete references that were not used for so long, and those whose digest starts with one of `references`.

    Only readable files and those set aside are deleted by age: other files in the folder may not be ours.
    Returns what was deleted. Raises ValueError for a prefix that fits none or several, before anything is deleted.
    """
    there = summaries(folder)
    named = {_only_match(prefix, sorted({each.reference for each in there})) for prefix in references}
    now = datetime.now(timezone.utc)
    return _delete(
        each
        for each in there
        if each.reference in named or (older_than is not None and _ours(each) and now - each.used > older_than)
    )


def keep_within(folder: Path, limit: int, *, sparing: str) -> list[Summary]:
    """Delete the least recently used references until the folder holds at most `limit` bytes; returns what was deleted.

    Files that were set aside go first. The reference `sparing` stays, and so does one that was used within a day.
    Raises ValueError, and deletes nothing, if that is not enough.
    """
    there = summaries(folder)
    now = datetime.now(timezone.utc)
    set_aside = [each for each in there if each.problem == SET_ASIDE]
    idle = [each for each in there if not each.problem and each.reference != sparing and now - each.used > IN_USE]
    size, chosen = sum(each.bytes for each in there), []
    for each in set_aside + idle[::-1]:
        if size <= limit:
            break
        chosen.append(each)
        size -= each.bytes
    if size > limit:
        raise ValueError(
            f"The reference cache {folder} is above its quota of {limit:,} bytes: {size:,} belong to this run or to "
            "references that were used within a day. Raise --ref_cache_quota, delete some by name with "
            "scripts/cache_reference.py --prune, or give another --ref_cache_dir."
        )
    return _delete(chosen)


def _summary(path: Path) -> Summary:
    stat = path.stat()
    size = stat.st_size + (journal_of(path).stat().st_size if journal_of(path).exists() else 0)
    changed = datetime.fromtimestamp(stat.st_mtime, timezone.utc)
    reference, _, aside = path.name.partition(SUFFIX)
    unread = Summary(reference, {}, 0, 0, 0, 0, size, changed, changed, SET_ASIDE, path)
    if aside:
        return unread
    try:
        with contextlib.closing(connect(path)) as db, transaction(db, path, "DEFERRED"):
            return _contents(db, unread)
    except (ValueError, TypeError, OverflowError) as error:  # the last two: a time or a count that is not a number
        return unread._replace(problem=str(error))


def _contents(db: sqlite3.Connection, unread: Summary) -> Summary:
    if is_new(db, unread.path):
        return unread._replace(problem=None)
    created, used, hits, computed = db.execute("SELECT created, used, hits, computed FROM uses").fetchone()
    entries, with_tokens = db.execute("SELECT count(*), count(tokens) FROM records").fetchone()
    return unread._replace(
        about=dict(db.execute("SELECT label, text FROM about")),
        entries=entries,
        with_tokens=with_tokens,
        hits=hits,
        computed=computed,
        created=datetime.fromtimestamp(created, timezone.utc),
        used=datetime.fromtimestamp(used, timezone.utc),
        problem=None,
    )


def _ours(summary: Summary) -> bool:
    return summary.problem is None or summary.problem == SET_ASIDE


def _only_match(prefix: str, known: Sequence[str]) -> str:
    fitting = [reference for reference in known if prefix and reference.startswith(prefix)]
    if len(fitting) == 1:
        return fitting[0]
    why = (
        f"fits several references: {', '.join(fitting)}" if fitting else f"fits none of: {', '.join(known) or 'none'}"
    )
    raise ValueError(f"--prune_reference {prefix!r} {why}. Give the start of one of them.")


def _delete(chosen: Iterable[Summary]) -> list[Summary]:
    deleted = []
    for each in chosen:
        with only_mover(each.path.parent), _alone(each):
            each.path.unlink(missing_ok=True)
            journal_of(each.path).unlink(missing_ok=True)
        deleted.append(each)
    return deleted


@contextlib.contextmanager
def _alone(summary: Summary) -> Iterator[None]:
    """Hold a readable file against all writers: a process in the middle of a transaction would lose its journal."""
    if summary.problem or not summary.path.exists():
        yield
        return
    with contextlib.closing(connect(summary.path)) as db, transaction(db, summary.path, "EXCLUSIVE"):
        yield
