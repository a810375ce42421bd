"""The function that a dataset is mapped with: a batch of rows -> token ids within the limits, and what happened to them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from ..types import PairIds
from .content import content_id
from .errors import row_name
from .images.source import encoded, images_of
from .images.text import ImageText
from .report import RowFacts, labelled
from .rows.column_kinds import kinds_of_batch
from .rows.column_names import TOKENIZED, announce_unread, check_columns, is_tokenized
from .rows.image_places import check_none_is_shown
from .rows.schema import pair_from_row, weight_from_row
from .rows.tokenized import example_id_from_row, ids_from_row
from .tokens.encode import eos_token_id, tokenizer_fingerprint
from .tokens.tokenize import tokenize_pairs
from .tokens.truncate import Limits

FEATURES = Features(
    {
        "example_id": Value("int64"),
        **{column: List(Value("int32")) for column in TOKENIZED},
        "more_ids": List(List(Value("int32"))),
        "pairs": List(List(Value("int32"))),
        "margin": List(Value("float64")),
        "unscored": List(List(Value("int32"))),
        "weight": Value("float64"),
        "length": Value("int64"),
    }
)
"""A prepared row, as `collate.py` reads it. Rows with images have these too, as they were."""

STREAMED_IMAGES = Features({"images": List({"bytes": Value("binary"), "path": Value("string")})})
"""The images of a row of a stream; in a table they stay in the columns that they came in."""

NOTES = Features(
    {"flags": Value("int32"), "left_out": Value("int32"), "largest_id": Value("int32"), "longest": Value("int32")}
)
"""What a report needs to know of it besides."""

BATCH = 512
"""Rows per tokenizer call: enough for all cores, few enough for a progress bar that moves and a stream that starts."""

VERSION = 3
"""Part of the cache key: raise it when the same rows and the same options give other token ids."""


@dataclass(frozen=True, kw_only=True)
class PairMapper:
    """A batch of rows -> the output columns and notes, row by row, nothing dropped. Picklable, for `num_proc`.

    `row_numbers`: where the rows stand in the file that they were selected from, for errors; None: where they are.
    """

    tokenizer: Any
    limits: Limits
    name: str
    streaming: bool
    source: str = ""
    announces: bool = False  # a stream that did not know its columns before
    allow_special_tokens_in_text: bool = False
    first_id: int = 0
    row_numbers: np.ndarray | None = None
    images: ImageText | None = None

    @property
    def label(self) -> str:
        return labelled(self.name, self.source)

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        if self.announces:
            kinds = kinds_of_batch(batch)
            check_columns(batch, self.label, kinds)
            if indices[0] == 0:
                announce_unread(batch, self.label, kinds)
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        numbers = indices if self.row_numbers is None else self.row_numbers[indices].tolist()
        where = [row_name(number, self.label) for number in numbers]
        own_ids: list[int | None] = [None] * len(rows)
        if is_tokenized(batch):
            ids = [ids_of_tokenized_row(row, at, self.images) for row, at in zip(rows, where, strict=True)]
            own_ids = [example_id_from_row(row, at) for row, at in zip(rows, where, strict=True)]
        else:
            ids = self._tokenize(rows, where)
        ids = [self.limits.apply(pair) for pair in ids]
        shown = self._stored_images(rows, where) if self.streaming else [[] for _ in rows]
        default = map(content_id, ids, shown) if self.streaming else [self.first_id + index for index in indices]
        out: dict[str, list] = {
            "example_id": [given if own is None else own for own, given in zip(own_ids, default, strict=True)],
            "prompt_ids": [pair.prompt for pair in ids],
            "chosen_ids": [pair.completions[0] for pair in ids],
            "rejected_ids": [pair.completions[1] for pair in ids],
            "more_ids": [pair.completions[2:] for pair in ids],
            "pairs": [[pair[:2] for pair in row.pairs] for row in ids],
            "margin": [_margins(row) for row in ids],
            "unscored": [list(row.unscored) for row in ids],
            "weight": [weight_from_row(row, at) for row, at in zip(rows, where, strict=True)],
            "length": [len(pair.prompt) + sum(map(len, pair.completions)) for pair in ids],
            "flags": [int(pair.flags) for pair in ids],
            "left_out": [pair.left_out for pair in ids],
            "largest_id": list(map(self._largest_id, ids)),
            "longest": [len(pair.prompt) + max(map(len, pair.completions)) for pair in ids],
        }
        if self.streaming and self.images is not None:
            out["images"] = shown
        return out

    def _stored_images(self, rows: list[dict], where: list[str]) -> list[list[dict[str, Any]]]:
        return [[encoded(image, at) for image in images_of(row, at)] for row, at in zip(rows, where, strict=True)]

    def _tokenize(self, rows: list[dict], where: list[str]) -> list[PairIds]:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.label} holds text, and there is no tokenizer: pass one (processing_class), or give token ids."
            )
        eos_token_id(self.tokenizer)  # refuses a tokenizer that has none
        pairs = [pair_from_row(row, at) for row, at in zip(rows, where, strict=True)]
        allow = self.allow_special_tokens_in_text
        return tokenize_pairs(pairs, self.tokenizer, where, allow_special_tokens_in_text=allow, images=self.images)

    def _largest_id(self, ids: PairIds) -> int:
        """That the model needs an embedding for: those of images it makes itself."""
        prompt = ids.prompt
        if ids.images and self.images is not None:
            prompt = [number for number in prompt if number not in self.images.image_ids]
        return max(max(text, default=0) for text in (prompt, *ids.completions))

    def fingerprint(self, dataset: Dataset) -> str | None:
        """The cache key of the mapped dataset. Left alone, `datasets` would hash the tokenizer, which changes in use.

        None where a tokenizer has no fingerprint."""
        tokenizer = None
        if not is_tokenized(dataset.column_names) and self.tokenizer is not None:
            tokenizer = tokenizer_fingerprint(self.tokenizer)
            if tokenizer is None:
                return None
        options = [asdict(self.limits), self.allow_special_tokens_in_text, self.first_id]
        if self.images is not None:
            access = self.images.access
            # Which servers may be asked changes no row.
            options += [self.images.fingerprint, {"root": access.root, "allow_urls": access.allow_urls}]
        parts = [VERSION, str(FEATURES | NOTES), dataset._fingerprint, *options, tokenizer]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def ids_of_tokenized_row(row: Mapping[str, Any], where: str, images: ImageText | None) -> PairIds:
    """Of a row that is tokens already, perhaps with the images of its prompt beside."""
    ids, shown = ids_from_row(row, where), images_of(row, where)
    if images is None:
        check_none_is_shown(bool(shown), where)
        return ids
    images.check_features(ids, images.sizes(shown, where), where)
    return images.guarded(ids, where)


def _margins(row: PairIds) -> list[float]:
    """One per pair; a row of which one pair has none has none."""
    margins = [pair.margin for pair in row.pairs if pair.margin is not None]
    return margins if len(margins) == len(row.pairs) else []


def facts_of(batch: dict[str, Sequence]) -> RowFacts:
    """Of mapped rows, as lists."""
    prompt = np.asarray([len(ids) for ids in batch["prompt_ids"]])
    return RowFacts(
        flags=np.asarray(batch["flags"]),
        pairs=np.asarray([len(pairs) for pairs in batch["pairs"]]),
        left_out=np.asarray(batch["left_out"]),
        prompt_tokens=prompt,
        completion_tokens=np.asarray(batch["length"]) - prompt,
    )
