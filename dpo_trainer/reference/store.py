"""A cache on disk of reference log-probs: one SQLite file per reference, one record per completion.

SQLite over LMDB and Parquet shards: it is in the standard library, a transaction survives a kill at any moment, several
processes may write at once, and a reference is one file that can be copied or deleted. The rollback journal over WAL:
WAL needs memory that all processes share, which network file systems do not have.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import sqlite3
import struct
import time
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

logger = logging.getLogger(__name__)
T = TypeVar("T")

APPLICATION_ID = 0x44504F52  # "DPOR": SQLite keeps it in the header, so that another program's file is told from ours
VERSION = 1
SUFFIX = ".sqlite"
SET_ASIDE = "damaged, set aside; nothing reads it"
BUSY_SECONDS = 60.0
KEY_BYTES = 16
IN_USE = timedelta(days=1)  # a reference used since then may belong to a run that goes on

SCHEMA = [
    # `logp` has no type: a REAL column keeps whole numbers as integers, and -0.0 would come back as 0.0.
    "CREATE TABLE records (key BLOB PRIMARY KEY, logp NOT NULL, count INTEGER NOT NULL, tokens BLOB, checksum INTEGER)",
    "CREATE TABLE about (label TEXT PRIMARY KEY, text TEXT NOT NULL)",
    "CREATE TABLE uses (created REAL, used REAL, hits INTEGER NOT NULL, computed INTEGER NOT NULL)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
]
SELECT = "SELECT logp, count, tokens, checksum FROM records WHERE key = ?"
UPSERT = """
    INSERT INTO records (key, logp, count, tokens, checksum) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET
        logp = excluded.logp, count = excluded.count, tokens = excluded.tokens, checksum = excluded.checksum
    WHERE records.tokens IS NULL OR excluded.tokens IS NOT NULL
