"""What a script shows of an error: one message, and where it came from on request."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Sequence
from types import TracebackType

from ..printable import printable_lines

FLAG = "--traceback"
PATIENCE = 3.0  # seconds


class OneMessage:
    """Around a script: an error of options, data, models or disks ends it with one message and exit code 1.

    Shown with its traceback: every error after `--traceback true`, and those of other kinds, which may be faults of a program.
    Of several ranks the main process speaks. The others wait until the launcher stops them, and speak if it does not: their
    error is then one of their own.

    Args:
        script: its name, which begins the message.
        argv: the command line, None for that of the process. Read before it is parsed, for parsing fails as well.
    """

    def __init__(self, script: str, argv: Sequence[str] | None = None):
        self.script = script
        self.traceback = _asked_for(sys.argv[1:] if argv is None else argv)

    def __enter__(self) -> OneMessage:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if error is None or self.traceback or not _says_what_to_do(error):
            return
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(PATIENCE)
        who = f"{self.script} (rank {rank})" if rank else self.script
        raise SystemExit(f"{who}: {printable_lines(_text(error))}") from None


def _text(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) and "ulimit" not in text:
        return f"{text}. Raise the limit of open files (ulimit -n), or lower --dataloader_num_workers."
    return text


def _says_what_to_do(error: BaseException) -> bool:
    # torch's OutOfMemoryError is a RuntimeError. By its name, for torch takes seconds to import.
    ours, name = type(error).__module__.startswith(f"{__package__.partition('.')[0]}."), type(error).__name__
    return ours or name == "OutOfMemoryError" or isinstance(error, ValueError | OSError | FloatingPointError)


def _asked_for(argv: Sequence[str]) -> bool:
    for place, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name == FLAG:
            following = argv[place + 1 : place + 2]
            value = value or "".join(word for word in following if not word.startswith("-"))
            return value.lower() not in ("false", "no", "0", "f", "n")
    return False
