"""What the cache returns is what was stored, to the bit, or nothing: whatever was killed, cut, flipped or shared."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from dpo_trainer.reference import cache
from dpo_trainer.reference.cache import Record, Store, Summary, keep_within, prune, summaries
from dpo_trainer.storage import sqlite as database
from dpo_trainer.storage.folders import cache_folder

REFERENCE = "ab12" * 8
ABOUT = {"model": "tiny/llama", "dtype": "float32"}


def opened(folder: Path, reference: str = REFERENCE) -> Store:
    return Store(folder, reference, ABOUT)


def key_of(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest()[:16]


def record_of(number: int, with_tokens: bool = False) -> Record:
    """A record that follows from its number, with all 24 bits of a float32 in use."""
    values = np.random.default_rng(number).normal(size=1 + number % 7).astype(np.float32)
    return Record(float(values.sum(dtype=np.float32)), len(values), values if with_tokens else None)


def records_of(numbers, with_tokens: bool = False) -> dict[bytes, Record]:
    return {key_of(number): record_of(number, with_tokens) for number in numbers}


def bits(record: Record | None) -> tuple | None:
    """Compares to the bit: -0.0 is not 0.0."""
    if record is None:
        return None
    tokens = None if record.tokens is None else (str(record.tokens.dtype), record.tokens.tobytes())
    return np.float64(record.logp).tobytes(), record.count, tokens


def same(found: list[Record | None], wanted: list[Record | None]) -> bool:
    return [bits(each) for each in found] == [bits(each) for each in wanted]


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0x20
    path.write_bytes(content)


def set_aside(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if ".damaged-" in path.name)


# --- the numbers ---

float32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=30, deadline=None)
@given(logps=st.lists(float32, min_size=1, max_size=20), tokens=st.lists(float32, max_size=8))
def test_every_float32_comes_back_to_the_bit(logps, tokens):
    wanted = [
        Record(logp, len(tokens), np.array(tokens, np.float32)) for logp in [-0.0, 0.0, 3.4028234663852886e38, *logps]
    ]
    keys = [key_of(number) for number in range(len(wanted))]
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as store:
        store.put(dict(zip(keys, wanted)))
        store.close()  # so that it comes from the file
        assert same(store.get(keys, tokens=True), wanted)
        assert same(store.get(keys), [each._replace(tokens=None) for each in wanted])


def test_other_precisions_are_rounded_to_float32(tmp_path):
    """0.1 has no float32 of its own: the nearest is 0.100000001490116..."""
    with opened(tmp_path) as store:
        store.put({key_of(0): Record(0.1, 2, np.array([0.1, 1 / 3]))})
        (found,) = store.get([key_of(0)], tokens=True)
    assert found.logp == 0.10000000149011612
    assert found.tokens.dtype == np.float32
    assert found.tokens.tolist() == [np.float32(0.1), np.float32(1 / 3)]


def test_order_follows_the_keys_whatever_their_number(tmp_path):
    """More keys than SQLite takes variables in one statement (32,766), some twice, some unknown."""
    with opened(tmp_path) as store:
        store.put(records_of(range(2_000)))
        numbers = random.Random(0).choices(range(3_000), k=40_000)
        wanted = [record_of(number) if number < 2_000 else None for number in range(3_000)]
        assert same(store.get([key_of(number) for number in numbers]), [wanted[number] for number in numbers])
        assert store.get([]) == []
        assert len(store) == 2_000


def test_tokens_are_there_where_they_were_given(tmp_path):
    """Without tokens, a record serves a sum but not a per-token loss; with tokens it is never put back to without."""
    full, bare = record_of(6, with_tokens=True), record_of(6)
    assert full.count == 7
    with opened(tmp_path) as store:
        store.put({key_of(6): bare})
        assert store.get([key_of(6)], tokens=True) == [None]
        store.put({key_of(6): full})
        store.put({key_of(6): bare})
        assert same(store.get([key_of(6)], tokens=True), [full])
        store.put({key_of(7): Record(0.0, 0, np.zeros(0, np.float32))})  # none scored is not the same as none given
        assert store.get([key_of(7)], tokens=True)[0].tokens.shape == (0,)


BAD = {
    "nan": ({key_of(1): Record(float("nan"), 3)}, rf"{key_of(1).hex()} is not finite"),
    "infinite": ({key_of(1): Record(float("-inf"), 3)}, "not finite"),
    "above float32": ({key_of(1): Record(1e39, 3)}, "not finite"),
    "one token nan": ({key_of(1): Record(-1.0, 2, np.array([-1.0, np.nan]))}, "not finite"),
    "tokens and count differ": ({key_of(1): Record(-1.0, 2, np.zeros(3))}, r"count of 2 .* shape \[3\]"),
    "tokens in two dimensions": ({key_of(1): Record(-1.0, 2, np.zeros((2, 1)))}, r"shape \[2, 1\]"),
    "negative count": ({key_of(1): Record(-1.0, -1)}, "count of -1"),
    "short key": ({b"short": Record(-1.0, 2)}, "16 bytes"),
    "text key": ({"a" * 16: Record(-1.0, 2)}, "16 bytes"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_a_log_prob_is_refused_with_its_whole_batch(tmp_path, case):
    records, message = BAD[case]
    with opened(tmp_path) as store:
        with pytest.raises(ValueError, match=message):
            store.put(records_of([0]) | records)
        assert len(store) == 0
        store.put(records_of([0]))
        assert len(store) == 1


class Model(RuleBasedStateMachine):
    """A dict is the model; few keys, so that they meet again."""

    numbers = st.lists(st.integers(0, 9), max_size=6)

    def __init__(self):
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.store, self.other = opened(Path(self.folder.name)), opened(Path(self.folder.name))
        self.model: dict[bytes, Record] = {}

    @rule(numbers=numbers, with_tokens=st.booleans(), shift=st.integers(0, 3))
    def put(self, numbers, with_tokens, shift):
        records = {key_of(number): record_of(number + 10 * shift, with_tokens) for number in numbers}
        self.store.put(records)
        kept = {key for key in records if not with_tokens and key in self.model and self.model[key].tokens is not None}
        self.model |= {key: record for key, record in records.items() if key not in kept}

    @rule(numbers=numbers, tokens=st.booleans(), elsewhere=st.booleans())
    def get(self, numbers, tokens, elsewhere):
        there = [self.model.get(key_of(number)) for number in numbers]
        if tokens:
            wanted = [None if each is None or each.tokens is None else each for each in there]
        else:
            wanted = [each and each._replace(tokens=None) for each in there]
        store = self.other if elsewhere else self.store
        assert same(store.get([key_of(number) for number in numbers], tokens=tokens), wanted)

    @rule()
    def reopen(self):
        self.store.close()
        self.store = opened(Path(self.folder.name))

    @invariant()
    def all_are_counted(self):
        assert len(self.store) == len(self.model)

    def teardown(self):
        self.store.close()
        self.other.close()
        self.folder.cleanup()


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


# --- damage ---


def test_a_flipped_byte_costs_its_record_and_no_other(tmp_path, caplog):
    with opened(tmp_path) as store:
        store.put(records_of(range(20)))
        stored = np.array([record_of(7).logp], ">f8").tobytes()  # SQLite writes big-endian
        content = store.path.read_bytes()
        assert content.count(stored) == 1
        store.close()  # an open one may hold the page in memory
        flip(store.path, content.index(stored) + 3)

        found = store.get([key_of(number) for number in range(20)])
        assert same(found, [None if number == 7 else record_of(number) for number in range(20)])
        assert (store.damaged, len(store)) == (1, 19)
        assert [line.levelname for line in caplog.records] == ["WARNING"]
        assert "damaged records" in caplog.text

        store.put(records_of([7]))
        assert same(store.get([key_of(7)]), [record_of(7)])


def test_no_flipped_byte_anywhere_gives_a_wrong_number(tmp_path, caplog):
    """120 files with one flipped byte each: every record is as it was stored, or not there; nothing is raised."""
    numbers = range(40)
    keys, wanted = [key_of(number) for number in numbers], [record_of(number, True) for number in numbers]
    with opened(tmp_path) as store:
        store.put(dict(zip(keys, wanted)))
        path, intact = store.path, store.path.read_bytes()
    used = [at for at in range(len(intact)) if intact[at] and not 60 <= at < 72]  # those: version, application
    outcomes = {"as before": 0, "some": 0, "none": 0}
    for position in random.Random(0).sample(used, 120):
        for leftover in tmp_path.iterdir():
            leftover.unlink()
        path.write_bytes(intact)
        flip(path, position)
        with opened(tmp_path) as store:
            found = store.get(keys, tokens=True)
            there = [at for at, record in enumerate(found) if record is not None]
            assert same([found[at] for at in there], [wanted[at] for at in there]), f"byte {position}"
            outcomes["as before" if len(there) == 40 else "some" if there else "none"] += 1
            store.put(dict(zip(keys, wanted)))  # and it can be mended
            assert same(store.get(keys, tokens=True), wanted), f"byte {position}"
    assert outcomes["some"] > 20, outcomes  # records that were flipped themselves
    assert outcomes["none"] > 0, outcomes  # and whole files


def test_a_record_under_another_key_is_not_taken(tmp_path):
    """An index that leads to another row: the row is whole, and still not the one that was asked for."""
    with opened(tmp_path) as store:
        store.put(records_of([0, 1]))
    with contextlib.closing(sqlite3.connect(store.path)) as db:
        db.execute("DELETE FROM records WHERE key = ?", (key_of(1),))
        db.execute("UPDATE records SET key = ?", (key_of(1),))
        db.commit()
    with opened(tmp_path) as store:
        assert store.get([key_of(0), key_of(1)]) == [None, None]
        assert store.damaged == 1


BROKEN = {
    "text": lambda whole: b"not a database, although long enough to have a header of a hundred bytes" * 3,
    "short": lambda whole: b"SQLite format 3\0" + b"\1" * 20,
    "zeros": lambda whole: bytes(len(whole)),
    "half": lambda whole: whole[: len(whole) // 2],
    "cut in a page": lambda whole: whole[: len(whole) - 1_000],
    "a page lost": lambda whole: whole[:4096] + bytes(4096) + whole[8192:],
}


NOTICED_AT_ONCE = ["text", "short", "zeros", "half"]  # the others leave the header, and with it the pages in memory


@pytest.mark.parametrize(
    ("case", "when"),
    [(case, "before it is opened") for case in BROKEN] + [(case, "while it is open") for case in NOTICED_AT_ONCE],
)
def test_a_broken_file_is_moved_aside_and_a_new_one_begun(tmp_path, caplog, case, when):
    numbers = range(300)
    keys = [key_of(number) for number in numbers]
    store = opened(tmp_path)
    store.put(records_of(numbers))
    if when == "before it is opened":
        store.close()
    broken = BROKEN[case](store.path.read_bytes())
    assert broken != store.path.read_bytes()
    store.path.write_bytes(broken)
    if when == "before it is opened":
        store = opened(tmp_path)
    assert store.get(keys) == [None] * 300
    assert set_aside(tmp_path) == [f"{REFERENCE}.sqlite.damaged-1"]
    assert (tmp_path / f"{REFERENCE}.sqlite.damaged-1").read_bytes() == broken
    assert caplog.text.count("moved aside") == 1
    assert str(store.path) in caplog.text

    store.put(records_of(numbers))
    assert same(store.get(keys), [record_of(number) for number in numbers])
    store.close()


def test_each_broken_file_keeps_its_own_name_and_its_journal(tmp_path):
    """A journal beside a new file would be played back into it."""
    for number in (1, 2):
        path = tmp_path / f"{REFERENCE}.sqlite"
        path.write_bytes(b"x" * 5_000)
        journal = tmp_path / f"{REFERENCE}.sqlite-journal"
        journal.write_bytes(b"\0y")  # of a process in the middle of its work: SQLite leaves it alone
        with opened(tmp_path) as store:
            store.put(records_of([number]))
            assert len(store) == 1
        assert (tmp_path / f"{REFERENCE}.sqlite.damaged-{number}").read_bytes() == b"x" * 5_000
        assert (tmp_path / f"{REFERENCE}.sqlite.damaged-{number}-journal").read_bytes() == b"\0y"
        assert not journal.exists()
        path.unlink()


def test_put_survives_a_file_that_breaks_under_it(tmp_path):
    with opened(tmp_path) as store:
        store.put(records_of(range(100)))
        store.path.write_bytes(b"x" * 20_000)
        store.put(records_of(range(100, 200)))
        assert len(store) == 100
        assert same(store.get([key_of(150), key_of(50)]), [record_of(150), None])


def test_an_empty_file_is_new(tmp_path, caplog):
    (tmp_path / f"{REFERENCE}.sqlite").touch()
    with opened(tmp_path) as store:
        store.put(records_of([0]))
        assert len(store) == 1
    assert not caplog.text
    assert not set_aside(tmp_path)


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["PRAGMA user_version = 9"], "version 9; this release reads version 1"),
        (["PRAGMA application_id = 77"], "application id 0x4d, version 1.*has 0x44504f52, version 1"),
        (["PRAGMA application_id = 0", "PRAGMA user_version = 0"], "application id 0x0, version 0"),
    ],
)
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path, statements, message):
    opened(tmp_path).close()
    path = tmp_path / f"{REFERENCE}.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        for statement in statements:
            db.execute(statement)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"{path}.*{message}.*--prune_reference ab12ab12ab12, .*--ref_cache_dir"):
        opened(tmp_path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


# --- conditions that are not damage ---


def test_locked_is_not_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    with opened(tmp_path) as store, contextlib.closing(sqlite3.connect(store.path, isolation_level=None)) as other:
        store.put(records_of([0]))
        other.execute("BEGIN EXCLUSIVE")
        for action in (lambda: store.get([key_of(0)]), lambda: store.put(records_of([1])), lambda: opened(tmp_path)):
            with pytest.raises(ValueError, match="another process has held it"):
                action()
        other.execute("ROLLBACK")
        assert same(store.get([key_of(0), key_of(1)]), [record_of(0), None])
    assert not set_aside(tmp_path)


def test_a_full_disk_keeps_what_was_there(tmp_path):
    with opened(tmp_path) as store:
        store.put(records_of(range(50)))
        (pages,) = store._connection().execute("PRAGMA page_count").fetchone()
        store._connection().execute(f"PRAGMA max_page_count = {pages + 2}")  # SQLite's own "database or disk is full"
        with pytest.raises(
            ValueError, match=rf"No space is left in {tmp_path} \([\d,]+ bytes free\).*--ref_cache_dir"
        ):
            store.put(records_of(range(50, 5_000)))
        assert len(store) == 50
        assert same(store.get([key_of(number) for number in range(50)]), [record_of(number) for number in range(50)])
        store.put(records_of([50]))  # one more still fits
    assert not set_aside(tmp_path)
    assert len(opened(tmp_path)) == 51


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can reach, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


@contextlib.contextmanager
def without_rights() -> Iterator[None]:
    """File permissions do not bind root."""
    if root := os.geteuid() == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize(("folder_mode", "file_mode"), [(0o555, 0o444), (0o555, 0o666), (0o777, 0o444)])
def test_without_write_access_the_cache_is_read(open_folder, caplog, folder_mode, file_mode):
    with opened(open_folder) as store:
        store.put(records_of(range(5)))
    store.path.chmod(file_mode)
    open_folder.chmod(folder_mode)
    before = store.path.read_bytes()
    with without_rights(), opened(open_folder) as store:
        assert store.read_only
        assert "is read-only" in caplog.text
        assert same(store.get([key_of(3), key_of(9)]), [record_of(3), None])
        with pytest.raises(ValueError, match=r"read-only: .*--ref_cache_dir"):
            store.put(records_of([9]))
        store.note_use(hits=1, computed=0)
        assert len(store) == 5
        (summary,) = summaries(open_folder)
        assert (summary.entries, summary.hits, summary.problem) == (5, 0, None)
    assert store.path.read_bytes() == before
    with opened(open_folder) as store:
        assert not store.read_only  # and with access it is written
        store.path.chmod(0o600)
    open_folder.chmod(0o755)


def test_a_broken_file_without_write_access_is_refused(open_folder):
    path = open_folder / f"{REFERENCE}.sqlite"
    path.write_bytes(b"x" * 5_000)
    path.chmod(0o444)
    open_folder.chmod(0o555)
    with without_rights(), pytest.raises(ValueError, match=r"damaged.*cannot be moved aside.*--ref_cache_dir"):
        opened(open_folder)
    open_folder.chmod(0o755)


def test_a_cache_that_cannot_be_created_is_refused(open_folder):
    (open_folder / "file").touch()
    open_folder.chmod(0o555)
    for folder in (open_folder, open_folder / "new", open_folder / "file" / "below"):
        with without_rights(), pytest.raises(ValueError, match=f"{folder}.*cannot be created.*--ref_cache_dir"):
            opened(folder)
    open_folder.chmod(0o755)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_the_cache_is_its_owners_alone(tmp_path, umask):
    home = tmp_path / "home"
    folder = home / "dpo_trainer" / "reference"
    if umask == 0o777:
        home.mkdir()  # as usual would be without any rights
    before = os.umask(umask)
    try:
        with opened(folder) as store:
            store.put(records_of([0]))
            store._connection().execute("BEGIN IMMEDIATE")
            store._connection().execute("DELETE FROM records")
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in home.rglob("*")}
            store._connection().execute("ROLLBACK")
    finally:
        os.umask(before)
    name = f"{REFERENCE}.sqlite"
    assert modes == {"dpo_trainer": 0o700, "reference": 0o700, name: 0o600, f"{name}-journal": 0o600}
    if umask == 0o000:
        assert stat.S_IMODE(home.stat().st_mode) == 0o777  # what stands above is not ours to close


def test_a_reference_is_named_by_a_digest(tmp_path):
    with pytest.raises(ValueError, match=r"digest in lower-case hex, got '\.\./up'"):
        opened(tmp_path, "../up")


# --- several processes ---

PROCESS = f"""
import logging, pathlib, sys, types
sys.path.insert(0, {str(Path(cache.__file__).parents[3])!r})
# The package around it loads torch, which takes seconds: the cache itself does without.
reference = sys.modules["dpo_trainer.reference"] = types.ModuleType("dpo_trainer.reference")
reference.__path__ = [{str(Path(cache.__file__).parents[1])!r}]
from dpo_trainer.reference.cache import Record, Store
assert "torch" not in sys.modules
sys.path.insert(0, {str(Path(__file__).parent)!r})
import hashlib, numpy as np
def key_of(number): return hashlib.sha256(str(number).encode()).digest()[:16]
def record_of(number, with_tokens=False):
    values = np.random.default_rng(number).normal(size=1 + number % 7).astype(np.float32)
    return Record(float(values.sum(dtype=np.float32)), len(values), values if with_tokens else None)