"""

_inherited: list[sqlite3.Connection] = []
"""Connections of the process that forked this one. Closing one here could undo what the other process is writing."""


class Record(NamedTuple):
    """Log-prob of one completion under one reference."""

    logp: float
    """Nats, summed over the scored tokens: a float32 value (others are rounded to one when stored)."""
    count: int  # type: ignore[assignment]  # hides tuple.count, which nobody asks of a record
    """Scored tokens."""
    tokens: np.ndarray | None = None
    """[count] float32, nats per token, where asked for."""


class _Unusable(ValueError):
    """The file is damaged, or another process took it away."""


class _ReadOnly(ValueError):
    """The file, or the folder that its journal needs, cannot be written."""


class Store:
    """Reference log-probs of one reference: content key of a completion (16 bytes) -> Record.

    Several processes may read and write at once. A damaged file is moved aside with a warning and a new one begun; a
    damaged record is deleted and counted in `damaged`. Without write access, an existing file is read (`read_only`).

    Args:
        reference: hex digest of what determines the numbers; names the file.
        about: {label: text}, what the reference is, for people.

    Raises ValueError for a file of another program or version, and where neither reading nor creating works. All methods
    raise ValueError when the disk fails or another process holds the file for more than a minute.
    """

    def __init__(self, folder: Path, reference: str, about: Mapping[str, str]):
        if not re.fullmatch("[0-9a-f]+", reference):
            raise ValueError(f"A reference is named by a digest in lower-case hex, got {reference!r}.")
        self.path = folder / f"{reference}{SUFFIX}"
        self.about = dict(about)
        self.read_only = False
        self.damaged = 0
        self._db: sqlite3.Connection | None = None
        self._pid = os.getpid()
        self._identity: tuple[int, int] | None = None
        self._surviving(self._connection)

    def get(self, keys: Sequence[bytes], *, tokens: bool = False) -> list[Record | None]:
        """The record of each key, in order. None: not there, or without tokens though wanted, or damaged."""
        _check_keys(keys)
        return self._surviving(lambda: self._read(keys, tokens))

    def put(self, records: Mapping[bytes, Record]) -> None:
        """Keep all of them, or none if this fails. A record without tokens never replaces one with tokens."""
        _check_keys(records)
        rows = [_row(key, record) for key, record in records.items()]
        if rows:
            self._surviving(lambda: self._write(UPSERT, rows))

    def note_use(self, *, hits: int, computed: int) -> None:
        """Add to the counters in the file, and note the time. A read-only file keeps its counts."""
        if not self.read_only:
            update = "UPDATE uses SET hits = hits + ?, computed = computed + ?, used = ?"
            self._surviving(lambda: self._write(update, [(hits, computed, time.time())]))

    def __len__(self) -> int:
        return self._surviving(self._count)

    def close(self) -> None:
        """A store that is used again opens its file again."""
        if self._db is not None and self._pid == os.getpid():
            with contextlib.suppress(sqlite3.Error):  # a damaged file cannot even be left in order
                self._db.close()
            self._db = None

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, keys: Sequence[bytes], tokens: bool) -> list[Record | None]:
        # One look-up per key in one transaction: as fast as an IN list, which would have a longest length.
        with _transaction(self._connection(), self.path, "DEFERRED") as db:
            rows = [db.execute(SELECT, (key,)).fetchone() for key in keys]
        damaged = {key for key, row in zip(keys, rows) if row is not None and not _intact(key, row)}
        if damaged:
            self._discard(damaged)
        return [
            None if row is None or key in damaged else _record(row, tokens)
            for key, row in zip(keys, rows, strict=True)
        ]

    def _discard(self, keys: Collection[bytes]) -> None:
        if not self.damaged:
            logger.warning(
                "The reference cache %s has damaged records: they are dropped, and computed anew.", self.path
            )
        self.damaged += len(keys)
        if not self.read_only:
            self._write("DELETE FROM records WHERE key = ?", [(key,) for key in keys])

    def _write(self, statement: str, rows: Sequence[tuple]) -> None:
        with _transaction(self._connection(), self.path, "IMMEDIATE") as db:
            self._refuse_replaced()
            db.executemany(statement, rows)

    def _count(self) -> int:
        with _transaction(self._connection(), self.path, "DEFERRED") as db:
            return db.execute("SELECT count(*) FROM records").fetchone()[0]

    def _surviving(self, action: Callable[[], T]) -> T:
        """Do it; where the file turns out to be unusable, do it again on a new one."""
        for _ in range(2):  # a second time: another process may have made the same discovery and moved the file first
            try:
                return action()
            except _Unusable as problem:
                self._abandon_file(problem)
        return action()

    def _connection(self) -> sqlite3.Connection:
        """The connection of this process: one from before a fork must not be used."""
        if self._db is not None and self._pid != os.getpid():
            _inherited.append(self._db)
            self._db = None
        if self._db is None:
            self._db, self._pid = self._open(), os.getpid()
        return self._db

    def _open(self) -> sqlite3.Connection:
        _create(self.path)
        self._identity = _identity(self.path)
        try:
            db = _connect(self.path)
        except _ReadOnly as error:
            if self.path.exists():
                raise
            raise _Unusable(f"{self.path} was just moved or deleted by another process.") from error
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Check the file, make it a cache if it is empty, and note that it is in use."""
        with _transaction(db, self.path, "DEFERRED"):
            new = _is_new(db, self.path)
            found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise _Unusable(f"{self.path} is damaged ({found}).")
        try:
            with _transaction(db, self.path, "IMMEDIATE"):
                self._refuse_replaced()
                self._describe(db)
        except _ReadOnly:
            if new:
                raise
            logger.warning("The reference cache %s is read-only: it is read, and nothing is added to it.", self.path)
            self.read_only = True
        else:
            self.read_only = False

    def _describe(self, db: sqlite3.Connection) -> None:
        now = time.time()
        if _is_new(db, self.path):  # asked again: another process may have been faster
            for statement in SCHEMA:
                db.execute(statement)
            db.execute("INSERT INTO uses VALUES (?, ?, 0, 0)", (now, now))
        db.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", self.about.items())
        db.execute("UPDATE uses SET used = ?", (now,))

    def _refuse_replaced(self) -> None:
        """Inside a transaction: a file that was moved or deleted would take the records with it."""
        if _identity(self.path) != self._identity:
            raise _Unusable(f"{self.path} was moved or deleted by another process.")

    def _abandon_file(self, problem: _Unusable) -> None:
        self.close()
        try:
            with _only_mover(self.path.parent):
                if self._identity is None or _identity(self.path) != self._identity:
                    return  # another process has moved it already
                aside = _move_aside(self.path)
        except (OSError, _ReadOnly) as error:
            raise ValueError(
                f"{problem} It cannot be moved aside ({error}): delete it, or give another --ref_cache_dir."
            ) from error
        logger.warning("%s It is moved aside to %s; its log-probs are computed anew.", problem, aside.name)


