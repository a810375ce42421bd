"""Checkpoints whose weights have not been shown to be finite yet."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .failed import mark_failed, unmark
from .folders import retire


class UnprovenCheckpoints:
    """The checkpoints since which no forward pass was finite, on all ranks: older ones are kept until one was.

    Args:
        writes: whether this process writes the checkpoints of the run.
        resumed: the checkpoint that the run continues from, if any.
    """

    def __init__(self, *, writes: bool, resumed: str | None = None):
        self.writes = writes
        self.paths = [] if resumed is None else [Path(resumed)]

    def replace_by(self, newest: Path, *, limited: bool, best: str | None) -> None:
        """`newest` was written. With a limit on checkpoints, the earlier ones that are not proven make room, except the best."""
        earlier, self.paths = [path for path in self.paths if path != newest], [newest]
        if self.writes and limited:
            for checkpoint in earlier:
                if checkpoint.parent == newest.parent and str(checkpoint) != best:
                    retire(checkpoint)

    def prove(self) -> bool:
        """A forward pass was finite. Returns whether a checkpoint was proven by it, and older ones may be deleted."""
        proven, self.paths = self.paths, []
        for checkpoint in proven if self.writes else ():
            unmark(checkpoint)
        return bool(proven)

    def mark_failed(self, run_folder: Path, problem: str) -> str:
        """Mark those of the run in `run_folder` as failed. Returns what an error says of them."""
        own = list(_inside(self.paths, run_folder))
        for checkpoint in own if self.writes else ():
            mark_failed(checkpoint, problem)
        self.paths = []
        if not own:
            return ""
        return (
            f" No step after {own[-1]} was finite, so that it is marked: --resume_from_checkpoint auto goes on from the one before "
            "it, or begins anew where there is none. Name it to resume it all the same."
        )


def _inside(paths: Iterable[Path], folder: Path) -> Iterable[Path]:
    return (path for path in paths if path.parent.resolve() == folder.resolve())
