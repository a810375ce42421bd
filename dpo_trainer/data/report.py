"""What preparing a dataset did to its rows: flags per row, counts and first row numbers per dataset, one table for the log."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..printable import printable
from ..storage.folders import write_text
from ..types import Flag

logger = logging.getLogger(__name__)

FIRST = 5
"""How many row numbers of each kind a report names."""


class Kind(NamedTuple):
    """Something that can happen to a row."""

    flag: Flag
    words: str
    advice: str = ""  # what it means for the run and what to do, where a user should hear of it


DROPPED = {
    "empty_completion": Kind(Flag.EMPTY_COMPLETION, "empty completion"),
    "tied": Kind(Flag.TIED, "all scores are equal"),
    "too_long": Kind(Flag.TOO_LONG, "longer than the limits"),
    "no_room": Kind(Flag.NO_ROOM, "no room for a completion after the prompt"),
    "identical": Kind(Flag.IDENTICAL, "chosen equals rejected"),
    "duplicate": Kind(Flag.DUPLICATE, "the same as an earlier row"),
}
"""Why a row is not used. A row with several reasons counts for the first of them."""

KEPT = {
    "truncated_prompts": Kind(Flag.TRUNCATED_PROMPT, "prompts truncated at their beginning"),
    "truncated_chosen": Kind(Flag.TRUNCATED_CHOSEN, "chosen completions truncated at their end"),
    "truncated_rejected": Kind(Flag.TRUNCATED_REJECTED, "rejected completions truncated at their end"),
    "merged_boundary": Kind(Flag.MERGED_BOUNDARY, "prompts that end inside a token, which goes to the completions"),
    "empty_prompts": Kind(Flag.EMPTY_PROMPT, "prompts of no token but BOS"),
    "control_text": Kind(
        Flag.CONTROL_TEXT,
        "rows with the text of a control token, kept as text (--allow_special_tokens_in_text: as tokens)",
    ),
    "generation_differs": Kind(
        Flag.GENERATION_DIFFERS,
        "training and generation follow different text",
        "The generation prompt of the chat template ends with text that a finished turn lacks (such as an opened <think>), or the "
        "template writes earlier turns anew, so the model will be asked with other text than it was trained on. Give the answers "
        "with their reasoning, switch reasoning off in chat_template_kwargs, or use a template made for training.",
    ),
    "reasoning_left_out": Kind(
        Flag.REASONING_LEFT_OUT, "prompts whose earlier reasoning the chat template leaves out"
    ),
    "no_end_of_turn": Kind(
        Flag.NO_END_OF_TURN,
        "answers to which the chat template adds no end of turn",
        "Nothing teaches the model to stop. Use a template that writes an end of turn, such as the EOS token, after each answer.",
    ),
    "roles_renamed": Kind(
        Flag.ROLES_RENAMED, "rows with other names of roles (human, gpt ...), read as the usual ones"
    ),
}
"""What happened to rows that are used."""

USELESS = Flag(sum(kind.flag for kind in DROPPED.values()))


@dataclass(kw_only=True)
class DataReport:
    """Counts of one dataset. Those of `KEPT`, the pairs and the token sums are about kept rows only.

    Of a stream they count what this process has read so far; data loader workers count in their own copies.
    """

    name: str
    source: str = ""  # the file or the dataset, where it is known
    streaming: bool = False
    rows: int = 0
    kept: int = 0
    pairs: int = 0
    pairs_left_out: int = 0  # of ranked rows: useless ones, and those beyond max_pairs_per_prompt
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys([*DROPPED, *KEPT], 0))
    first_rows: dict[str, list[int]] = field(default_factory=lambda: {kind: [] for kind in [*DROPPED, *KEPT]})
    prompt_tokens: int = 0
    completion_tokens: int = 0

    @property
    def label(self) -> str:
        return labelled(self.name, self.source)

    @property
    def dropped(self) -> int:
        return sum(self.counts[kind] for kind in DROPPED)

    def clear(self) -> None:
        """Count from nothing: a stream is read again."""
        self.__init__(name=self.name, source=self.source, streaming=self.streaming)  # type: ignore[misc]

    def add(self, rows: RowFacts, numbers: np.ndarray) -> np.ndarray:
        """Count rows; `numbers` are their row numbers. Returns which of them are kept, bool [rows]."""
        keep = np.ones(len(rows.flags), dtype=bool)
        for name, kind in DROPPED.items():
            hit = keep & (rows.flags & kind.flag > 0)
            self._count(name, numbers[hit])
            keep &= ~hit
        for name, kind in KEPT.items():
            self._count(name, numbers[keep & (rows.flags & kind.flag > 0)])
        self.rows += len(keep)
        self.kept += int(keep.sum())
        self.pairs += int(rows.pairs[keep].sum())
        self.pairs_left_out += int(rows.left_out[keep].sum())
        self.prompt_tokens += int(rows.prompt_tokens[keep].sum())
        self.completion_tokens += int(rows.completion_tokens[keep].sum())
        return keep

    def _count(self, name: str, rows: np.ndarray) -> None:
        self.counts[name] += len(rows)
        self.first_rows[name] += rows[: FIRST - len(self.first_rows[name])].tolist()

    def line(self, name: str) -> str:
        """How many rows, and which come first."""
        count, first = self.counts[name], self.first_rows[name]
        rows = ", ".join(map(str, first)) + (", ..." if count > len(first) else "")
        return f"{count} (row{'s' * (count > 1)} {rows})"

    def dropped_lines(self) -> list[str]:
        return [f"{kind.words}: {self.line(name)}" for name, kind in DROPPED.items() if self.counts[name]]

    def warnings(self) -> list[str]:
        """What a user should hear of beyond the table, with what to do."""
        return [
            f"{self.label}: {kind.words}, {self.line(name)}. {kind.advice}"
            for name, kind in KEPT.items()
            if kind.advice and self.counts[name]
        ]

    def refuse_unwanted(self, *, useless_pairs: str, too_long: str) -> None:
        """Raise where rows were dropped that the user wanted to hear of."""
        if too_long == "error" and self.counts["too_long"]:
            raise ValueError(
                f"{self.label} has rows that --max_length, --max_prompt_length or --max_completion_length would cut: "
                f"{self.line('too_long')}. Raise the limit, or choose --too_long truncate or drop."
            )
        if useless_pairs == "error" and self.dropped > self.counts["too_long"] + self.counts["duplicate"]:
            found = "; ".join(self.dropped_lines())
            raise ValueError(
                f"{self.label} has pairs that teach nothing: {found}. Remove these rows, raise --max_length where there is "
                "no room, or drop such pairs with --useless_pairs drop."
            )

    def refuse_empty(self) -> None:
        if not self.kept:
            found = "; ".join(self.dropped_lines())
            raise ValueError(
                f"No pair of {self.label} is left: {found}. Raise --max_length (or lower --max_prompt_length) where there "
                "is no room; chosen and rejected must say something, and differ within --max_length and "
                "--max_completion_length."
            )

    def table(self) -> str:
        return report_table([self])

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"dropped": self.dropped}


@dataclass(frozen=True, kw_only=True)
class RowFacts:
    """What a report counts, one entry per row."""

    flags: np.ndarray
    pairs: np.ndarray
    left_out: np.ndarray
    prompt_tokens: np.ndarray
    completion_tokens: np.ndarray


def write_reports(reports: Mapping[str, DataReport], folder: Path) -> None:
    """data_report.json, {name: counts}."""
    folder.mkdir(parents=True, exist_ok=True)
    everything = {name: report.to_dict() for name, report in reports.items()}
    write_text(folder / "data_report.json", json.dumps(everything, indent=2) + "\n")


def labelled(name: str, source: str) -> str:
    """ "train (pairs.jsonl)" """
    return f"{name} ({source})" if source else name


def report_table(reports: Sequence[DataReport]) -> str:
    """One column per dataset; what happened in none of them is left out. With many, the row numbers are left out too."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("data")
    for report in reports:
        table.add_column(Text(printable(report.name) + " (so far)" * report.streaming), justify="right")
    for words, cells in _lines(reports, with_rows=len(reports) <= 2):
        table.add_row(words, *map(Text, cells))
    text = io.StringIO()
    Console(file=text, width=100_000, color_system=None).print(table)
    lines = [line.rstrip() for line in text.getvalue().splitlines() if line.strip()]
    return "\n".join(
        [*lines, *(f" {printable(report.name)}: {printable(report.source)}" for report in reports if report.source)]
    )


def _lines(reports: Sequence[DataReport], *, with_rows: bool) -> Iterable[tuple[str, list[str]]]:
    yield "rows", [str(r.rows) for r in reports]
    for name, kind in DROPPED.items():
        if any(r.counts[name] for r in reports):
            yield (
                f"dropped: {kind.words}",
                [r.line(name) if with_rows and r.counts[name] else str(r.counts[name]) for r in reports],
            )
    yield "kept", [str(r.kept) for r in reports]
    if any(r.pairs != r.kept or r.pairs_left_out for r in reports):
        yield "pairs", [str(r.pairs) for r in reports]
        yield "pairs of ranked rows left out", [str(r.pairs_left_out) for r in reports]
    for name, kind in KEPT.items():
        if any(r.counts[name] for r in reports):
            yield kind.words, [f"{r.counts[name]} ({r.counts[name] / max(r.kept, 1):.1%})" for r in reports]
    yield "tokens of prompts", [str(r.prompt_tokens) for r in reports]
    yield "tokens of completions", [str(r.completion_tokens) for r in reports]
    total = [(r.prompt_tokens + r.completion_tokens, max(r.kept, 1)) for r in reports]
    yield "tokens per row", [f"{tokens / rows:.0f}" for tokens, rows in total]