# --- records as rows ---


def _check_keys(keys: Collection[bytes]) -> None:
    for key in keys:
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise ValueError(f"A key of the reference cache is {KEY_BYTES} bytes, got {key!r}.")


def _row(key: bytes, record: Record) -> tuple[bytes, float, int, bytes | None, int]:
    with np.errstate(over="ignore"):  # beyond float32 is refused below, as an infinity
        logp, count = float(np.float32(record.logp)), int(record.count)
        tokens = None if record.tokens is None else np.asarray(record.tokens, dtype="<f4")
    if not math.isfinite(logp) or (tokens is not None and not np.isfinite(tokens).all()):
        raise ValueError(
            f"The reference log-prob of the completion {key.hex()} is not finite ({record.logp} nats, {count} tokens), "
            "and is not cached. Look at the reference: its weights or its dtype overflow."
        )
    if count < 0 or (tokens is not None and tokens.shape != (count,)):
        shape = "" if tokens is None else f" and log-probs per token of shape {list(tokens.shape)}"
        raise ValueError(f"The completion {key.hex()} has a count of {count} tokens{shape}: both must be [count].")
    blob = None if tokens is None else tokens.tobytes()
    return key, logp, count, blob, _checksum(key, logp, count, blob)


def _record(row: tuple, tokens: bool) -> Record | None:
    logp, count, blob, _ = row
    if not tokens:
        return Record(logp, count)
    return None if blob is None else Record(logp, count, np.frombuffer(blob, "<f4").astype(np.float32))


def _intact(key: bytes, row: tuple) -> bool:
    """Whether the row is what was stored under this key. A damaged one may hold any type in any column."""
    logp, count, blob, checksum = row
    typed = isinstance(logp, float) and isinstance(count, int) and isinstance(blob, bytes | None)
    return typed and checksum == _checksum(key, logp, count, blob)


def _checksum(key: bytes, logp: float, count: int, blob: bytes | None) -> int:
    return zlib.crc32(key + struct.pack("<dq?", logp, count, blob is not None) + (blob or b""))


# --- SQLite ---


def _connect(path: Path) -> sqlite3.Connection:
    """Open an existing file; one that cannot be written opens read-only."""
    with _plain_errors(path):
        uri = f"{path.absolute().as_uri()}?mode=rw"
        db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        try:
            db.text_factory = lambda text: text.decode(errors="replace")  # damage is found by checksum, not here
            for pragma in ("journal_mode = DELETE", "synchronous = FULL", "cell_size_check = ON"):
                db.execute(f"PRAGMA {pragma}")
        except BaseException:
            db.close()
            raise
    return db


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection, path: Path, kind: str) -> Iterator[sqlite3.Connection]:
    """DEFERRED to read, IMMEDIATE to write (a reader that turns writer could deadlock), EXCLUSIVE to delete the file."""
    with _plain_errors(path):
        db.execute(f"BEGIN {kind}")
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):  # a full disk has rolled back already
                db.execute("ROLLBACK")
            raise


@contextlib.contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """Turn SQLite's errors into a ValueError with a way out: `_Unusable` for damage, `_ReadOnly` for missing rights."""
    try:
        yield
    except sqlite3.ProgrammingError:
        raise  # our mistake, not the file's
    except sqlite3.DatabaseError as error:
        raise _in_plain_words(error, path) from error


def _in_plain_words(error: sqlite3.DatabaseError, path: Path) -> ValueError:
    # By the text: before Python 3.11 the exceptions carry no code, and the texts have not changed in many years.
    text = str(error)
    if not isinstance(error, sqlite3.OperationalError) or text.startswith("no such") or "malformed" in text:
        return _Unusable(f"{path} is damaged ({text}).")
    if "readonly" in text or "unable to open" in text:
        return _ReadOnly(
            f"{path} is read-only: {text}. Make the file and its folder writable, or give another --ref_cache_dir."
        )
    if "full" in text:
        return ValueError(
            f"No space is left in {path.parent} ({shutil.disk_usage(path.parent).free:,} bytes free): {text}. What was "
            "cached before is intact. Free space, delete old references with scripts/cache_reference.py --prune, or give "
            "another --ref_cache_dir."
        )
    if "locked" in text:
        return ValueError(
            f"{path}: another process has held it for {BUSY_SECONDS:.0f} s ({text}). Wait for it or end it, or give "
            "another --ref_cache_dir."
        )
    return ValueError(f"{path} cannot be used: {text}. Check the disk, or give another --ref_cache_dir.")


