"""What preparing a dataset did to its pairs: flags per pair, sums and first row numbers per dataset."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

FIRST = 5
"""How many row numbers of each dropped kind a report names."""


class Flag(IntFlag):
    """What happened to a pair; kept as a column, so that a cached dataset reports as a fresh one does."""

    TRUNCATED_PROMPT = 1
    TRUNCATED_CHOSEN = 2
    TRUNCATED_REJECTED = 4
    MERGED_BOUNDARY = 8
    EMPTY_PROMPT = 16
    IDENTICAL = 32
    NO_ROOM = 64
    EMPTY_COMPLETION = 128


DROPPED = {
    "identical": (Flag.IDENTICAL, "chosen equals rejected"),
    "no_room": (Flag.NO_ROOM, "no room for a completion after the prompt"),
    "empty_completion": (Flag.EMPTY_COMPLETION, "empty completion"),
}
"""Pairs that teach nothing. Truncation gives every pair one of these flags at most, so the counts add up."""


@dataclass(kw_only=True)
class DataReport:
    """Counts of one dataset. `truncated_*`, `merged_boundary`, `empty_prompts` and the token sums count kept pairs only.

    Of a stream they count what this process has read so far; data loader workers count in their own copies.
    """

    name: str
    streaming: bool = False
    rows: int = 0
    kept: int = 0
    truncated_prompts: int = 0
    truncated_chosen: int = 0
    truncated_rejected: int = 0
    merged_boundary: int = 0  # the last prompt tokens went to the completions, for a token spans the boundary
    empty_prompts: int = 0  # prompts of no token but BOS
    identical: int = 0
    no_room: int = 0
    empty_completion: int = 0  # nothing, or nothing but white space
    first_identical: list[int] = field(default_factory=list)  # row numbers
    first_no_room: list[int] = field(default_factory=list)
    first_empty_completion: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    chosen_tokens: int = 0
    rejected_tokens: int = 0

    @property
    def dropped(self) -> int:
        return self.identical + self.no_room + self.empty_completion

    def add(self, flags: np.ndarray, lengths: np.ndarray, first_row: int) -> np.ndarray:
        """Count the rows `first_row`, `first_row + 1` ... with their flags [N] and their prompt, chosen and rejected tokens [N, 3].

        Returns which of them are kept, bool [N].
        """
        keep = np.ones(len(flags), dtype=bool)
        for kind, (flag, _) in DROPPED.items():
            keep &= flags & flag == 0
            self._add_dropped(kind, first_row + np.flatnonzero(flags & flag))
        self.rows += len(flags)
        self.kept += int(keep.sum())
        for name, flag in {
            "truncated_prompts": Flag.TRUNCATED_PROMPT,
            "truncated_chosen": Flag.TRUNCATED_CHOSEN,
            "truncated_rejected": Flag.TRUNCATED_REJECTED,
            "merged_boundary": Flag.MERGED_BOUNDARY,
            "empty_prompts": Flag.EMPTY_PROMPT,
        }.items():
            setattr(self, name, getattr(self, name) + int(np.count_nonzero(flags[keep] & flag)))
        for name, tokens in zip(
            ("prompt_tokens", "chosen_tokens", "rejected_tokens"), lengths[keep].sum(0), strict=True
        ):
            setattr(self, name, getattr(self, name) + int(tokens))
        return keep

    def _add_dropped(self, kind: str, rows: np.ndarray) -> None:
        setattr(self, kind, getattr(self, kind) + len(rows))
        first = getattr(self, f"first_{kind}")
        first += rows[: FIRST - len(first)].tolist()

    def dropped_lines(self) -> list[str]:
        """One line per kind: how many, why, and which rows come first."""
        lines = []
        for kind, (_, reason) in DROPPED.items():
            count, first = getattr(self, kind), getattr(self, f"first_{kind}")
            if count:
                rows = ", ".join(map(str, first)) + (", ..." if count > len(first) else "")
                lines.append(f"{count} dropped: {reason} (row{'s' * (count > 1)} {rows})")
        return lines

    def refuse_or_warn(self, useless_pairs: str) -> None:
        """Say loudly what was dropped; raise where that is not allowed, or where nothing is left."""
        found = "; ".join(self.dropped_lines())
        if useless_pairs == "error":
            raise ValueError(
                f"{self.name} has pairs that teach nothing: {found.replace(' dropped:', ':')}. Remove these rows, raise "
                "--max_length where there is no room, or drop such pairs with --useless_pairs drop."
            )
        if not self.kept:
            raise ValueError(
                f"No pair of {self.name} is left: {found}. Raise --max_length (or lower --max_prompt_length) where there "
                "is no room; chosen and rejected must say something, and differ within --max_length and "
                "--max_completion_length."
            )
        logger.warning("%s: %s. To stop at such pairs: --useless_pairs error.", self.name, found)

    def table(self) -> str:
        """A few lines for the log; what did not happen is left out."""
        so_far = " so far" if self.streaming else ""
        lines = [f"{self.name}: {self.kept} of {self.rows} pairs kept{so_far}", *self.dropped_lines()]
        counts = {
            "prompts truncated at their beginning": self.truncated_prompts,
            "chosen completions truncated at their end": self.truncated_chosen,
            "rejected completions truncated at their end": self.truncated_rejected,
            "pairs where a token spans the end of the prompt": self.merged_boundary,
            "prompts of no token but BOS": self.empty_prompts,
        }
        lines += [f"{count} {what} ({count / self.kept:.1%})" for what, count in counts.items() if count]
        total = self.prompt_tokens + self.chosen_tokens + self.rejected_tokens
        if self.kept:
            lines.append(
                f"{total} tokens: prompts {self.prompt_tokens}, chosen {self.chosen_tokens}, "
                f"rejected {self.rejected_tokens} ({total / self.kept:.0f} per pair)"
            )
        return "\n  ".join(lines)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"dropped": self.dropped}
