"""An order of the rows in which all ranks have about the same tokens at each step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch.utils.data import Sampler


class BalancedSampler(Sampler[int]):
    """Shuffled rows, dealt so that neither a step nor a micro-batch waits for the rank with the longest rows.

    The rows of an optimizer step are those that random sampling gives it from the same seed: `ranks` x `accumulation` x
    `batch_size` of one shuffled order. They only change places within their step, so that what the optimizer sees stays
    the same. Every micro-batch still has `batch_size` rows.

    An epoch is one order of all row numbers, which the usual batch sampler cuts: the first `batch_size` rows go to rank 0,
    the next to rank 1, and so on; after `ranks` of them the next micro-batch begins. All ranks must have generators of
    equal state, and draw the same order. Rows that do not fill a micro-batch of all ranks are at the end, the same as in
    random sampling, so that `drop_last` drops what it would drop there.

    Args:
        lengths: tokens of every row, as the layout in use computes them; `length` of a prepared row is for the flat one.
        batch_size: rows of one rank in one micro-batch.
        ranks: processes that train on a share of the rows each.
        accumulation: micro-batches of one optimizer step.
        generator: draws the order; None takes torch's own. To be seeded before each epoch.

    Raises:
        ValueError: for a number of rows, ranks or micro-batches below 1.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        batch_size: int,
        ranks: int,
        accumulation: int = 1,
        generator: torch.Generator | None = None,
    ):
        for name, value in {"batch_size": batch_size, "ranks": ranks, "accumulation": accumulation}.items():
            if value < 1:
                raise ValueError(f"{name} of a BalancedSampler must be at least 1, got {value}.")
        self.lengths = list(lengths)
        self.batch_size = batch_size
        self.ranks = ranks
        self.accumulation = accumulation
        self.generator = generator

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self), generator=self.generator).tolist()
        for start, end in self._steps():
            rows = order[start:end]
            places = balanced([self.lengths[row] for row in rows], self.batch_size, self.ranks)
            yield from (rows[place] for place in places)

    def _steps(self) -> Iterator[tuple[int, int]]:
        """Where each begins and ends. What fills no micro-batch of all ranks stands by itself."""
        together = self.batch_size * self.ranks
        whole = len(self) - len(self) % together
        return pairwise(sorted({*range(0, whole, together * self.accumulation), whole, len(self)}))


def balanced(lengths: Sequence[int], batch_size: int, ranks: int) -> list[int]:
    """An order of the places in `lengths`, such that micro-batches cut from it and dealt in turn are of about equal tokens."""
    batches = equal_batches(lengths, batch_size)
    partial = [batches.pop()] if len(batches[-1]) < batch_size else []  # has to stay at the end
    order = in_rounds([sum(lengths[place] for place in batch) for batch in batches], ranks)
    return [place for batch in [*(batches[number] for number in order), *partial] for place in batch]


def equal_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Places in `lengths`, in batches of `batch_size` (the last has what remains) and of about equal tokens.

    Longest first, each to the batch with room that would have the fewest tokens if the mean of what is left filled it:
    tokens alone would mislead, for a batch with one long row and seven places has more to come than one with a place.
    """
    left, total = len(lengths), sum(lengths)
    batches: list[list[int]] = [[] for _ in range(0, left, batch_size)]
    room, tokens = [batch_size] * len(batches), [0.0] * len(batches)
    missing = batch_size * len(batches) - left
    room[-1] -= missing
    tokens[-1] += missing * total / left  # of rows from elsewhere, with which accelerate fills it up
    for place in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        mean = total / left
        open_ = (number for number, places in enumerate(room) if places)
        least = min(open_, key=lambda number: tokens[number] + room[number] * mean)
        batches[least].append(place)
        tokens[least] += lengths[place]
        room[least] -= 1
        left, total = left - 1, total - lengths[place]
    return batches


def in_rounds(tokens: Sequence[int], ranks: int) -> list[int]:
    """An order of batches for ranks that take one each, round after round.

    Batches of a round have like tokens, and the rank that has had the fewest gets the most: a round waits for its
    longest batch, a step for the rank with the most tokens.
    """
    longest_first = sorted(range(len(tokens)), key=tokens.__getitem__, reverse=True)
    had = [0] * ranks
    order: list[int] = []
    for start in range(0, len(tokens), ranks):
        batches = longest_first[start : start + ranks]
        takers = sorted(range(len(batches)), key=had.__getitem__)
        taken = dict(zip(takers, batches, strict=True))
        for rank in sorted(taken):
            had[rank] += tokens[taken[rank]]
            order.append(taken[rank])
    return order