def _is_new(db: sqlite3.Connection, path: Path) -> bool:
    """Whether nothing is in the file yet. Inside a transaction, or another process could fill it in between.

    Raises ValueError for a file that is not a cache of this version.
    """
    (application,), (version,) = (
        db.execute(f"PRAGMA {name}").fetchone() for name in ("application_id", "user_version")
    )
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if application == version == tables == 0:
        return True
    if application == APPLICATION_ID and version == VERSION:
        return False
    if application == APPLICATION_ID:
        found = f"is a reference cache of version {version}; this release reads version {VERSION}"
    else:
        found = (
            f"is another program's database (application id {application:#x}, version {version}); a reference cache has "
            f"{APPLICATION_ID:#x}, version {VERSION}"
        )
    prefix = path.name.removesuffix(SUFFIX)[:12]
    raise ValueError(
        f"{path} {found}. Delete it with scripts/cache_reference.py --prune_reference {prefix}, or give another "
        "--ref_cache_dir."
    )


# --- files ---


def _create(path: Path) -> None:
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
        raise _ReadOnly(
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
def _only_mover(folder: Path) -> Iterator[None]:
    """Files are moved and deleted by one process at a time: two could take a new file for the damaged one."""
    lock = (
        folder / "moving.lock"
    )  # an empty database: SQLite's locks work wherever the cache does, and end with a kill
    _create(lock)
    with contextlib.closing(_connect(lock)) as db, _transaction(db, lock, "EXCLUSIVE"):
        yield


def _move_aside(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    # The journal goes along, or it would be played back into the next file; and first, or it could be that file's own.
    with contextlib.suppress(FileNotFoundError):
        _journal(path).rename(_journal(aside))
    return path.rename(aside)


def _journal(path: Path) -> Path:
    return path.with_name(f"{path.name}-journal")


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file stands at this path now."""
    with contextlib.suppress(FileNotFoundError):
        stat = path.stat()
        return stat.st_dev, stat.st_ino
    return None


def cache_folder(given: str | None) -> Path:
    """Where the caches are: `given`, else $DPO_TRAINER_CACHE/reference, else $HF_HOME/dpo_trainer/reference.

    HF_HOME is ~/.cache/huggingface unless set. The folder is not created.
    """
    if given:
        return Path(given).expanduser()
    if own := os.environ.get("DPO_TRAINER_CACHE"):
        return Path(own).expanduser() / "reference"
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(home).expanduser() / "dpo_trainer" / "reference"


# --- housekeeping over all references of a folder ---


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

    By age go only files that can be read or were set aside: what else lies in the folder may not be ours.
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
    size = stat.st_size + (_journal(path).stat().st_size if _journal(path).exists() else 0)
    changed = datetime.fromtimestamp(stat.st_mtime, timezone.utc)
    reference, _, aside = path.name.partition(SUFFIX)
    unread = Summary(reference, {}, 0, 0, 0, 0, size, changed, changed, SET_ASIDE, path)
    if aside:
        return unread
    try:
        with contextlib.closing(_connect(path)) as db, _transaction(db, path, "DEFERRED"):
            return _contents(db, unread)
    except (ValueError, TypeError, OverflowError) as error:  # the last two: a time or a count that is not a number
        return unread._replace(problem=str(error))


def _contents(db: sqlite3.Connection, unread: Summary) -> Summary:
    if _is_new(db, unread.path):
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
        with _only_mover(each.path.parent), _alone(each):
            each.path.unlink(missing_ok=True)
            _journal(each.path).unlink(missing_ok=True)
        deleted.append(each)
    return deleted


@contextlib.contextmanager
def _alone(summary: Summary) -> Iterator[None]:
    """Hold a readable file against all writers: a process in the middle of a transaction would lose its journal."""
    if summary.problem or not summary.path.exists():
        yield
        return
    with contextlib.closing(_connect(summary.path)) as db, _transaction(db, summary.path, "EXCLUSIVE"):
        yield
