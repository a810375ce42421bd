"""What the model and the losses of a run need of every row that is used, whatever form it came in."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import row_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Checked after tokenization, also of rows that come from a cache.

    `vocabulary_size`: token ids that every model of the run has an embedding for; None: any.
    `smallest_model`: the model that has so many, and how to give it more.
    `positions`: tokens of prompt + completion that the model has positions for; None: any number.
    `window`: tokens that it was made for, beyond which there is a warning; None: it does not say.
    `unusable_margin`: why the losses cannot read a margin (None: a pair without one) and the way out, or None where they can.
    """

    vocabulary_size: int | None = None
    smallest_model: tuple[str, str] = ("the model", "call model.resize_token_embeddings(len(tokenizer))")
    positions: int | None = None
    window: int | None = None
    unusable_margin: Callable[[float | None], str | None] | None = None

    def check(
        self,
        largest_ids: np.ndarray,
        longest: np.ndarray,
        margins: Iterable[Sequence[float | None]],
        keep: np.ndarray,
        numbers: np.ndarray,
        name: str,
    ) -> None:
        """Raise for the first row of those in `keep` that cannot be trained on; `margins` has a list per row, `largest_ids`
        the largest of its token ids, `longest` the tokens of its prompt with its longest completion."""
        if self.vocabulary_size is not None:
            beyond = keep & (largest_ids >= self.vocabulary_size)
            if beyond.any():
                first = beyond.argmax()
                model, way_out = self.smallest_model
                raise ValueError(
                    f"{row_name(numbers[first], name)} has the token id {largest_ids[first]}, and {model} has "
                    f"{self.vocabulary_size} embeddings. Take the tokenizer of the model, or {way_out}."
                )
        if self.positions is not None and (beyond := keep & (longest > self.positions)).any():
            first = beyond.argmax()
            raise ValueError(
                f"{row_name(numbers[first], name)} has {longest[first]} tokens (prompt and one completion), and the model has positions "
                f"for {self.positions} ({beyond.sum()} such rows here). Cut them by --max_length {self.positions}, or drop them by "
                "--too_long drop beside it."
            )
        if self.unusable_margin is not None:
            for of_row, used, number in zip(margins, keep, numbers, strict=True):
                for margin in of_row or [None] if used else ():
                    if why := self.unusable_margin(margin):
                        raise ValueError(f"{row_name(number, name)}: {why}")

    def warn_beyond_window(self, longest: np.ndarray, keep: np.ndarray, numbers: np.ndarray, name: str) -> bool:
        """Say, once for all of them, that rows are longer than what the model was made for; whether there are such rows."""
        beyond = keep & (longest > self.window) if self.window is not None else np.zeros(0, dtype=bool)
        if beyond.any():
            logger.warning(
                "%s: %d rows are longer than the %d tokens that the model was made for (max_position_embeddings), first row %d with "
                "%d: it has not learned such distances. --max_length %d cuts them.",
                *(name, beyond.sum(), self.window, numbers[beyond.argmax()], longest[beyond.argmax()], self.window),
            )
        return bool(beyond.any())
