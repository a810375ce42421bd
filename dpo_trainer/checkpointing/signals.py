"""Signals that end a run after its step: which, what exit code they give, and the command that goes on."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

from .lasting_output import lasting_output

STOPPED_BY_SIGNAL = 75
"""Exit code of a script whose run was told to stop from outside, and saved: "try again" (EX_TEMPFAIL of sysexits.h)."""

INTERRUPTED = 130
"""Exit code of a script that was ended by Ctrl-C, whether it saved or not: 128 + SIGINT, as shells have it. Not to be tried again."""

HEEDED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
FLAG = "--resume_from_checkpoint"
BY_LAUNCHER = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")
"""Environment variables of processes that torchrun and accelerate launch start."""

COMMAND: ContextVar[str | None] = ContextVar("command that goes on", default=None)
"""Set by a script."""


class StopSignals:
    """What this process was told while it trains. SIGTERM, SIGHUP and a first Ctrl-C wait for the step; a second Ctrl-C does not."""

    def __init__(self, *, says: bool = True) -> None:
        self.says = says  # one rank for all
        self.begin()

    def begin(self) -> None:
        self.first: signal.Signals | None = None
        self.interrupted = False  # by Ctrl-C

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Python delivers signals to its main thread alone, and a notebook has its own use for them: there they are left as they are.

        So are those that the process ignores (nohup), or that have a handler outside of Python.
        """
        if threading.current_thread() is not threading.main_thread() or in_notebook():
            yield
            return
        self.process = os.getpid()
        before = {number: signal.getsignal(number) for number in HEEDED}
        own = [number for number, handler in before.items() if handler not in (signal.SIG_IGN, None)]
        for number in own:
            signal.signal(number, self._note)
        try:
            with lasting_output(lambda: self.first is not None):
                yield
        finally:
            for number in own:
                signal.signal(number, before[number])

    def _note(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:
            self._note_in_fork(number)
            return
        if number == signal.SIGINT:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True
            if self.says:
                say("\nCtrl-C: the step is finished and saved. Press Ctrl-C again to end at once, without saving.\n")
        if self.first is None:
            self.first = signal.Signals(number)

    def _note_in_fork(self, number: int) -> None:
        """A worker of a data loader: a terminal signals it too, and the run needs it for its last step."""
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def say(text: str) -> None:
    """To the terminal, from within a signal handler, where streams of Python may be locked."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())


def in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this."""
    module = sys.modules.get("IPython")
    shell = module.get_ipython() if module is not None and hasattr(module, "get_ipython") else None
    return getattr(shell, "kernel", None) is not None


# --- the command that goes on ---


def how_to_go_on() -> str:
    """The command line of the script that runs, else the call in Python."""
    return COMMAND.get() or 'trainer.train(resume_from_checkpoint="auto"), of a trainer that is made as this one was'


def command_that_goes_on(argv: Sequence[str] | None, script: str) -> str:
    """That of this process, as a shell takes it, with `--resume_from_checkpoint auto`.

    `argv`: the arguments where a script was called with some; None: those of the process.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    start = sys.orig_argv[: len(sys.orig_argv) - len(arguments)] if argv is None else ["python", script]
    launched = any(name in os.environ for name in BY_LAUNCHER)
    if launched:  # what they were called with is not known here
        start = sys.argv[:1] if argv is None else [script]
    line = shlex.join([*start, *_without_flag(arguments), FLAG, "auto"])
    return f"the launcher of this run (torchrun, accelerate launch) with {line}" if launched else line


def _without_flag(words: list[str]) -> list[str]:
    """Without FLAG and its value."""
    kept, of_flag = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_flag = name.replace("-", "_") == FLAG.replace("-", "_")
        if not is_flag and not of_flag:
            kept.append(word)
        of_flag = is_flag and not equals
    return kept


@contextlib.contextmanager
def telling_command(argv: Sequence[str] | None, script: str) -> Iterator[None]:
    """Around a script: a run that is told to stop names its command line, and a Ctrl-C that ends it at once is no traceback."""
    command = command_that_goes_on(argv, script)
    before = COMMAND.set(command)
    try:
        yield
    except KeyboardInterrupt:
        say(f"\n{script}: ended by Ctrl-C. If there is a checkpoint, this command resumes from it:\n  {command}\n")
        raise SystemExit(INTERRUPTED) from None
    finally:
        COMMAND.reset(before)
