"""Kill a training process (SIGKILL) again and again, at random moments of every phase, and start it again each time.

    python tests/faults/kill_test.py                                   # 30 kills or more of each kind of run; half an hour
    python tests/faults/kill_test.py --kills 6 --each 1 --kinds lora   # what the tests do

Kills add up on one run until it ends; then the next run begins. Each must end with the weights, the log, the files and the
caches of a run that nothing disturbed, which is a process of its own. Of a run on two ranks one is killed, and a moment later
both. Prints a table of the kills by kind and phase; exit code 1, and the folder is kept, if one run ended otherwise.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import run  # first: it sets what libraries read
from phases import PHASES, announce_phases, begun, innermost, phase_of
from run import KINDS, Kind

from dpo_trainer.checkpointing import ASIDE, broken_file

PAUSE = 0.02  # seconds at both ends of a part
PATIENCE = 120.0  # seconds that a process may take
ONLY_ONCE = ("tokenization", "precompute")
"""Phases that a run has behind it for good, once the next phase has begun."""


class Moment(NamedTuple):
    phase: str
    occurrence: int  # parts of the phase that have begun in this process
    delay: float  # seconds after


NEVER = Moment("step", sys.maxsize, 0.0)


@dataclass
class Tally:
    """What happened, over all runs of a kind, and how many kills there should be."""

    kind: Kind
    wanted: int
    each: int  # in each phase
    kills: Counter[str] = field(default_factory=Counter)  # by innermost part
    starts: int = 0
    resumed: int = 0  # starts that found a checkpoint
    skipped: int = 0  # checkpoints that were passed over as broken
    ended: int = 0  # runs

    def of(self, phase: str) -> int:
        return sum(count for part, count in self.kills.items() if phase_of(part) == phase)

    @property
    def enough(self) -> bool:
        return self.kills.total() >= self.wanted and all(self.of(phase) >= self.each for phase in self.kind.phases)

    def read_log(self, log: str) -> None:
        self.resumed += log.count("Resuming from ")
        self.skipped += log.count(" is skipped: ")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="at least so many of each kind")
    parser.add_argument("--each", type=int, default=3, help="at least so many in each phase of each kind")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="of runs, in turn")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="dpo-trainer-faults-"))
    began = time.monotonic()
    tallies = {kind: Tally(KINDS[kind], given.kills, given.each) for kind in given.kinds}
    try:
        with judge():
            for kind, tally in tallies.items():
                test(folder, kind, random.Random(given.seed), tally)
                print(f"{kind}: {tally.kills.total()} kills ({time.monotonic() - began:.0f} s)", flush=True)
    except AssertionError as error:
        print(report(tallies), f"FAILED in {folder} (seed {given.seed}): {error}", sep="\n")
        return 1
    shutil.rmtree(folder)
    print(report(tallies))
    runs, seconds = sum(tally.ended for tally in tallies.values()), time.monotonic() - began
    print(f"All {runs} runs ended in the weights of the uninterrupted run ({seconds:.0f} s).")
    return 0


@contextlib.contextmanager
def judge() -> Iterator[None]:
    """A server in a process of its own, since a process with threads cannot be forked safely."""
    command = [sys.executable, str(Path(__file__).with_name("judge.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        os.environ[run.JUDGE] = server.stdout.readline().strip()
        try:
            yield
        finally:
            server.kill()


def test(folder: Path, kind: str, draw: random.Random, tally: Tally) -> None:
    """AssertionError, where a run does not end as one that nothing disturbed."""
    want = folder / f"undisturbed {kind}"
    process = undisturbed(want, kind)
    try:
        for number in itertools.count():
            assert number < 5 + tally.wanted, "the kills hit too rarely"
            killed_run(there := folder / f"run {number} {kind}", kind, draw, tally)
            tally.read_log((there / "log.txt").read_text())
            assert tally.skipped == 0, f"{there}: a checkpoint was found broken"
            assert process.wait(timeout=PATIENCE) == 0, f"see log.txt in {want}"
            assert_same_ending(there, want)
            tally.ended += 1
            if tally.enough:
                return
    finally:
        process.kill()


def undisturbed(folder: Path, kind: str) -> subprocess.Popen:
    """An ordinary process, which announces nothing. It runs beside the others."""
    folder.mkdir()
    ranks = KINDS[kind].ranks
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={unused_port()}"]
    command = [sys.executable, *(launcher if ranks > 1 else []), run.__file__, str(folder), "--kind", kind]
    with (folder / "log.txt").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


def killed_run(folder: Path, kind: str, draw: random.Random, tally: Tally) -> None:
    """Start it, kill it, and again, until it has come to its end."""
    folder.mkdir()
    passed: set[str] = set()  # phases that this run will not come to again
    for life in itertools.count():
        said = folder / f"phases {life}.txt"
        moment = NEVER if tally.enough else draw_moment(passed, draw, tally)
        tally.starts += 1
        code = until(moment, started(folder, kind, said), said)
        if code is not None:
            assert code == 0, f"{folder} stopped with exit code {code}: see log.txt there"
            return
        lines = lines_of(said)
        tally.kills[innermost(lines)] += 1
        for phase in ONLY_ONCE:
            later = PHASES[PHASES.index(phase) + 1 :]
            if any(begun(lines, name) for name in later):
                passed.add(phase)
        assert life < 5 + tally.wanted, f"{folder} does not come to an end"


def draw_moment(passed: set[str], draw: random.Random, tally: Tally) -> Moment:
    """Of the phase that had the fewest kills, and the earliest of those: some come once in a run."""
    phases = tally.kind.phases
    phase = min((phase for phase in PHASES if phase in phases and phase not in passed), key=tally.of)
    return Moment(phase, draw.randint(1, phases[phase]), draw.uniform(0, 3 * PAUSE))


def started(folder: Path, kind: str, said: Path) -> int:
    """A process of the run, which leads a process group with the other ranks. Forked: the ten seconds of imports are paid once."""
    wait_for_threads()
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        log = os.open(folder / "log.txt", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        rank = become_rank(KINDS[kind].ranks)
        announce_phases(said if rank == 0 else Path(os.devnull), PAUSE)
        run.train(folder, kind)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def become_rank(ranks: int) -> int:
    """Of 2 ranks or more, the others are forked from this process; their environment is the one that torchrun gives."""
    if ranks == 1:
        return 0
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused_port()), "WORLD_SIZE": str(ranks)}
    rank = next((rank for rank in range(1, ranks) if os.fork() == 0), 0)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
    return rank


def unused_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for_threads() -> None:
    """Until none is left that could hold a lock, which would stay locked in a forked process."""
    deadline = time.monotonic() + 5
    while other_threads():
        assert time.monotonic() < deadline, "a thread is left: this process cannot be forked safely"
        time.sleep(0.01)


def other_threads() -> list[str]:
    """Their names, where the system tells. jemalloc's own is left out: jemalloc unlocks what it must in a forked process."""
    names = []
    for task in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has just ended
            if task.name != str(os.getpid()):
                names.append((task / "comm").read_text().strip())
    return [name for name in names if not name.startswith("jemalloc")]


