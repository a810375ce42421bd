"""The log-probs of one reference in one file, which other processes may read, write and move at any time."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from ...storage.files import SUFFIX, create, identity_of, move_aside, only_mover
from ...storage.sqlite import ReadOnly, Shaken, Unusable, connect, describe, is_new, transaction
from .records import Record, check_keys, intact, record_of, row_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

SELECT = "SELECT logp, count, tokens, checksum FROM records WHERE key = ?"
UPSERT = """
    INSERT INTO records (key, logp, count, tokens, checksum) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET
        logp = excluded.logp, count = excluded.count, tokens = excluded.tokens, checksum = excluded.checksum
    WHERE records.tokens IS NULL OR excluded.tokens IS NOT NULL
"""

_inherited: list[sqlite3.Connection] = []
"""Connections of the process that forked this one. Closing one here could undo what the other process is writing."""


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
        check_keys(keys)
        return self._surviving(lambda: self._read(keys, tokens))

    def put(self, records: Mapping[bytes, Record]) -> None:
        """Keep all of them, or none if this fails. A record without tokens never replaces one with tokens."""
        check_keys(records)
        rows = [row_of(key, record) for key, record in records.items()]
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
        with transaction(self._connection(), self.path, "DEFERRED") as db:
            rows = [db.execute(SELECT, (key,)).fetchone() for key in keys]
        damaged = {key for key, row in zip(keys, rows) if row is not None and not intact(key, row)}
        if damaged:
            self._discard(damaged)
        return [
            None if row is None or key in damaged else record_of(row, tokens)
            for key, row in zip(keys, rows, strict=True)
        ]

    def _discard(self, keys: Collection[bytes]) -> None:
        if not self.damaged:
            logger.warning(
                "The reference cache %s has damaged records: they are dropped and computed again.", self.path
            )
        self.damaged += len(keys)
        if not self.read_only:
            self._write("DELETE FROM records WHERE key = ?", [(key,) for key in keys])

    def _write(self, statement: str, rows: Sequence[tuple]) -> None:
        with transaction(self._connection(), self.path, "IMMEDIATE") as db:
            self._refuse_replaced()
            db.executemany(statement, rows)

    def _count(self) -> int:
        with transaction(self._connection(), self.path, "DEFERRED") as db:
            return db.execute("SELECT count(*) FROM records").fetchone()[0]

    def _surviving(self, action: Callable[[], T]) -> T:
        """Do it; where the file turns out to be unusable, do it again on a new one."""
        for _ in range(2):  # a second time: another process may have made the same discovery and moved the file first
            try:
                return action()
            except Unusable as problem:
                self._abandon_file(problem)
            except Shaken:
                self.close()
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
        create(self.path)
        self._identity = identity_of(self.path)
        try:
            db = connect(self.path)
        except ReadOnly as error:
            if self.path.exists():
                raise
            raise Unusable(f"{self.path} was just moved or deleted by another process.") from error
        try:
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        """Check the file, make it a cache if it is empty, and note that it is in use."""
        with transaction(db, self.path, "DEFERRED"):
            new = is_new(db, self.path)
            found = db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise Unusable(f"{self.path} is damaged ({found}).")
        try:
            with transaction(db, self.path, "IMMEDIATE"):
                self._refuse_replaced()
                describe(db, self.path, self.about)
        except ReadOnly:
            if new:
                raise
            logger.warning("The reference cache %s is read-only: it is read, and nothing is added to it.", self.path)
            self.read_only = True
        else:
            self.read_only = False

    def _refuse_replaced(self) -> None:
        """Inside a transaction: a file that was moved or deleted would take the records with it."""
        if identity_of(self.path) != self._identity:
            raise Unusable(f"{self.path} was moved or deleted by another process.")

    def _abandon_file(self, problem: Unusable) -> None:
        self.close()
        try:
            with only_mover(self.path.parent):
                if self._identity is None or identity_of(self.path) != self._identity:
                    return  # another process has moved it already
                aside = move_aside(self.path)
        except (OSError, ReadOnly) as error:
            raise ValueError(
                f"{problem} It cannot be moved aside ({error}): delete it, or give another --ref_cache_dir."
            ) from error
        logger.warning("%s It is moved aside to %s; its log-probs are computed again.", problem, aside.name)