folder, first = pathlib.Path(sys.argv[1]), int(sys.argv[2])
"""

WRITE = """
with Store(folder, "%s", {}) as store:
    print("ready", flush=True)
    for start in range(first, first + 600, 30):
        if start in (first, first + 300):
            sys.stdin.readline()
        store.put({key_of(n): record_of(n, True) for n in range(start, start + 30)})
        store.note_use(hits=1, computed=30)
    assert store.damaged == 0
"""


def process(script: str, folder: Path, first: int = 0) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROCESS + script.replace("%s", REFERENCE), str(folder), str(first)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finished(started: list[subprocess.Popen]) -> None:
    for each in started:
        each.communicate()
        assert each.returncode == 0


@pytest.mark.parametrize("before", ["nothing", "damaged"])
def test_processes_share_a_file_from_its_first_moment(tmp_path, before):
    """Three writers of overlapping sets open at once, and a fourth process reads: all is there, nothing is torn.

    They stop half-way, with 0-299, 300-599 and 600-899 written, until the reader has seen that and no more.
    """
    if before == "damaged":
        (tmp_path / f"{REFERENCE}.sqlite").write_bytes(b"x" * 5_000)
    writers = [process(WRITE, tmp_path, first) for first in (0, 300, 600)]
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 3
    keys, wanted = [key_of(n) for n in range(1_200)], [record_of(n, True) for n in range(1_200)]
    sizes = [0]
    with opened(tmp_path) as store:
        for half in (900, 1_200):
            for writer in writers:
                writer.stdin.write("go\n")
                writer.stdin.flush()
            while sizes[-1] < half and not any(writer.poll() for writer in writers):
                found = store.get(keys, tokens=True)
                there = [at for at, record in enumerate(found) if record is not None]
                assert same([found[at] for at in there], [wanted[at] for at in there])
                assert len(there) % 30 == 0  # whole batches
                sizes.append(len(there))
            assert sizes[-1] == half
        finished(writers)
        assert same(store.get(keys, tokens=True), wanted)
        assert store.damaged == 0
    assert sizes == sorted(sizes)
    (summary, *aside) = summaries(tmp_path)
    assert (summary.entries, summary.hits, summary.computed) == (1_200, 60, 1_800)
    assert len(aside) == (before == "damaged")


MEET = """
import time
logging.disable()
for each in sorted(folder.iterdir()):
    (each / f"here-{first}").touch()
    since = time.monotonic()
    while len(list(each.glob("here-*"))) < 4:
        assert time.monotonic() - since < 20, "another process has failed"
        time.sleep(0.0005)
    with Store(each, "%s", {}) as store:
        for n in (first, first + 10):
            store.put({key_of(n): record_of(n)})
