"""A reward model: a sequence classifier with one output, which reads a prompt with its completion.

It has a tokenizer and a chat template of its own, so it may be of another family than the policy.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...data.tokens.encode import encode
from ...data.tokens.render import MARKS, control_tokens, render, strings_of
from ...types import Pair
from ..samples import Sampled
from .classifier import Classifier
from .protocol import Scores

logger = logging.getLogger(__name__)


class RewardModel:
    """Scores a prompt with its completion by the model's logit. None for what is too long for it.

    Conversations go through the model's chat template, in which the text of a control token stays text, so that no
    completion can end its own turn. Strings are the prompt and the completion joined, with the special tokens that the
    tokenizer adds by itself.

    Args:
        max_length: tokens of prompt and completion, at most; None: what the model can read.
        model, tokenizer, batch_size, dtype, device, trust_remote_code: see `Classifier`.

    Raises:
        ValueError: as `Classifier`, for a model with more than one output, and for a `max_length` beyond its window.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        batch_size: int = 16,
        max_length: int | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        trust_remote_code: bool = False,
    ):
        how: dict[str, Any] = {"batch_size": batch_size, "dtype": dtype, "device": device}
        self.classifier = Classifier(model, tokenizer, trust_remote_code=trust_remote_code, **how)
        self.name = self.classifier.name
        if self.classifier.labels != 1:
            raise ValueError(
                f"The reward model {self.name!r} has {self.classifier.labels} outputs, and a reward is one number: give a model "
                "with num_labels=1, or a reward function that says what the outputs of this one are worth."
            )
        window = self.classifier.window
        if max_length is not None and (max_length < 1 or (window is not None and max_length > window)):
            bound = "" if window is None else f" to {window}, the most that {self.name!r} can read"
            raise ValueError(f"max_length must be from 1{bound}, got {max_length}.")
        self.max_length = max_length or window
        self._control = control_tokens(self.classifier.tokenizer)
        self._warned = False

    def scores(self, samples: Sequence[Sampled]) -> Scores:
        """[P][K] logits. ValueError for a conversation that the chat template refuses, or where there is none."""
        texts = [ids for sampled in samples for ids in self._read(sampled)]
        fits = [number for number, ids in enumerate(texts) if ids and len(ids) <= (self.max_length or len(ids))]
        logits = self.classifier.logits([texts[number] or [] for number in fits])
        found = dict(zip(fits, logits[:, 0].tolist(), strict=True))
        if len(fits) < len(texts) and not self._warned:
            self._warned = True
            logger.warning(
                "The reward model %s cannot read some texts, so their completions have no score: the longest has %d tokens, of at "
                "most %s. Sample fewer new tokens, or leave out long prompts.",
                *(self.name, max(len(ids or []) for ids in texts), self.max_length),
            )
        numbers = iter(range(len(texts)))
        return [[found.get(next(numbers)) for _ in sampled.completions] for sampled in samples]

    def _read(self, sampled: Sampled) -> list[list[int] | None]:
        """Token ids of the prompt with each completion; None where they cannot be told from the template's own."""
        answers: list[Any] = [completion.text for completion in sampled.completions]
        if sampled.is_chat:
            answers = [[{"role": "assistant", "content": text}] for text in answers]
        if not answers:
            return []
        # A pair has two completions at least; of one alone, the first stands twice.
        pair = Pair(prompt=sampled.prompt, chosen=answers[0], rejected=answers[0], more=tuple(answers[1:]))
        if sampled.is_chat and any(map(MARKS.search, strings_of(pair))):
            return [None] * len(answers)
        at = f"Reward model {self.name!r}, the prompt with example_id {sampled.example_id}"
        _, *texts = render(pair, self.classifier.tokenizer, at, self._control).completions
        strings = [text for text in texts if isinstance(text, str)]
        plain = not sampled.is_chat
        ids = iter(encode(self.classifier.tokenizer, strings, add_special_tokens=plain, control_as_text=plain))
        return [next(ids) if isinstance(text, str) else text for text in texts]

    def to(self, device: Any) -> None:
        self.classifier.to(device)
