"""A judge that is a small model: it reads a prompt and two answers at once, and says which is better.

    <|source|> prompt <|candidate1|> first answer <|candidate2|> second answer

One output: the log-odds that the first is better. Two: the logits of the first and of the second.

Source: the input of PairRM, Jiang et al. 2023, arXiv:2306.02561. The paper's own checkpoint has a head that reads at the
three marks; here it is the usual one of a sequence classifier, with any encoder or decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.tokens.encode import encode
from .classifier import Classifier
from .protocol import Comparison, PairwiseJudge, register_judge

SOURCE, CANDIDATE = 1224, 412  # tokens, as PairRM was trained


class Marks(NamedTuple):
    """The tokens that stand before the three parts."""

    source: int
    first: int
    second: int


@register_judge("pair_model")
class PairModelJudge(PairwiseJudge):
    """A sequence classifier that compares two answers, asked in both orders.

    A text longer than its share loses its end. A candidate's share grows by what the source leaves of its own.
    `counts`: comparisons, and how many of them had a text `cut`.

    Args:
        model: a hub id or local folder, or the model itself.
        source_max_length, candidate_max_length: tokens of the prompt and of each answer, their mark included; None: 1224 and
            412, or less where the model reads less.
        temperature: logits are divided by it; higher makes verdicts less sure.
        swap: ask in both orders and take the mean, so that neither place is preferred.
        source_token, first_token, second_token: the marks, each one token of the tokenizer.
        tokenizer, batch_size, dtype, device, trust_remote_code: see `Classifier`.

    Raises:
        ValueError: for a model that has neither one output nor two, or an option that does not fit.
    """

    def __init__(
        self,
        *,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        source_max_length: int | None = None,
        candidate_max_length: int | None = None,
        temperature: float = 1.0,
        swap: bool = True,
        source_token: str = "<|source|>",
        first_token: str = "<|candidate1|>",
        second_token: str = "<|candidate2|>",
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ):
        super().__init__()
        if (
            isinstance(temperature, bool)
            or not isinstance(temperature, int | float)
            or not 0 < temperature < float("inf")
        ):
            raise ValueError(f"Judge 'pair_model': temperature must be a number above 0, got {temperature!r}.")
        if not isinstance(swap, bool):
            raise ValueError(f"Judge 'pair_model': swap must be true or false, got {swap!r}.")
        how: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device": device}
        self.classifier = Classifier(model, tokenizer, trust_remote_code=trust_remote_code, **how)
        if self.classifier.labels not in (1, 2):
            raise ValueError(
                f"Judge 'pair_model': {self.classifier.name!r} has {self.classifier.labels} outputs: give a model with one (the "
                "log-odds that the first answer is better) or two (a logit for each answer)."
            )
        self.temperature, self.swap = float(temperature), swap
        self.marks = Marks(*(self._mark(token) for token in (source_token, first_token, second_token)))
        self._before, self._after = _around(self.classifier.tokenizer)
        self.source_max_length, self.candidate_max_length = self._shares(source_max_length, candidate_max_length)
        self.counts = {"comparisons": 0.0, "cut": 0.0}

    def _mark(self, token: str) -> int:
        (ids,) = encode(self.classifier.tokenizer, [token], add_special_tokens=False, control_as_text=False)
        if len(ids) != 1 or ids[0] == self.classifier.tokenizer.unk_token_id:
            raise ValueError(
                f"Judge 'pair_model': {token!r} is no token of {self.classifier.name!r}. Name those that stand before prompt and "
                "answers in its training: source_token, first_token, second_token."
            )
        return ids[0]

    def _shares(self, source: int | None, candidate: int | None) -> tuple[int, int]:
        """Tokens for the prompt and for each answer. What is not given shrinks with the window; what is given must fit."""
        for option, value in (("source_max_length", source), ("candidate_max_length", candidate)):
            if value is not None and not isinstance(value, int):
                raise ValueError(f"Judge 'pair_model': {option} must be a whole number, got {value!r}.")
        room = (self.classifier.window or 10**9) - len(self._before) - len(self._after)
        if source is None:
            source = min(
                SOURCE, room * SOURCE // (SOURCE + 2 * CANDIDATE) if candidate is None else room - 2 * candidate
            )
        if candidate is None:
            candidate = min(CANDIDATE, (room - source) // 2)
        if min(source, candidate) < 2 or source + 2 * candidate > room:
            raise ValueError(
                f"Judge 'pair_model': source_max_length {source} and twice candidate_max_length {candidate} do not fit: at least 2 "
                f"each, and together at most {room}, which {self.classifier.name!r} can read."
            )
        return source, candidate

    def compare(self, comparisons: Sequence[Comparison]) -> list[float | None]:
        """The probability that the first is better, for each."""
        prompts = [comparison.sampled.question() for comparison in comparisons]
        answers = [text for comparison in comparisons for text in comparison.texts]
        ids = [self._without_marks(text) for text in self._encode([*prompts, *answers])]
        sources, first, second = ids[: len(prompts)], ids[len(prompts) :: 2], ids[len(prompts) + 1 :: 2]
        texts = [self._joined(*parts) for parts in zip(sources, first, second, strict=True)]
        self.counts["comparisons"] += len(comparisons)
        self.counts["cut"] += sum(map(self._cuts, sources, first, second))
        if not self.swap:
            return self._probabilities(texts).tolist()
        swapped = [self._joined(*parts) for parts in zip(sources, second, first, strict=True)]
        one, other = self._probabilities([*texts, *swapped]).chunk(2)
        return ((one + 1 - other) / 2).tolist()

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return encode(self.classifier.tokenizer, texts, add_special_tokens=False, control_as_text=True)

    def _without_marks(self, ids: list[int]) -> list[int]:
        """An answer must not begin another part; where the marks are not special tokens, its text could."""
        return [token for token in ids if token not in self.marks]

    def _share(self, source: list[int]) -> int:
        """Tokens of an answer, without its mark: what the source leaves of its own share goes to the two answers."""
        return self.candidate_max_length - 1 + max(0, self.source_max_length - 1 - len(source)) // 2

    def _cuts(self, source: list[int], first: list[int], second: list[int]) -> bool:
        return len(source) > self.source_max_length - 1 or max(len(first), len(second)) > self._share(source)

    def _joined(self, source: list[int], first: list[int], second: list[int]) -> list[int]:
        share = self._share(source)
        parts = zip(self.marks, (source[: self.source_max_length - 1], first[:share], second[:share]), strict=True)
        return [*self._before, *(token for mark, part in parts for token in (mark, *part)), *self._after]

    def _probabilities(self, texts: list[list[int]]) -> Tensor:
        logits = self.classifier.logits(texts).double() / self.temperature
        return logits[:, 0].sigmoid() if self.classifier.labels == 1 else logits.softmax(1)[:, 0]

    def to(self, device: Any) -> None:
        self.classifier.to(device)


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text by itself, such as [CLS] and [SEP]."""
    (inner,), (whole,) = (
        encode(tokenizer, ["a"], add_special_tokens=special, control_as_text=True) for special in (False, True)
    )
    start = next((at for at in range(len(whole)) if whole[at : at + len(inner)] == inner), 0)
    return whole[:start], whole[start + len(inner) :]
