"""Verdicts of a judge on disk: a question that was paid for is not asked again, by this run or by another.

One SQLite file, opened for each look and each entry: several processes and threads may use it at once, and nothing of it
stays open over a fork. What it needs of SQLite it shares with the cache of reference log-probs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from ...storage.files import create, identity_of, move_aside, only_mover
from ...storage.folders import cache_folder
from ...storage.sqlite import Shaken, Unusable, connect, transaction

logger = logging.getLogger(__name__)
T = TypeVar("T")

FILE = "verdicts.sqlite"
APPLICATION_ID = 0x44504F4A  # "DPOJ"
VERSION = 1
LONGEST_REPLY = 2000  # characters

SCHEMA = [
    "CREATE TABLE verdicts (key BLOB PRIMARY KEY, verdict TEXT NOT NULL, reply TEXT NOT NULL) WITHOUT ROWID",
    f"PRAGMA application_id = {APPLICATION_ID}",
    f"PRAGMA user_version = {VERSION}",
]


class Verdict(NamedTuple):
    verdict: str
    """The word that was understood. A word, not a number: no flipped bit makes another verdict of it."""
    reply: str
    """What the judge said, for people to read; its first 2,000 characters."""


def verdict_folder(given: str | None) -> Path:
    """Where verdicts are kept: `given`, else $DPO_TRAINER_CACHE/judges, else $HF_HOME/dpo_trainer/judges."""
    return cache_folder(given, "judges")


def verdict_key(*parts: str | float | None) -> bytes:
    """16 bytes that name a question: the same in every process, and others as soon as one part differs."""
    # JSON, and not the parts one after the other: ("a", "bc") is another question than ("ab", "c").
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).digest()


class VerdictCache:
    """key (see `verdict_key`) -> Verdict.

    A damaged file is moved aside with a warning, and a new one begun. What goes wrong later than here (a full disk, a lock
    that another process keeps) ends caching with a warning, and nothing else: a judge works without.

    Raises ValueError where the file can neither be read nor made, and for the database of another program or version.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE
        self.working = True
        try:
            self._surviving(self._check)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"cache_dir: {self.path} cannot be used ({_reason(error)}). Give another cache_dir, or 'off' to ask "
                "every question anew."
            ) from error

    def get(self, keys: Sequence[bytes]) -> list[Verdict | None]:
        """The verdict of each key, in order; None where there is none."""
        found = self._unless_broken(lambda: self._read(keys)) if keys else None
        return [None] * len(keys) if found is None else found

    def put(self, key: bytes, verdict: str, reply: str) -> None:
        """Keep a verdict; a later one replaces it."""
        text = reply[:LONGEST_REPLY].encode(errors="replace").decode()  # SQLite takes no half of a surrogate pair
        self._unless_broken(lambda: self._write(key, verdict, text))

    def _check(self) -> None:
        with self._open("DEFERRED") as db:
            self._is_new(db)
            found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise Unusable(f"{self.path} is damaged ({found}).")

    def _read(self, keys: Sequence[bytes]) -> list[Verdict | None]:
        query = "SELECT verdict, reply FROM verdicts WHERE key = ?"
        with self._open("DEFERRED") as db:
            rows = [None] * len(keys) if self._is_new(db) else [db.execute(query, (key,)).fetchone() for key in keys]
        return [None if row is None else Verdict(str(row[0]), str(row[1])) for row in rows]

    def _write(self, key: bytes, verdict: str, reply: str) -> None:
        with self._open("IMMEDIATE") as db:
            if self._is_new(db):  # asked inside the transaction, since another process may just have been faster
                for statement in SCHEMA:
                    db.execute(statement)
            db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?, ?)", (key, verdict, reply))

    @contextlib.contextmanager
    def _open(self, kind: str) -> Iterator[sqlite3.Connection]:
        """A transaction on the file, which is made where there is none."""
        create(self.path)
        with contextlib.closing(connect(self.path)) as db, transaction(db, self.path, kind):
            yield db

    def _is_new(self, db: sqlite3.Connection) -> bool:
        """Whether nothing is in the file yet."""
        pragmas = ("application_id", "user_version")
        (application,), (version,) = (db.execute(f"PRAGMA {name}").fetchone() for name in pragmas)
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if (application, version) == (APPLICATION_ID, VERSION):
            return False
        if application == version == tables == 0:
            return True
        raise ValueError(
            f"it is a database of application id {application:#x}, version {version}, and verdicts have "
            f"{APPLICATION_ID:#x}, version {VERSION}"
        )

    def _unless_broken(self, action: Callable[[], T]) -> T | None:
        if not self.working:
            return None
        try:
            return self._surviving(action)
        except (ValueError, OSError) as error:
            self.working = False
            logger.warning(
                "The verdicts in %s cannot be used any more (%s): every question is asked again from now on. Look at the "
                "disk, or give another cache_dir.",
                self.path,
                _reason(error),
            )
            return None

    def _surviving(self, action: Callable[[], T]) -> T:
        """Do it; where the file turns out to be damaged, do it again on a new one."""
        for _ in range(2):  # a second time: another process may have found the same, and moved the file first
            standing = identity_of(self.path)
            try:
                return action()
            except Unusable as problem:
                self._move_aside(problem, standing)
            except Shaken:
                pass
        return action()

    def _move_aside(self, problem: Unusable, standing: tuple[int, int] | None) -> None:
        with only_mover(self.path.parent):
            if identity_of(self.path) != standing:
                return  # another process has moved it already
            aside = move_aside(self.path)
        logger.warning("%s It is moved aside to %s; its questions are asked again.", problem, aside.name)


def _reason(error: Exception) -> str:
    """Of SQLite or of the system, where it is theirs: the words around it name the option of another cache."""
    return str(error.__cause__ or error)
