"""Everything an inspection found, as numbers: what inspection.json holds, and what terminal and page are written from."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from ..data.report import DROPPED, KEPT
from .checks import Count, EndingCounts, TemplateCounts
from .estimate import Memory, Steps
from .measure import BatchTokens, Histogram, LengthBias, Lengths
from .show import ShownRow
from .similar import Repeats, Similar

FORMAT = 1
"""Of inspection.json: raised when a key changes its meaning."""


@dataclass(frozen=True, kw_only=True)
class RowError:
    row: int
    error: str


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """What became of the rows. `outcomes` has every kind of data/report.py, `first_rows` the row numbers that come first."""

    read: int
    of: int | None  # how many there are; None: a stream does not say
    bad: int
    kept: int
    pairs: int
    forms: dict[str, int]
    outcomes: dict[str, int]
    first_rows: dict[str, list[int]]
    pairs_left_out: int
    errors: list[RowError] = field(default_factory=list)  # the first ones

    @property
    def dropped(self) -> int:
        return sum(self.outcomes[kind] for kind in DROPPED)

    @property
    def truncated(self) -> dict[str, int]:
        return {kind: self.outcomes[kind] for kind in KEPT if kind.startswith("truncated")}


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Of one dataset, for one tokenizer and the options of one run."""

    dataset: str
    parts: list[tuple[str, int]]  # of a mixture: its datasets, and the number of each one's first row; else empty
    model: str
    options: dict[str, Any]  # of DPOConfig: those that the numbers depend on
    rows: RowCounts
    lengths: dict[str, Lengths | None]  # prompt, chosen, rejected: tokens before any limit
    histogram: Histogram | None
    difference: Histogram | None  # chosen minus rejected, tokens
    length_bias: LengthBias | None
    similar: Similar
    repeats: Repeats
    control_text: dict[str, Count]  # by token
    endings: EndingCounts
    template: TemplateCounts
    unknown_ids: Count  # rows with token ids beyond the tokenizer's
    batches: BatchTokens | None  # None: no row is kept
    layout: str  # flat or padded
    steps: Steps | None
    memory: Memory | None
    no_memory: str | None  # why there is no estimate
    shown: list[ShownRow]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and objects; the shown rows stay out."""
        found = asdict(self)
        del found["shown"]
        found["endings"]["ends_in"] = _counted(self.endings.ends_in)
        if self.memory is not None:
            found["memory"]["total"] = self.memory.total
            found["memory"]["total_plain"] = self.memory.total_plain
            found["memory"]["total_checkpointed"] = self.memory.total_checkpointed
        found["rows"]["dropped"] = self.rows.dropped
        return {"format": FORMAT, **found}


def _counted(counter: Counter[str]) -> dict[str, int]:
    return dict(counter.most_common())
