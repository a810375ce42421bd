"""The function that a dataset is mapped with: a batch of rows -> token ids within the limits, and what happened to them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from .schema import (
    TOKENIZED,
    check_columns,
    example_id_from_row,
    is_tokenized,
    pair_from_row,
    token_ids_from_row,
    weight_from_row,
)
from .tokenize import eos_token_id, tokenize_pairs, tokenizer_fingerprint
from .truncate import Limits, PairIds

FEATURES = Features(
    {
        "example_id": Value("int64"),
        **{column: List(Value("int32")) for column in TOKENIZED},
        "weight": Value("float64"),
        "length": Value("int64"),
    }
)
BATCH = 256
"""Rows per tokenizer call: enough for all cores, few enough for a progress bar that moves and a stream that starts."""

VERSION = 1
"""Part of the cache key: raise it when the same rows and the same options give other token ids."""


@dataclass(frozen=True, kw_only=True)
class PairMapper:
    """A batch of rows -> the output columns and `flags`, row by row, nothing dropped. Picklable, for `num_proc`."""

    tokenizer: Any
    limits: Limits
    name: str
    streaming: bool

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        check_columns(batch, self.name)
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        where = [f"Row {index} of {self.name}" for index in indices]
        own_ids: list[int | None] = [None] * len(rows)
        if is_tokenized(batch):
            ids = [PairIds(*token_ids_from_row(row, at)) for row, at in zip(rows, where, strict=True)]
            own_ids = [example_id_from_row(row, at) for row, at in zip(rows, where, strict=True)]
        else:
            ids = self._tokenize(rows, where)
        ids = [self.limits.apply(pair) for pair in ids]
        default = map(content_id, ids) if self.streaming else indices
        return {
            "example_id": [given if own is None else own for own, given in zip(own_ids, default, strict=True)],
            "prompt_ids": [pair.prompt for pair in ids],
            "chosen_ids": [pair.chosen for pair in ids],
            "rejected_ids": [pair.rejected for pair in ids],
            "weight": [weight_from_row(row, at) for row, at in zip(rows, where, strict=True)],
            "length": [len(pair.prompt) + len(pair.chosen) + len(pair.rejected) for pair in ids],
            "flags": [int(pair.flags) for pair in ids],
        }

    def _tokenize(self, rows: list[dict], where: list[str]) -> list[PairIds]:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.name} holds text, and there is no tokenizer: pass one (processing_class), or give token ids."
            )
        eos_token_id(self.tokenizer)  # refuses a tokenizer that has none
        pairs = [pair_from_row(row, at) for row, at in zip(rows, where, strict=True)]
        return tokenize_pairs(pairs, self.tokenizer, where)

    def fingerprint(self, dataset: Dataset) -> str:
        """The cache key of the mapped dataset. Left alone, `datasets` would hash the tokenizer, which changes in use."""
        tokenizer = None
        if not is_tokenized(dataset.column_names) and self.tokenizer is not None:
            tokenizer = tokenizer_fingerprint(self.tokenizer)
        parts = [VERSION, dataset._fingerprint, asdict(self.limits), tokenizer]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def content_id(pair: PairIds) -> int:
    """63 bits of a hash over the three id lists."""
    digest = hashlib.blake2b(digest_size=8)
    for ids in (pair.prompt, pair.chosen, pair.rejected):
        digest.update(np.asarray([len(ids), *ids], dtype="<i8").tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1