"""


def test_processes_that_find_a_broken_file_together_move_it_once(tmp_path):
    """25 times four at once: moved twice, a new file and its journal would go the way of the damaged one."""
    folders = [tmp_path / f"{number:02}" for number in range(25)]
    for folder in folders:
        folder.mkdir()
        (folder / f"{REFERENCE}.sqlite").write_bytes(b"x" * 5_000)
    finished([process(MEET, tmp_path, first) for first in range(4)])
    for folder in folders:
        assert set_aside(folder) == [f"{REFERENCE}.sqlite.damaged-1"]
        with opened(folder) as store:
            numbers = [*range(4), *range(10, 14)]
            assert same(store.get([key_of(n) for n in numbers]), [record_of(n) for n in numbers])


def test_a_disk_error_that_passes_loses_nothing(tmp_path, monkeypatch):
    """As when another process moves the file in the middle of a commit: once more, on a connection of its own."""
    failures = iter([sqlite3.OperationalError("disk I/O error"), sqlite3.OperationalError("disk I/O error")])
    with opened(tmp_path) as store:
        store.put({key_of(0): record_of(0)})
        write = store._write

        def shaken(*args):
            for error in failures:
                raise database._in_plain_words(error, store.path)
            write(*args)

        monkeypatch.setattr(store, "_write", shaken)
        store.put({key_of(1): record_of(1)})
        assert same(store.get([key_of(0), key_of(1)]), [record_of(0), record_of(1)])
        failures = iter([sqlite3.OperationalError("disk I/O error")] * 3)
        with pytest.raises(ValueError, match=r"cannot be used: disk I/O error\. Check the disk"):
            store.put({key_of(2): record_of(2)})


KILLED = """
store = Store(folder, "%s", {})
for batch in range(1_000_000):
    store.put({key_of(n): record_of(n, True) for n in range(300 * batch, 300 * batch + 300)})
    print(batch, flush=True)