def until(moment: Moment, child: int, said: Path) -> int | None:
    """Wait for the moment, and kill; or for the end. The exit code of a process that came to its end before (-9 for signal 9)."""
    deadline = time.monotonic() + PATIENCE
    while begun(lines_of(said), moment.phase) < moment.occurrence:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"{said}: still running after {PATIENCE} s")
        time.sleep(0.002)
    time.sleep(moment.delay)
    killed = other_ranks(child)[:1]
    for rank in killed:  # the main process goes on alone, until it needs the other
        os.kill(rank, signal.SIGKILL)
        time.sleep(moment.delay)
    os.killpg(child, signal.SIGKILL)  # ended or not, it is there until it is waited for
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return None if killed or code == -signal.SIGKILL else code


def other_ranks(child: int) -> list[int]:
    children = Path(f"/proc/{child}/task/{child}/children")
    return [int(number) for number in children.read_text().split()] if children.exists() else []


def lines_of(said: Path) -> list[str]:
    return said.read_text().splitlines() if said.exists() else []


def ending(folder: Path) -> dict[str, object]:
    """What two runs that ended must have in common."""
    result = json.loads((folder / "result.json").read_text())
    out = folder / "out"
    return {
        **result,
        "moved": result["start"] != result["weights"],
        "saved weights": {file.name: file.read_bytes() for file in out.glob("*.safetensors")},
        "files": sorted(entry.name for entry in out.iterdir()),
        "unfinished": (out / ASIDE).exists(),
        "broken": {path.name: reason for path in out.glob("checkpoint-*") if (reason := broken_file(path))},
        "references": cached(folder / "references", "records"),
        "verdicts": cached(folder / "verdicts", "verdicts"),
    }


def cached(folder: Path, table: str) -> object:
    """All that a cache on disk holds; None where there is none."""
    if not folder.exists():
        return None
    cache, *others = folder.iterdir()
    assert not others, f"{folder}: a journal, or what was set aside as damaged: {others}"
    with contextlib.closing(sqlite3.connect(cache)) as db:
        integrity = db.execute("PRAGMA integrity_check").fetchall()
        return cache.name, integrity, db.execute(f"SELECT * FROM {table} ORDER BY key").fetchall()


def assert_same_ending(folder: Path, undisturbed: Path) -> None:
    got, want = ending(folder), ending(undisturbed)
    assert want["moved"], "a run that learns nothing shows nothing"
    assert not want["broken"]
    assert not want["unfinished"]
    different = [name for name in want if got[name] != want[name]]
    short = {name: (got[name], want[name]) for name in different if len(repr(want[name])) < 500}
    assert not different, f"{folder} ended with other {', '.join(different)}; (this, undisturbed): {short}"


def report(tallies: Mapping[str, Tally]) -> str:
    """Kills by kind of run and phase: a table in Markdown, and what lay within the phases."""
    names = [*PHASES, "between"]
    lines = ["| | " + " | ".join([*names, "kills", "starts", "resumed"]) + " |"]
    lines.append("| --- |" + " ---: |" * (len(names) + 3))
    for kind, tally in tallies.items():
        counts = [tally.of(name) or "" for name in names]
        lines.append(
            f"| {kind} | " + " | ".join(map(str, [*counts, tally.kills.total(), tally.starts, tally.resumed])) + " |"
        )
    everything = sum((tally.kills for tally in tallies.values()), Counter())
    for phase in PHASES:
        parts = {part: count for part, count in sorted(everything.items()) if phase_of(part) == phase}
        lines.append(
            f"{phase}: " + ", ".join(f"{part.partition(':')[2] or 'elsewhere'} {n}" for part, n in parts.items())
        )
    skipped = sum(tally.skipped for tally in tallies.values())
    lines.append(f"{everything.total()} kills, {skipped} checkpoints skipped as broken.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
