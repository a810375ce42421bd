"""A verdict comes back as it was kept, or not at all: whatever was damaged, shared or taken away."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from two_processes import torchrun

from dpo_trainer.online.feedback import verdict_cache
from dpo_trainer.online.feedback.verdict_cache import LONGEST_REPLY, Verdict, VerdictCache, verdict_folder, verdict_key

KEYS = [verdict_key("m", number) for number in range(20)]


def filled(folder: Path) -> VerdictCache:
    """With the reply "reply <n>\\nA" for each key."""
    cache = VerdictCache(folder)
    for number, key in enumerate(KEYS):
        cache.put(key, "A", f"reply {number}\nA")
    return cache


def test_what_is_kept_is_found_again_by_another_run(tmp_path):
    filled(tmp_path)
    found = VerdictCache(tmp_path).get([KEYS[3], verdict_key("m", 99), KEYS[0], KEYS[3]])
    assert found == [Verdict("A", "reply 3\nA"), None, Verdict("A", "reply 0\nA"), Verdict("A", "reply 3\nA")]


def test_the_last_verdict_counts_and_long_replies_are_cut(tmp_path):
    cache = filled(tmp_path)
    cache.put(KEYS[0], "TIE", "x" * (LONGEST_REPLY + 1))
    assert cache.get(KEYS[:2]) == [Verdict("TIE", "x" * LONGEST_REPLY), Verdict("A", "reply 1\nA")]


def test_replies_that_no_utf8_holds(tmp_path):
    cache = VerdictCache(tmp_path)
    cache.put(KEYS[0], "B", "half \ud83d, nul \0, ünï\nB")
    assert cache.get(KEYS[:1]) == [Verdict("B", "half ?, nul \0, ünï\nB")]
    assert cache.working


def test_keys_tell_all_parts_apart():
    """Also where the parts read the same one after the other, and where one is absent, empty or a number."""
    questions = [("a", "bc"), ("ab", "c"), ("abc",), ("abc", ""), ("abc", None), ("abc", "0.0"), ("abc", 0.0)]
    questions += [("a", "bc", "d"), ("bc", "a"), ('a", "bc',), ("\ud800",), ("?",), ("A", "bc")]
    assert len({verdict_key(*parts) for parts in questions}) == len(questions)
    assert all(len(verdict_key(*parts)) == 16 for parts in questions)


def test_keys_are_the_same_in_every_process():
    """Python's own hashes are not; and caches of earlier releases stay readable."""
    # blake2b of 16 bytes over `["m", 0.0, null]`, by coreutils: printf '["m", 0.0, null]' | b2sum -l 128
    assert verdict_key("m", 0.0, None).hex() == "588377b9a15a1d9cfe81f77368870db5"


def test_the_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.delenv("DPO_TRAINER_CACHE", raising=False)
    assert verdict_folder(None) == tmp_path / "hf/dpo_trainer/judges"
    monkeypatch.setenv("DPO_TRAINER_CACHE", str(tmp_path / "own"))
    assert verdict_folder(None) == tmp_path / "own/judges"
    assert verdict_folder(str(tmp_path / "given")) == tmp_path / "given"


def test_only_the_owner_reads(tmp_path):
    cache = VerdictCache(tmp_path / "judges")
    assert stat.S_IMODE(cache.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.path.parent.stat().st_mode) == 0o700


def damage_header(path: Path) -> None:
    path.write_bytes(b"not a database, this" * 300)


def damage_pages(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:4096] + b"\xa5" * (len(content) - 4096))


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "when"),
    [
        (damage_header, "before it is opened"),
        (damage_pages, "before it is opened"),
        (cut_short, "before it is opened"),
        (damage_header, "while it is used"),
        (damage_pages, "while it is used"),
    ],
)
def test_a_damaged_file_is_moved_aside(tmp_path, caplog, damage, when):
    cache = filled(tmp_path)
    damage(cache.path)
    broken = cache.path.read_bytes()
    with caplog.at_level(logging.WARNING):
        cache = VerdictCache(tmp_path) if when == "before it is opened" else cache
        assert cache.get(KEYS) == [None] * len(KEYS)
    assert "moved aside to verdicts.sqlite.damaged-1" in caplog.text
    assert (tmp_path / "verdicts.sqlite.damaged-1").read_bytes() == broken
    cache.put(KEYS[1], "B", "B")
    assert VerdictCache(tmp_path).get(KEYS[:2]) == [None, Verdict("B", "B")]
    assert cache.working