"""


@pytest.mark.parametrize("seed", range(5))
def test_a_killed_writer_loses_no_finished_batch(tmp_path, seed):
    choose = random.Random(seed)
    writer = process(KILLED, tmp_path)
    printed = [writer.stdout.readline() for _ in range(choose.randint(1, 6))]
    time.sleep(choose.uniform(0, 0.03))
    writer.kill()
    done = len(printed + writer.communicate()[0].splitlines())
    assert writer.returncode == -signal.SIGKILL
    with opened(tmp_path) as store:
        assert len(store) % 300 == 0
        batches = len(store) // 300
        assert done <= batches <= done + 1  # the last may be in the file without being printed
        numbers = range(300 * batches)
        found = store.get([key_of(number) for number in numbers], tokens=True)
        assert same(found, [record_of(number, True) for number in numbers])
    assert not set_aside(tmp_path)


KILLED_WITHIN = """
import os, signal
store = Store(folder, "%s", {})
store.put({key_of(n): record_of(n, True) for n in range(500)})
db = store._connection()
db.execute("PRAGMA cache_size = 1")  # pages reach the file before the transaction ends
db.create_function("kill", 0, lambda: os.kill(os.getpid(), signal.SIGKILL))
db.execute("BEGIN IMMEDIATE")
db.execute("UPDATE records SET logp = 1.0")
db.execute("SELECT kill()")
"""


def test_a_writer_killed_within_a_transaction_is_undone(tmp_path):
    writer = process(KILLED_WITHIN, tmp_path)
    writer.communicate()
    assert writer.returncode == -signal.SIGKILL
    path = tmp_path / f"{REFERENCE}.sqlite"
    assert (tmp_path / f"{REFERENCE}.sqlite-journal").stat().st_size > 512  # more than an empty header
    assert np.array([record_of(3).logp], ">f8").tobytes() not in path.read_bytes()  # the file itself is half changed
    with opened(tmp_path) as store:
        assert same(store.get([key_of(n) for n in range(500)], tokens=True), [record_of(n, True) for n in range(500)])
        assert store.damaged == 0


def test_a_forked_process_opens_a_connection_of_its_own(tmp_path):
    with opened(tmp_path) as store:
        store.put(records_of([0]))
        inherited = store._connection()
        if (child := os.fork()) == 0:
            failed = 1
            with contextlib.suppress(BaseException):
                store.put(records_of([1]))
                assert same(store.get([key_of(0)]), [record_of(0)])
                assert store._connection() is not inherited
                store.close()
                failed = 0
            os._exit(failed)
        assert os.waitpid(child, 0)[1] == 0
        assert store._connection() is inherited
        assert same(store.get([key_of(0), key_of(1)]), [record_of(0), record_of(1)])


def test_a_run_goes_on_when_its_file_is_deleted(tmp_path):
    """What it has cached is gone; what it caches from then on is not lost in a file without a name."""
    with opened(tmp_path) as store:
        store.put(records_of([0]))
        prune(tmp_path, references=[REFERENCE[:4]])
        assert not store.path.exists()
        store.put(records_of([1]))
    with opened(tmp_path) as store:
        assert same(store.get([key_of(0), key_of(1)]), [None, record_of(1)])


# --- where it is, and what is in it ---


def test_where_the_cache_is(monkeypatch):
    for name, value in {"HOME": "/home/me", "HF_HOME": "", "DPO_TRAINER_CACHE": ""}.items():
        monkeypatch.setenv(name, value)
    assert cache_folder(None, "reference") == Path("/home/me/.cache/huggingface/dpo_trainer/reference")
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert cache_folder(None, "reference") == Path("/home/me/hf/dpo_trainer/reference")
    monkeypatch.setenv("DPO_TRAINER_CACHE", "/fast")
    assert cache_folder(None, "reference") == Path("/fast/reference")
    assert cache_folder("~/given", "reference") == Path("/home/me/given")


def filled(folder: Path, references: Mapping[str, float]) -> None:
    """{reference: days since it was used}, with 100 records each."""
    for reference, days in references.items():
        with opened(folder, reference) as store:
            store.put(records_of(range(100)))
            used = time.time() - 86_400 * days
            store._connection().execute("UPDATE uses SET used = ?", (used,))


def names(found: list[Summary]) -> list[str]:
    return [each.reference for each in found]


def test_a_summary_says_what_is_there(tmp_path):
    filled(tmp_path, {"aa": 5, "bb": 2})
    start = datetime.now(timezone.utc)
    with opened(tmp_path, "cc") as store:
        store.put(records_of(range(4)) | records_of([4, 5], with_tokens=True))
        store.note_use(hits=10, computed=6)
        store.note_use(hits=5, computed=0)
    (tmp_path / "dd.sqlite").write_bytes(b"x" * 5_000)
    os.utime(tmp_path / "dd.sqlite", (0, 0))
    found = summaries(tmp_path)
    assert names(found) == ["cc", "bb", "aa", "dd"]
    assert found[0][:6] == ("cc", ABOUT, 6, 2, 15, 6)
    assert found[0].bytes == (tmp_path / "cc.sqlite").stat().st_size
    assert start - timedelta(seconds=1) < found[0].created <= found[0].used <= datetime.now(timezone.utc)
    assert [each.problem is None for each in found] == [True, True, True, False]
    assert "not a database" in found[-1].problem
    assert (tmp_path / "dd.sqlite").exists()  # looking changes nothing
    assert summaries(tmp_path / "none") == []


def test_prune_by_age_and_by_name(tmp_path):
    filled(tmp_path, {"aa11": 9, "aa22": 5, "bb11": 1, "cc11": 0})
    with pytest.raises(ValueError, match="'aa' fits several references: aa11, aa22"):
        prune(tmp_path, references=["bb", "aa"])
    with pytest.raises(ValueError, match="'x' fits none of: aa11, aa22, bb11, cc11"):
        prune(tmp_path, references=["x"])
    assert prune(tmp_path) == []
    assert len(summaries(tmp_path)) == 4
    assert sorted(names(prune(tmp_path, older_than=timedelta(days=7), references=["bb"]))) == ["aa11", "bb11"]
    assert names(summaries(tmp_path)) == ["cc11", "aa22"]


def test_prune_by_age_leaves_what_it_cannot_read_but_takes_what_was_set_aside(tmp_path):
    for name in ("aa.sqlite", "bb.sqlite.damaged-1", "notes.txt"):
        (tmp_path / name).write_bytes(b"x" * 5_000)
        os.utime(tmp_path / name, (0, 0))
    assert names(prune(tmp_path, older_than=timedelta(days=7))) == ["bb"]
    assert {path.name for path in tmp_path.iterdir()} == {"aa.sqlite", "notes.txt", "moving.lock"}
    assert names(prune(tmp_path, references=["a"])) == ["aa"]


def test_a_quota_takes_the_least_recently_used(tmp_path):
    filled(tmp_path, {"aa": 9, "bb": 7, "cc": 5, "dd": 3, "ee": 0.5})
    size = (tmp_path / "aa.sqlite").stat().st_size
    assert keep_within(tmp_path, 5 * size, sparing="aa") == []
    assert names(keep_within(tmp_path, 3 * size, sparing="aa")) == ["bb", "cc"]
    assert names(summaries(tmp_path)) == ["ee", "dd", "aa"]
    with pytest.raises(ValueError, match=rf"above its quota of {2 * size - 1:,} bytes.*--ref_cache_quota.*--prune"):
        keep_within(tmp_path, 2 * size - 1, sparing="aa")
    assert len(summaries(tmp_path)) == 3  # nothing is deleted in vain
    (tmp_path / "aa.sqlite.damaged-1").write_bytes(b"x" * 10)
    assert names(keep_within(tmp_path, 3 * size, sparing="aa")) == ["aa"]
    assert names(summaries(tmp_path)) == ["ee", "dd", "aa"]


def test_opening_a_reference_counts_as_use(tmp_path):
    """Else a run that has just found its old cache could lose it to the quota of another."""
    filled(tmp_path, {"aa": 9})
    with opened(tmp_path, "aa"):
        assert prune(tmp_path, older_than=timedelta(days=1)) == []
    assert summaries(tmp_path)[0].hits == 0


def test_prune_waits_for_a_writer(tmp_path, monkeypatch):
    """Deleted in the middle of a transaction, its journal would be played back into the next file of that name."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.05)
    filled(tmp_path, {"aa": 9})
    with contextlib.closing(sqlite3.connect(tmp_path / "aa.sqlite", isolation_level=None)) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("DELETE FROM records")
        with pytest.raises(ValueError, match="another process has held it"):
            prune(tmp_path, references=["aa"])
        writer.execute("ROLLBACK")
    assert summaries(tmp_path)[0].entries == 100


def test_new_descriptions_replace_old_ones(tmp_path):
    opened(tmp_path).close()
    Store(tmp_path, REFERENCE, {"model": "moved/llama"}).close()
    assert summaries(tmp_path)[0].about == ABOUT | {"model": "moved/llama"}


@pytest.fixture(autouse=True)
def _log_of_the_store(caplog):
    caplog.set_level(logging.WARNING, logger=cache.__name__)
