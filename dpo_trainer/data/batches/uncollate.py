"""PairBatch -> the rows it was made of: to check a model on them, and to lay a batch out anew.

All of this waits for the device: for the first batch of a run, and for models that turned out not to allow flat rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from ...types import PairBatch, Preferred, Segments, Span, TokenizedPair
from ..images.inputs import ImageInputs
from .collate import inputs_of


def as_padded(batch: PairBatch, pad_token_id: int, images: ImageInputs | None = None) -> PairBatch:
    """The same pairs in the padded layout, on the same device."""
    if not batch.is_flat:
        return batch
    inputs = inputs_of(pairs_of(batch), "padded", pad_token_id, keyed=batch.keys is not None, images=images)
    padded = PairBatch.from_inputs(inputs, batch.input_ids.device)
    return dataclasses.replace(padded, weight=batch.weight, pairs_by_rank=batch.pairs_by_rank)


def pairs_of(batch: PairBatch) -> list[TokenizedPair]:
    """The rows that a batch was made of.

    A flat batch gives them back exactly (stretches that are not scored in order, and joined where they touch). Padded
    rows do not tell which of them shared a prompt, nor where a prompt ends before tokens that are not scored: each pair
    comes back by itself, as two completions of the tokens that are scored.
    """
    places = [states.tolist() for states in batch.score_at.split(batch.lengths.tolist())]
    if batch.segments is None:
        return _padded_pairs(batch, places)
    return _flat_rows(batch, batch.segments, places)


class _Judged(NamedTuple):
    """One pair of the batch, read off the device."""

    pair: Preferred  # numbers of completions in the batch
    example_id: int
    weight: float


def _judged(batch: PairBatch) -> list[_Judged]:
    margins = [math.nan] * len(batch.chosen) if batch.margin is None else batch.margin.tolist()
    columns = (batch.chosen.tolist(), batch.rejected.tolist(), margins)
    pairs = [Preferred(c, r, None if math.isnan(margin) else margin) for c, r, margin in zip(*columns, strict=True)]
    return list(map(_Judged, pairs, batch.example_ids.tolist(), batch.weight.tolist()))


def _padded_pairs(batch: PairBatch, places: Sequence[list[int]]) -> list[TokenizedPair]:
    width, tokens = batch.input_ids.shape[1], batch.input_ids.flatten().tolist()

    def scored(completion: int) -> list[int]:
        return [tokens[state + 1] for state in places[completion]]

    pairs = []
    for (chosen, rejected, margin), example_id, weight in _judged(batch):
        end = places[chosen][0] + 1  # the state that predicts a completion's first token ends its prompt
        pairs.append(
            TokenizedPair(
                example_id=example_id,
                prompt_ids=tokens[(end - 1) // width * width : end],
                chosen_ids=scored(chosen),
                rejected_ids=scored(rejected),
                pairs=(Preferred(0, 1, margin),),
                weight=weight,
            )
        )
    return pairs


def _flat_rows(batch: PairBatch, segments: Segments, places: Sequence[list[int]]) -> list[TokenizedPair]:
    tokens, judged = batch.input_ids[0].tolist(), _judged(batch)
    images = iter([] if batch.images is None else batch.images.to(torch.device("cpu")).by_row())
    rows, first = [], 0  # number in the batch of the row's first completion
    for prompt, *spans in _spans(segments):
        numbers = range(first, first := first + len(spans))
        own = [one for one in judged if one.pair.chosen in numbers]
        chosen, rejected, *more = (tokens[start:end] for start, end in spans)
        rows.append(
            TokenizedPair(
                example_id=own[0].example_id,
                prompt_ids=tokens[slice(*prompt)],
                chosen_ids=chosen,
                rejected_ids=rejected,
                more_ids=tuple(more),
                pairs=tuple(Preferred(c - numbers[0], r - numbers[0], margin) for (c, r, margin), *_ in own),
                unscored=tuple(
                    masked
                    for number, span in enumerate(spans)
                    for masked in _unscored(number, span, places[numbers[number]])
                ),
                weight=own[0].weight,
                images=next(images, ()),
            )
        )
    return rows


def _spans(segments: Segments) -> list[list[tuple[int, int]]]:
    """(start, end) of the prompt and of each completion, for every row."""
    rows: list[list[tuple[int, int]]] = []
    start = 0
    for length, prefix_length in zip(segments.length, segments.prefix_length, strict=True):
        end = start + length
        if not prefix_length:  # the prompt with the first completion
            rows.append([(start, end)])
        else:
            if len(rows[-1]) == 1:  # where the prompt ends, the second completion tells
                begin, stop = rows[-1][0]
                rows[-1] = [(begin, begin + prefix_length), (begin + prefix_length, stop)]
            rows[-1].append((start, end))
        start = end
    return [row for row in rows if len(row) > 1]  # what stands alone is the padding at the end


def _unscored(number: int, span: tuple[int, int], states: list[int]) -> list[Span]:
    """What lies between the scored tokens of a completion, given the states that predict those."""
    start, end = span
    # Behind its first token, the state stands right before; the first is predicted at the end of the prompt.
    scored = [max(state + 1 - start, 0) for state in states]
    return [(number, a + 1, b) for a, b in pairwise([-1, *scored, end - start]) if b > a + 1]
