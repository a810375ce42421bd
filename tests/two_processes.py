"""Processes that have all imports behind them, which take eight seconds each: two ranks of a script, or a script alone.

    torchrun(HERE / "worker.py", folder)                 both have ended well, or this is an AssertionError
    done = run_script(ROOT / "scripts" / "x.py", "--help")

They are forked from a process that has imported what they need and done nothing else; each process of tests has one.
What torchrun itself does, where ranks die, is in distributed/test_restart.py. Each script of a user is also started as a
user does, somewhere, with all its imports.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

HERE = Path(__file__).parent
IMPORTED = ["tiny", "dpo_trainer.online.trainer", "deepspeed"]


class Ended(NamedTuple):
    codes: list[int]  # as of `subprocess`: -9 of a process that was killed
    stdout: str
    stderr: str


def torchrun(script: Path, *arguments: object, ranks: int = 2, timeout: float = 300) -> None:
    """`script` on every rank, until all have ended. It finds `dpo_trainer`, and what tests share, of this tree.

    `timeout`: in seconds, for all of it. Ranks that wait for each other should say so before it is over.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # where they meet, on a port that is free
    places = [environment_of(rank, ranks, store.port) for rank in range(ranks)]
    ended = forked([script, *arguments], places, timeout)
    assert ended.codes == [0] * ranks, f"{ended.codes}\n{ended.stdout[-2000:]}{ended.stderr[-6000:]}"


def environment_of(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank of the only node."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return {name: str(value) for name, value in (places | meeting).items()}


def run_script(script: Path, *arguments: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` would: in this folder, with these variables of the environment."""
    ended = forked([script, *arguments], [{}], timeout)
    return subprocess.CompletedProcess([script, *arguments], ended.codes[0], ended.stdout, ended.stderr)


def forked(command: Iterable[object], environments: list[dict[str, str]], timeout: float) -> Ended:
    """One process for each of `environments`, which are added to that of this process."""
    with TemporaryDirectory() as folder:
        job = {
            "command": [str(word) for word in command],
            "environments": [os.environ | environment for environment in environments],
            "cwd": str(Path.cwd()),
            "outputs": [f"{folder}/stdout", f"{folder}/stderr"],
            "timeout": timeout,
        }
        server = serving()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        answer = server.stdout.readline()
        assert answer, f"the process that is forked has ended with {server.wait()}"
        return Ended(json.loads(answer), *(Path(output).read_text() for output in job["outputs"]))


@cache
def serving() -> subprocess.Popen[str]:
    own = {
        "OMP_NUM_THREADS": "1",  # a process without threads can be forked
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    command, pipe = [sys.executable, __file__], subprocess.PIPE
    server = subprocess.Popen(command, env=os.environ | own, stdin=pipe, stdout=pipe, text=True)
    atexit.register(server.communicate)  # closes its input, which ends it
    return server


# --- the process that is forked ---


def serve() -> None:
    """A job for each line of the input, answered with the exit codes."""
    for name in IMPORTED:
        if importlib.util.find_spec(name.partition(".")[0]):
            importlib.import_module(name)
    gc.freeze()  # as in conftest.py
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)


def run(environments: list[Mapping[str, str]], timeout: float, **process: object) -> list[int]:
    """Until all have ended. The others are killed where one fails, and all when time is up."""
    running = {fork(environment, **process): rank for rank, environment in enumerate(environments)}
    codes = [0] * len(running)
    deadline = time.monotonic() + timeout
    while running:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            code = codes[running.pop(child)] = os.waitstatus_to_exitcode(status)
            deadline = deadline if code == 0 else 0.0
        elif time.monotonic() < deadline:
            time.sleep(0.01)
        else:
            for other in running:
                os.kill(other, signal.SIGKILL)
            deadline = float("inf")
    return codes


def fork(environment: Mapping[str, str], command: list[str], cwd: str, outputs: list[str]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for number, output in enumerate(outputs, start=1):
            os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(environment)
        code = become(command)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def become(command: list[str]) -> int:
    """This process is now `python <command>`. Returns its exit code."""
    sys.argv[:] = command
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


if __name__ == "__main__":
    serve()
