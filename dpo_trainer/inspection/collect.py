"""One pass over the rows of a dataset; afterwards every count is there."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import numpy as np

from ..data import report as training
from ..data.content import content_id
from ..data.images.text import ImageText
from .checks import ControlText, Endings, TemplateCheck, UnknownIds
from .facts import RowFacts, facts_of
from .result import RowCounts, RowError
from .rows import BadRow, Row
from .similar import FIRST

CUT = training.Flag.TRUNCATED_PROMPT | training.Flag.TRUNCATED_CHOSEN | training.Flag.TRUNCATED_REJECTED


class Sample:
    """Rows to show: random ones of those that are trained on, and one that is cut where there is any."""

    def __init__(self, count: int, seed: int):
        self.count, self.draw = count, random.Random(seed)
        self.seen = 0
        self.rows: list[Row] = []
        self.first_cut: Row | None = None
        self.unused: list[Row] = []  # shown where no row is trained on

    def see(self, row: Row) -> None:
        if row.cut.flags & training.USELESS:
            self.unused += [row] * (len(self.unused) < self.count)
            return
        self.seen += 1
        if row.cut.flags & CUT:
            self.first_cut = self.first_cut or row
        if len(self.rows) < self.count:
            self.rows.append(row)
        elif (place := self.draw.randrange(self.seen)) < self.count:
            self.rows[place] = row

    def chosen(self) -> list[Row]:
        rows = list(self.rows or self.unused)
        if self.first_cut and rows and not any(row.cut.flags & CUT for row in rows):
            rows[-1] = self.first_cut
        return sorted(rows, key=lambda row: row.number)


class Collection:
    """What is known of the rows seen so far. Nothing in it grows with the length of a text."""

    def __init__(
        self, tokenizer: Any, images: ImageText | None = None, *, show: int, seed: int, deduplicate: bool = False
    ):
        self.forms: Counter[str] = Counter()
        self.bad = 0
        self.errors: list[RowError] = []
        self.facts: list[RowFacts] = []
        self.sample = Sample(show, seed)
        self.control_text = ControlText(tokenizer)
        self.endings = Endings(tokenizer)
        self.template = TemplateCheck(tokenizer)
        self.unknown_ids = UnknownIds(tokenizer)
        self._contents: set[int] | None = set() if deduplicate else None

    def see(self, row: Row | BadRow) -> None:
        self.forms[row.form] += 1
        if isinstance(row, BadRow):
            self.bad += 1
            if len(self.errors) < FIRST:
                self.errors.append(RowError(row=row.number, error=row.error))
            return
        row = self._flagged_if_repeated(row)
        self.facts.append(facts_of(row))
        for check in (self.sample, self.control_text, self.endings, self.template, self.unknown_ids):
            check.see(row)

    def _flagged_if_repeated(self, row: Row) -> Row:
        """With --deduplicate, as training does it: by what is left within the limits."""
        if self._contents is None or row.cut.flags & training.USELESS:
            return row
        content = content_id(row.cut, row.pair.images if row.pair else ())
        if content in self._contents:
            return row._replace(cut=row.cut._replace(flags=row.cut.flags | training.Flag.DUPLICATE))
        self._contents.add(content)
        return row

    @property
    def trained_on(self) -> list[RowFacts]:
        return [facts for facts in self.facts if not facts.flags & training.USELESS]

    def row_counts(self, of: int | None) -> RowCounts:
        """Counted by the class that counts in training."""
        facts = self.facts
        report = training.DataReport(name="")
        report.add(
            training.RowFacts(
                flags=np.array([f.flags for f in facts], dtype=np.int64),
                pairs=np.array([f.trained_pairs for f in facts], dtype=np.int64),
                left_out=np.array([f.left_out for f in facts], dtype=np.int64),
                prompt_tokens=np.array([f.trained_prompt for f in facts], dtype=np.int64),
                completion_tokens=np.array([sum(f.trained) for f in facts], dtype=np.int64),
            ),
            np.array([f.keys.row for f in facts], dtype=np.int64),
        )
        return RowCounts(
            read=len(facts) + self.bad,
            of=of,
            bad=self.bad,
            kept=report.kept,
            pairs=report.pairs,
            forms=dict(self.forms.most_common()),
            outcomes=report.counts,
            first_rows=report.first_rows,
            pairs_left_out=report.pairs_left_out,
            errors=self.errors,
        )
