"""Pairs that hardly differ, rows that repeat each other, and rows that contradict each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rapidfuzz.distance import Indel

NEAR = 0.95
"""Share of tokens that two completions have in common, in order, from which on a pair counts as nearly identical."""

FIRST = 20
"""How many rows of a kind are listed."""


def similarity(first: Sequence[int], second: Sequence[int]) -> float:
    """2 * L / (a + b): L the longest common subsequence of two lists of a and b token ids. 1 means identical.

    Exact from `NEAR` upwards; below it the search stops early and the answer is 0.
    """
    return Indel.normalized_similarity(first, second, score_cutoff=NEAR)


def content_key(value: Any) -> int:
    """64 bits of a hash over a text, a list of messages or a list of token ids: equal content, equal key."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
    kind = "text" if isinstance(value, str) else "json"
    digest = hashlib.blake2b(f"{kind}:{text}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


class Keys(NamedTuple):
    """What a row says, as hashes: enough to compare rows with each other, and small."""

    row: int
    prompt: int
    completions: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]  # numbers of chosen and rejected among the completions

    def preferences(self) -> set[tuple[int, int, int]]:
        """(prompt, better, worse) of every pair between two different completions."""
        keys = self.completions
        return {(self.prompt, keys[c], keys[r]) for c, r in self.pairs if keys[c] != keys[r]}


@dataclass(frozen=True, kw_only=True)
class Repeats:
    """Rows against each other. `first_*` name pairs of rows: [row, the row that it repeats or contradicts]."""

    duplicate_rows: int = 0  # rows that say exactly what an earlier row says
    distinct_prompts: int = 0
    repeated_prompts: int = 0  # rows with the prompt of an earlier row
    conflicting_rows: int = 0  # rows that prefer the other of two completions than some row does
    first_duplicate_rows: list[list[int]] = field(default_factory=list)
    first_repeated_prompts: list[list[int]] = field(default_factory=list)
    first_conflicting_rows: list[list[int]] = field(default_factory=list)


def repeats(rows: Sequence[Keys]) -> Repeats:
    """Compares hashes of whole texts: rows that differ in a space differ."""
    said_by: dict[tuple, int] = {}
    asked_by: dict[int, int] = {}
    preferred_by: dict[tuple[int, int, int], int] = {}
    duplicates, prompts, conflicts = [], [], []
    for keys in rows:
        content = (keys.prompt, keys.completions, keys.pairs)
        if said_by.setdefault(content, keys.row) != keys.row:
            duplicates.append([keys.row, said_by[content]])
        if asked_by.setdefault(keys.prompt, keys.row) != keys.row:
            prompts.append([keys.row, asked_by[keys.prompt]])
        for preference in keys.preferences():
            preferred_by.setdefault(preference, keys.row)
    for keys in rows:
        against = [preferred_by.get((prompt, worse, better)) for prompt, better, worse in keys.preferences()]
        others = [row for row in against if row is not None]
        if others:
            conflicts.append([keys.row, min(others)])
    return Repeats(
        duplicate_rows=len(duplicates),
        distinct_prompts=len(asked_by),
        repeated_prompts=len(prompts),
        conflicting_rows=len(conflicts),
        first_duplicate_rows=duplicates[:FIRST],
        first_repeated_prompts=prompts[:FIRST],
        first_conflicting_rows=conflicts[:FIRST],
    )


@dataclass(frozen=True, kw_only=True)
class Similar:
    """Pairs whose two completions are the same, or nearly, in token ids before anything is cut."""

    threshold: float = NEAR
    pairs: int = 0
    identical: int = 0
    near: int = 0  # at least the threshold, and not identical
    first_identical: list[int] = field(default_factory=list)  # row numbers
    first_near: list[int] = field(default_factory=list)


def similar(pairs: Sequence[tuple[int, float]]) -> Similar:
    """Of (row, similarity) for each pair."""
    identical = [row for row, value in pairs if value == 1]
    near = [row for row, value in pairs if NEAR <= value < 1]
    return Similar(
        pairs=len(pairs),
        identical=len(identical),
        near=len(near),
        first_identical=identical[:FIRST],
        first_near=near[:FIRST],
    )
