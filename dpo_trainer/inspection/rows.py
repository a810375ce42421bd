"""Rows of a dataset of any form -> token ids, whole and within the limits; a bad row comes out as its error, and is no end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from ..data.images.text import ImageText
from ..data.mapping import ids_of_tokenized_row
from ..data.rows.column_names import is_tokenized
from ..data.rows.schema import form_of, pair_from_row, weight_from_row
from ..data.tokens.tokenize import tokenize_pairs
from ..data.tokens.truncate import Limits
from ..types import Pair, PairIds
from .parts import NumberedRow

BATCH = 256
"""Rows per call of the tokenizer."""


class Row(NamedTuple):
    """A row that can be read."""

    number: int  # NumberedRow.number
    form: str  # data/schema.form_of
    pair: Pair | None  # None: the row is token ids
    ids: PairIds  # before any limit
    cut: PairIds  # within the limits, with flags for what they did


class BadRow(NamedTuple):
    number: int
    form: str
    error: str


class _Text(NamedTuple):
    number: int
    where: str
    form: str
    pair: Pair


@dataclass(frozen=True, kw_only=True)
class RowReader:
    """The pipeline of training, row by row: the same functions in the same order, and errors kept instead of raised."""

    tokenizer: Any
    limits: Limits
    allow_special_tokens_in_text: bool = False
    images: ImageText | None = None

    def read(self, numbered: Iterable[NumberedRow]) -> Iterator[Row | BadRow]:
        """In order. Tokenizes `BATCH` rows in one call."""
        rows = iter(numbered)
        while batch := list(islice(rows, BATCH)):
            yield from self._read_batch(batch)

    def _read_batch(self, batch: list[NumberedRow]) -> list[Row | BadRow]:
        found: dict[int, Row | BadRow] = {}
        texts: list[_Text] = []
        for number, where, row in batch:
            form = "of no known form"
            try:
                form = form_of(row, where)
                weight_from_row(row, where)
                if is_tokenized(row):
                    found[number] = self._row(number, form, None, ids_of_tokenized_row(row, where, self.images))
                else:
                    texts.append(_Text(number, where, form, pair_from_row(row, where)))
            except ValueError as error:
                found[number] = BadRow(number, form, str(error))
        found |= {row.number: row for row in self._tokenized(texts)}
        return [found[number] for number, _, _ in batch]

    def _tokenized(self, texts: list[_Text]) -> list[Row | BadRow]:
        """All in one call; where that fails, in halves, until the bad rows stand alone."""
        if not texts:
            return []
        try:
            ids = tokenize_pairs(
                [text.pair for text in texts],
                self.tokenizer,
                [text.where for text in texts],
                allow_special_tokens_in_text=self.allow_special_tokens_in_text,
                images=self.images,
            )
        except ValueError as error:
            if len(texts) == 1:
                return [BadRow(texts[0].number, texts[0].form, str(error))]
            middle = len(texts) // 2
            return self._tokenized(texts[:middle]) + self._tokenized(texts[middle:])
        return [self._row(text.number, text.form, text.pair, of_row) for text, of_row in zip(texts, ids, strict=True)]

    def _row(self, number: int, form: str, pair: Pair | None, ids: PairIds) -> Row:
        return Row(number, form, pair, ids, self.limits.apply(ids))
