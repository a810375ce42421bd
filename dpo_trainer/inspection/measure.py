"""Numbers from arrays: token lengths, which answer is longer, and what random batches cost in the two layouts.

R rows   P pairs
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

BINS = 24
"""Bars of a histogram: as many as a phone can show."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of a list of token counts. Percentiles are interpolated between neighbours."""

    count: int
    mean: float
    p5: float
    p50: float
    p95: float
    p99: float
    max: int


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Counts [bins] per name over shared bins `edges[i] <= tokens < edges[i + 1]`; the last bin holds everything above."""

    edges: list[int]
    counts: dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class LengthBias:
    """Whether length and preference go together, over P pairs; lengths in tokens before anything is cut.

    `rank_correlation` is Spearman's, over the 2P completions of the pairs: of a completion's length, less the mean length
    of its pair, with whether it was chosen. Within a pair, so that long prompts with long answers say nothing. None where
    all pairs are equally long.
    """

    pairs: int
    chosen_longer: int
    equal: int
    rejected_longer: int
    mean_difference: float  # chosen minus rejected, tokens
    median_difference: float
    rank_correlation: float | None


@dataclass(frozen=True, kw_only=True)
class RowSizes:
    """Tokens of R rows that are trained on, arrays [R]."""

    prompt: np.ndarray
    completions: np.ndarray  # sum over the completions of the row
    longest: np.ndarray  # of the completions of the row
    count: np.ndarray  # how many completions

    @property
    def flat(self) -> np.ndarray:
        """Each prompt once, no padding."""
        return self.prompt + self.completions

    @property
    def unshared(self) -> np.ndarray:
        """The prompt once per completion, no padding."""
        return self.prompt * self.count + self.completions


@dataclass(frozen=True, kw_only=True)
class BatchTokens:
    """Tokens that one epoch computes, over random batches, and of the largest of these batches.

    padded / flat = padding_factor * sharing_factor: what padding costs, and what computing the prompt again costs.
    """

    batch_size: int  # rows
    flat: int
    padded: int
    unshared: int  # unpadded, with the prompt once per completion
    ratio: float
    padding_factor: float
    sharing_factor: float
    largest_flat: int
    largest_padded: int
    largest_scored: int


def lengths(values: np.ndarray) -> Lengths | None:
    """None where there is nothing to measure."""
    if not len(values):
        return None
    p5, p50, p95, p99 = (float(p) for p in np.percentile(values, [5, 50, 95, 99]))
    return Lengths(
        count=len(values), mean=float(values.mean()), p5=p5, p50=p50, p95=p95, p99=p99, max=int(values.max())
    )


def histogram(columns: Mapping[str, np.ndarray], bins: int = BINS) -> Histogram | None:
    """Equal bins from 0 to the 99th percentile of all values: a few giants must not squeeze the rest into one bar."""
    everything = np.concatenate([np.zeros(0, dtype=np.int64), *columns.values()])
    if not len(everything):
        return None
    width = max(1, int(np.ceil(np.percentile(everything, 99) / bins)))
    edges = np.arange(bins + 1) * width
    counts = {
        name: np.bincount(np.minimum(values // width, bins - 1), minlength=bins).tolist()
        for name, values in columns.items()
    }
    return Histogram(edges=edges.tolist(), counts=counts)


def difference_histogram(difference: np.ndarray, bins: int = BINS) -> Histogram | None:
    """Equal bins around 0; the first and the last hold everything beyond."""
    if not len(difference):
        return None
    half = bins // 2
    width = max(1, int(np.ceil(np.percentile(np.abs(difference), 99) / half)))
    index = np.clip(difference // width + half, 0, bins - 1)
    edges = (np.arange(bins + 1) - half) * width
    return Histogram(edges=edges.tolist(), counts={"difference": np.bincount(index, minlength=bins).tolist()})


def length_bias(chosen: np.ndarray, rejected: np.ndarray) -> LengthBias | None:
    """Of the token counts [P] of the two sides of each pair."""
    if not len(chosen):
        return None
    difference = chosen.astype(np.int64) - rejected
    return LengthBias(
        pairs=len(difference),
        chosen_longer=int((difference > 0).sum()),
        equal=int((difference == 0).sum()),
        rejected_longer=int((difference < 0).sum()),
        mean_difference=float(difference.mean()),
        median_difference=float(np.median(difference)),
        rank_correlation=_rank_correlation(difference),
    )


def _rank_correlation(difference: np.ndarray) -> float | None:
    if not difference.any():
        return None
    table = pd.DataFrame(
        {
            "length": np.concatenate([difference, -difference]) / 2,
            "chosen": np.repeat([1.0, 0.0], len(difference)),
        }
    )
    return float(table.corr(method="spearman").loc["length", "chosen"])


def batch_tokens(
    sizes: RowSizes, batch_size: int, *, seed: int, pad_to_multiple_of: int | None = None
) -> BatchTokens | None:
    """One epoch in a random order, cut into batches of `batch_size` rows; the last one may be short.

    The padded layout has one row per completion, each as long as the longest prompt + completion of its batch.
    """
    rows = len(sizes.prompt)
    if not rows:
        return None
    order = np.random.default_rng(seed).permutation(rows)
    first = np.arange(0, rows, batch_size)

    def of_batches(values: np.ndarray, combine: np.ufunc = np.add) -> np.ndarray:
        return combine.reduceat(values[order], first)

    multiple = pad_to_multiple_of or 1
    width = of_batches(sizes.prompt + sizes.longest, np.maximum)
    padded = of_batches(sizes.count) * (-(-width // multiple) * multiple)
    flat = of_batches(sizes.flat)
    unshared = int(sizes.unshared.sum())
    return BatchTokens(
        batch_size=batch_size,
        flat=int(flat.sum()),
        padded=int(padded.sum()),
        unshared=unshared,
        ratio=float(padded.sum() / flat.sum()),
        padding_factor=float(padded.sum() / unshared),
        sharing_factor=float(unshared / flat.sum()),
        largest_flat=int(flat.max()),
        largest_padded=int(padded.max()),
        largest_scored=int(of_batches(sizes.completions).max()),
    )
