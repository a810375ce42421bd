"""What the model and the losses of a run need of every row that is used, whatever form it came in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Checked after tokenization, also of rows that come from a cache.

    `vocabulary_size`: token ids that every model of the run has an embedding for; None: any.
    `smallest_model`: the model that has so many, and how to give it more.
    `unusable_margin`: why the losses cannot read a margin (None: a pair without one) and the way out, or None where they can.
    """

    vocabulary_size: int | None = None
    smallest_model: tuple[str, str] = ("the model", "call model.resize_token_embeddings(len(tokenizer))")
    unusable_margin: Callable[[float | None], str | None] | None = None

    def check(
        self,
        largest_ids: np.ndarray,
        margins: Iterable[Sequence[float | None]],
        keep: np.ndarray,
        numbers: np.ndarray,
        name: str,
    ) -> None:
        """Raise for the first row of those in `keep` that cannot be trained on; `margins` has a list per row, and
        `largest_ids` the largest of its token ids."""
        if self.vocabulary_size is not None:
            beyond = keep & (largest_ids >= self.vocabulary_size)
            if beyond.any():
                first = beyond.argmax()
                model, way_out = self.smallest_model
                raise ValueError(
                    f"Row {numbers[first]} of {name} has the token id {largest_ids[first]}, and {model} has "
                    f"{self.vocabulary_size} embeddings. Take the tokenizer of the model, or {way_out}."
                )
        if self.unusable_margin is not None:
            for of_row, used, number in zip(margins, keep, numbers, strict=True):
                for margin in of_row or [None] if used else ():
                    if why := self.unusable_margin(margin):
                        raise ValueError(f"Row {number} of {name}: {why}")