def test_damage_that_sqlite_reads_over_loses_verdicts_and_changes_none(tmp_path):
    """What is missing of a page reads as zeros. The next run checks the whole file."""
    cache = filled(tmp_path)
    cut_short(cache.path)
    for found, number in zip(cache.get(KEYS), range(len(KEYS)), strict=True):
        assert found is None or found == Verdict("A", f"reply {number}\nA")
    VerdictCache(tmp_path)
    assert (tmp_path / "verdicts.sqlite.damaged-1").exists()


def test_two_that_find_the_damage_move_one_file(tmp_path, monkeypatch):
    """The slower must not take the new file of the faster for the damaged one."""
    cache = filled(tmp_path)
    damage_header(cache.path)
    alone = verdict_cache.only_mover

    @contextlib.contextmanager
    def too_late(folder: Path) -> Iterator[None]:
        monkeypatch.setattr(verdict_cache, "only_mover", alone)
        VerdictCache(folder).put(KEYS[0], "B", "B")
        with alone(folder):
            yield

    monkeypatch.setattr(verdict_cache, "only_mover", too_late)
    assert cache.get(KEYS[:2]) == [Verdict("B", "B"), None]
    assert [path.name for path in tmp_path.glob("*damaged*")] == ["verdicts.sqlite.damaged-1"]


def test_a_file_that_was_deleted_begins_anew(tmp_path):
    cache = filled(tmp_path)
    cache.path.unlink()
    assert cache.get(KEYS[:1]) == [None]
    cache.put(KEYS[0], "A", "A")
    assert cache.get(KEYS[:1]) == [Verdict("A", "A")]


def test_a_folder_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache_dir: .*file/verdicts.sqlite cannot be used .*'off'"):
        VerdictCache(tmp_path / "file")


@pytest.mark.parametrize("pragma", ["application_id = 7", f"application_id = {0x44504F4A}", "user_version = 3"])
def test_the_database_of_another_program_or_version_is_refused(tmp_path, pragma):
    with sqlite3.connect(tmp_path / "verdicts.sqlite") as db:
        db.execute("CREATE TABLE mine (x)")
        db.execute("INSERT INTO mine VALUES (5)")
        db.execute(f"PRAGMA {pragma}")
    with pytest.raises(ValueError, match="another cache_dir"):
        VerdictCache(tmp_path)
    assert sqlite3.connect(tmp_path / "verdicts.sqlite").execute("SELECT x FROM mine").fetchone() == (5,)


def test_what_fails_later_ends_caching_and_nothing_else(tmp_path, caplog, monkeypatch):
    """The folder turns into a file: as a full or a lost disk does, this fails at every look and every entry."""
    cache = VerdictCache(tmp_path / "judges")
    cache.put(KEYS[0], "A", "A")
    (tmp_path / "judges").rename(tmp_path / "gone")
    (tmp_path / "judges").write_text("")
    with caplog.at_level(logging.WARNING):
        assert cache.get(KEYS[:1]) == [None]
        cache.put(KEYS[0], "B", "B")
        assert cache.get(KEYS[:2]) == [None, None]
    assert not cache.working
    (record,) = caplog.records  # once
    assert "asked again" in record.getMessage()


def test_a_lock_that_is_kept_ends_caching(tmp_path, caplog, monkeypatch):
    from dpo_trainer.storage import sqlite as database

    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    cache = filled(tmp_path)
    other = sqlite3.connect(cache.path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    cache.put(KEYS[0], "B", "B")
    other.execute("ROLLBACK")
    assert not cache.working
    assert "locked" in caplog.text
    assert VerdictCache(tmp_path).get(KEYS[:1]) == [Verdict("A", "reply 0\nA")]


def test_many_threads_write_at_once(tmp_path):
    cache = VerdictCache(tmp_path)
    keys = [verdict_key("thread", number) for number in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: cache.put(keys[number], "A", str(number)), range(40)))
    assert cache.get(keys) == [Verdict("A", str(number)) for number in range(40)]


WRITER = """
import os
import sys
from pathlib import Path
from dpo_trainer.online.feedback.verdict_cache import VerdictCache, verdict_key
cache, name = VerdictCache(Path(sys.argv[1])), sys.argv[2 + int(os.environ["RANK"])]
for number in range(30):
    cache.put(verdict_key(name, number), "B", name)
assert cache.working
"""


def test_two_processes_write_at_once(tmp_path):
    (tmp_path / "writer.py").write_text(WRITER)
    torchrun(tmp_path / "writer.py", tmp_path, "one", "two")
    for name in ("one", "two"):
        assert (
            VerdictCache(tmp_path).get([verdict_key(name, number) for number in range(30)])
            == [Verdict("B", name)] * 30
        )


def test_nothing_is_unpickled():
    """What lies on a disk that others can write to is data."""
    assert "pickle" not in Path(verdict_cache.__file__).read_text()
