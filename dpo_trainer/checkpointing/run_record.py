"""Which run an output folder belongs to: its checkpoints are resumed by `auto` and retired; those of other runs are left alone."""

from __future__ import annotations

import json
import logging
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .manifest import run_of, sync

logger = logging.getLogger(__name__)

RECORD = "run.json"
VERSION = 1


def new_run() -> str:
    """A name that no other run has."""
    return uuid.uuid4().hex


@dataclass(frozen=True)
class RunRecord:
    """A run by its id, "" for one of a release that gave none. `before`: the runs that it went on from, each with the
    last step that belongs to it; their later checkpoints belong to no run that is alive."""

    run: str = field(default_factory=new_run)
    before: dict[str, int] = field(default_factory=dict)

    def owns(self, checkpoint: Path, step: int) -> bool:
        run = run_of(checkpoint)
        return run is not None and (run == self.run or step <= self.before.get(run, -1))

    def back_at(self, run: str, step: int) -> RunRecord:
        """A new run, which goes on from `step` of `run` as this one did, and not from what came after it."""
        kept = {name: min(last, step) for name, last in self.before.items()}
        return RunRecord(before={**kept, run: step})


def read_record(output_dir: Path) -> RunRecord | None:
    """None where there is none, or one that cannot be read, with a warning."""
    path = output_dir / RECORD
    try:
        found = json.loads(path.read_bytes())
        return RunRecord(_text(found["run"]), {_text(run): int(step) for run, step in found["before"].items()})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        logger.warning(f"{path} cannot be read ({error}): any checkpoint beside it is taken for one of this run.")
        return None


def write_record(output_dir: Path, record: RunRecord, aside: Path) -> None:
    """Whole or not at all. `aside`: a folder on the same disk, where what a kill leaves is removed later."""
    aside.mkdir(exist_ok=True, parents=True)
    written = aside / RECORD
    written.write_text(json.dumps({"version": VERSION, **asdict(record)}))
    sync(written)
    written.replace(output_dir / RECORD)
    sync(output_dir)
    with suppress(OSError):  # something else is in it
        aside.rmdir()


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value
