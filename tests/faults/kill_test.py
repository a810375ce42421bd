"""Kill a training process (SIGKILL) again and again, at random moments of every phase, and start it again each time.

    python tests/faults/kill_test.py                                   # 30 kills or more, full and LoRA in turn; some 2 minutes
    python tests/faults/kill_test.py --kills 6 --each 1 --kinds lora   # what the tests do

Kills add up on one run until it ends; then the next run begins. Each must end with the weights, the log, the files and the
cache of a run that nothing disturbed, which is a process of its own. Prints a table of the kills by phase; exit code 1, and
the folder is kept, if one run ended otherwise.
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
import sqlite3
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import run  # first: it sets what libraries read
from phases import PHASES, announce_phases, begun, innermost, phase_of

from dpo_trainer.checkpoints import ASIDE, broken_file

PAUSE = 0.02  # seconds at both ends of a part
PATIENCE = 120.0  # seconds that a process may take
HIGHEST = {"tokenization": 5, "precompute": 10, "step": 14, "eval": 6, "save": 24}
"""Up to which occurrence of a phase within one process a moment is drawn. A run that ends before it has ended."""


class Moment(NamedTuple):
    phase: str
    occurrence: int  # parts of the phase that have begun in this process
    delay: float  # seconds after


NEVER = Moment("step", sys.maxsize, 0.0)


@dataclass
class Tally:
    """What happened, over all runs, and how many kills there should be."""

    wanted: int
    each: int  # in each phase
    kills: Counter[str] = field(default_factory=Counter)  # by innermost part
    starts: int = 0
    resumed: int = 0  # starts that found a checkpoint
    skipped: int = 0  # checkpoints that were passed over as broken
    ended: Counter[str] = field(default_factory=Counter)  # runs by kind

    def of(self, phase: str) -> int:
        return sum(count for part, count in self.kills.items() if phase_of(part) == phase)

    @property
    def enough(self) -> bool:
        return self.kills.total() >= self.wanted and all(self.of(phase) >= self.each for phase in PHASES)

    def read_log(self, log: str) -> None:
        self.resumed += log.count("Resuming from ")
        self.skipped += log.count(" is skipped: ")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="at least so many")
    parser.add_argument("--each", type=int, default=4, help="at least so many in each of the five phases")
    parser.add_argument(
        "--kinds", nargs="+", choices=["full", "lora"], default=["full", "lora"], help="of runs, in turn"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp(prefix="dpo-trainer-faults-"))
    began, tally = time.monotonic(), Tally(given.kills, given.each)
    try:
        test(folder, given.kinds, random.Random(given.seed), tally)
    except AssertionError as error:
        print(report(tally), f"FAILED in {folder} (seed {given.seed}): {error}", sep="\n")
        return 1
    shutil.rmtree(folder)
    print(report(tally))
    print(
        f"All {tally.ended.total()} runs ended in the weights of the uninterrupted run ({time.monotonic() - began:.0f} s)."
    )
    return 0


def test(folder: Path, kinds: list[str], draw: random.Random, tally: Tally) -> None:
    """AssertionError, where a run does not end as one that nothing disturbed."""
    want = {kind: folder / f"undisturbed {kind}" for kind in kinds}
    processes = {kind: undisturbed(there, kind) for kind, there in want.items()}
    try:
        for number, kind in zip(itertools.count(), itertools.cycle(want)):
            if tally.enough and all(tally.ended[kind] for kind in kinds):
                return
            assert number < 5 + tally.wanted, "the kills hit too rarely"
            killed_run(there := folder / f"run {number} {kind}", kind, draw, tally)
            tally.read_log((there / "log.txt").read_text())
            assert tally.skipped == 0, f"{there}: a checkpoint was found broken"
            assert processes[kind].wait(timeout=PATIENCE) == 0, f"see log.txt in {want[kind]}"
            assert_same_ending(there, want[kind])
            tally.ended[kind] += 1
    finally:
        for process in processes.values():
            process.kill()


def undisturbed(folder: Path, kind: str) -> subprocess.Popen:
    """An ordinary process, which announces nothing. It runs beside the others."""
    folder.mkdir()
    command = [sys.executable, run.__file__, str(folder), *(["--lora"] if kind == "lora" else [])]
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
        status = until(moment, started(folder, kind, said), said)
        if not os.WIFSIGNALED(status):
            assert status == 0, (
                f"{folder} stopped with exit code {os.waitstatus_to_exitcode(status)}: see log.txt there"
            )
            return
        assert os.WTERMSIG(status) == signal.SIGKILL, f"{folder} died of signal {os.WTERMSIG(status)}"
        lines = lines_of(said)
        tally.kills[innermost(lines)] += 1
        if begun(lines, "precompute"):
            passed.add("tokenization")
        if begun(lines, "step"):
            passed.add("precompute")
        assert life < 5 + tally.wanted, f"{folder} does not come to an end"


def draw_moment(passed: set[str], draw: random.Random, tally: Tally) -> Moment:
    """Of the phase that had the fewest kills, and the earliest of those: the first two come once in a run."""
    phase = min((phase for phase in PHASES if phase not in passed), key=tally.of)
    return Moment(phase, draw.randint(1, HIGHEST[phase]), draw.uniform(0, 3 * PAUSE))


def started(folder: Path, kind: str, said: Path) -> int:
    """A process of the run. Forked: the ten seconds of imports are paid once. It leads a process group of its own."""
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
        announce_phases(said, PAUSE)
        run.train(folder, lora=kind == "lora")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


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


def until(moment: Moment, child: int, said: Path) -> int:
    """Wait for the moment, and kill; or for the end. The status as `os.waitpid` tells it."""
    deadline = time.monotonic() + PATIENCE
    while begun(lines_of(said), moment.phase) < moment.occurrence:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError(f"{said}: still running after {PATIENCE} s")
        time.sleep(0.002)
    time.sleep(moment.delay)
    os.killpg(child, signal.SIGKILL)  # ended or not, it is there until it is waited for
    return os.waitpid(child, 0)[1]


def lines_of(said: Path) -> list[str]:
    return said.read_text().splitlines() if said.exists() else []


def ending(folder: Path) -> dict[str, object]:
    """What two runs that ended must have in common."""
    result = json.loads((folder / "result.json").read_text())
    out = folder / "out"
    cache, *others = (folder / "references").iterdir()
    assert not others, f"{folder}: a journal, or what was set aside as damaged: {others}"
    with contextlib.closing(sqlite3.connect(cache)) as db:
        integrity = db.execute("PRAGMA integrity_check").fetchall()
        records = db.execute("SELECT * FROM records ORDER BY key").fetchall()
    return {
        **result,
        "moved": result["start"] != result["weights"],
        "saved weights": {file.name: file.read_bytes() for file in out.glob("*.safetensors")},
        "files": sorted(entry.name for entry in out.iterdir()),
        "unfinished": (out / ASIDE).exists(),
        "broken": {path.name: reason for path in out.glob("checkpoint-*") if (reason := broken_file(path))},
        "cache": (cache.name, integrity, records),
    }


def assert_same_ending(folder: Path, undisturbed: Path) -> None:
    got, want = ending(folder), ending(undisturbed)
    assert want["moved"], "a run that learns nothing shows nothing"
    assert not want["broken"]
    assert not want["unfinished"]
    different = [name for name in want if got[name] != want[name]]
    short = {name: (got[name], want[name]) for name in different if len(repr(want[name])) < 500}
    assert not different, f"{folder} ended with other {', '.join(different)}; (this, undisturbed): {short}"


def report(tally: Tally) -> str:
    lines = []
    for phase in PHASES:
        parts = {part: count for part, count in sorted(tally.kills.items()) if phase_of(part) == phase}
        detail = ", ".join(f"{part.partition(':')[2] or 'elsewhere'} {count}" for part, count in parts.items())
        lines.append(f"{phase:<14}{tally.of(phase):>4}   {detail}".rstrip())
    lines.append(f"{'between':<14}{tally.of('between'):>4}")
    lines.append(f"{'kills':<14}{tally.kills.total():>4}")
    lines.append(
        f"{tally.starts} starts, {tally.resumed} of them resumed from a checkpoint, {tally.skipped} checkpoints skipped as broken."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
