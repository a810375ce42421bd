"""Output that may lose its reader: a run that is told to stop saves all the same."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
from collections.abc import Callable, Iterator
from typing import Any


class LastingStream:
    """Writes to `stream` until its reader has gone; what comes later goes nowhere.

    A Ctrl-C that stops a run ends `tee` behind it too, and a terminal that closes takes both: the log line of the last step would
    raise before the save. `stopping` says whether the run was told to stop. Without that a pipe that closed stays an error.
    """

    def __init__(self, stream: Any, stopping: Callable[[], bool]):
        self.stream, self.stopping = stream, stopping

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._lasting(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._lasting(self.stream.flush)

    def _lasting(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except OSError as error:
            # A terminal that has gone says EIO, perhaps before its signal arrives.
            if error.errno != errno.EIO and not (error.errno == errno.EPIPE and self.stopping()):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)
            self.stream.flush()  # what it still holds


@contextlib.contextmanager
def lasting_output(stopping: Callable[[], bool]) -> Iterator[None]:
    """While it trains: `sys.stdout` and `sys.stderr`, where they lead to a terminal or a pipe."""
    before = sys.stdout, sys.stderr
    lasting = [LastingStream(stream, stopping) if _has_reader(stream) else stream for stream in before]
    sys.stdout, sys.stderr = lasting
    try:
        yield
        for stream in lasting:
            if stopping() and stream is not None:
                stream.flush()  # not as Python ends, which would change the exit code
    finally:
        sys.stdout, sys.stderr = before


def _has_reader(stream: Any) -> bool:
    try:
        kind = os.fstat(stream.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # no stream, or none of the system
        return False
    return stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind) or stat.S_ISCHR(kind)
