"""SQLite as the cache uses it: durable transactions, the tables of this version, errors in plain words."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

APPLICATION_ID = 0x44504F52  # "DPOR": SQLite keeps it in the header, so that another program's file is told from ours
VERSION = 1
BUSY_SECONDS = 60.0

SCHEMA = [
    # `logp` has no type: a REAL column keeps whole numbers as integers, and -0.0 would come back as 0.0.
    "CREATE TABLE records (key BLOB PRIMARY KEY, logp NOT NULL, count INTEGER NOT NULL, tokens BLOB, checksum INTEGER)",
    "CREATE TABLE about (label TEXT PRIMARY KEY, text TEXT NOT NULL)",
    "CREATE TABLE uses (created REAL, used REAL, hits INTEGER NOT NULL, computed INTEGER NOT NULL)",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
]


class Shaken(ValueError):
    """The disk failed in the middle, and may not a second time: a file that another process moved just then, a network disk."""


class Unusable(ValueError):
    """The file is damaged, or another process took it away."""


class ReadOnly(ValueError):
    """The file, or the folder that its journal needs, cannot be written."""


def connect(path: Path) -> sqlite3.Connection:
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
def transaction(db: sqlite3.Connection, path: Path, kind: str) -> Iterator[sqlite3.Connection]:
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
    """Turn SQLite's errors into a ValueError with a way out: `Unusable` for damage, `ReadOnly` for missing rights."""
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
        return Unusable(f"{path} is damaged ({text}).")
    if "readonly" in text or "unable to open" in text:
        return ReadOnly(
            f"{path} is read-only: {text}. Make the file and its folder writable, or give another --ref_cache_dir. Where too many "
            "files are open, raise their limit (ulimit -n)."
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
    kind = Shaken if "disk I/O" in text else ValueError
    return kind(f"{path} cannot be used: {text}. Check the disk, or give another --ref_cache_dir.")


def is_new(db: sqlite3.Connection, path: Path) -> bool:
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
    prefix = path.stem[:12]
    raise ValueError(
        f"{path} {found}. Delete it with scripts/cache_reference.py --prune_reference {prefix}, or give another "
        "--ref_cache_dir."
    )


def describe(db: sqlite3.Connection, path: Path, about: Mapping[str, str]) -> None:
    """Inside a transaction that writes: make the file a cache if it is empty still, and note what it is and its use."""
    now = time.time()
    if is_new(db, path):  # asked here, since another process may just have been faster
        for statement in SCHEMA:
            db.execute(statement)
        db.execute("INSERT INTO uses VALUES (?, ?, 0, 0)", (now, now))
    db.executemany("INSERT OR REPLACE INTO about VALUES (?, ?)", about.items())
    db.execute("UPDATE uses SET used = ?", (now,))
