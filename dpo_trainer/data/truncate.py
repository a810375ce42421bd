"""Cutting a tokenized pair to its limits. Lengths count tokens.

Both completions stand after one and the same prompt: the flat layout computes it once, and a preference between answers
to two different prompts means nothing. So the prompt is cut once per pair, where trainers that cut each sequence
(prompt + completion) on its own may give the two completions prompts of different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from .report import Flag


class PairIds(NamedTuple):
    """Token ids of a pair on its way through the pipeline, and what happened to it so far."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    flags: int = 0


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a pair may measure, None for no limit. Applied in this order:

    1. `max_prompt_length` cuts the beginning of the prompt, `max_completion_length` the end of each completion.
    2. `max_length` holds for prompt + completion, each completion for itself:
       `keep_start` cuts the ends of the completions. A prompt of `max_length` tokens or more leaves no room: the pair
       is useless.
       `keep_end` cuts the beginning of the prompt until the longer completion fits, or one prompt token is left; only
       then the ends of the completions.

    A prompt that starts with `bos_token_id` keeps it when its beginning is cut (unless one token is left), for some
    models are lost without it; the cut then comes right after it.
    """

    max_length: int | None
    max_prompt_length: int | None
    max_completion_length: int | None
    truncation_mode: str = "keep_start"
    bos_token_id: int | None = None

    def __post_init__(self):
        if self.truncation_mode not in ("keep_start", "keep_end"):
            raise ValueError(f"truncation_mode must be 'keep_start' or 'keep_end', got {self.truncation_mode!r}.")
        for name in ("max_length", "max_prompt_length", "max_completion_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, got {value}.")

    def apply(self, ids: PairIds) -> PairIds:
        """The pair within its limits, with flags for every cut, for no room, and for completions that are now equal.

        A pair without room comes back uncut: no completion is ever emptied. So does one that is useless already.
        """
        if ids.flags & Flag.EMPTY_COMPLETION:
            return ids
        prompt = self._end_of_prompt(ids.prompt, self.max_prompt_length)
        chosen, rejected = ids.chosen[: self.max_completion_length], ids.rejected[: self.max_completion_length]
        if self.max_length is not None:
            if self.truncation_mode == "keep_end":
                longer = max(len(chosen), len(rejected))
                prompt = self._end_of_prompt(prompt, max(1, self.max_length - longer))
            room = self.max_length - len(prompt)
            if room < 1:
                return ids._replace(flags=ids.flags | Flag.NO_ROOM)
            chosen, rejected = chosen[:room], rejected[:room]
        flags = (
            Flag.TRUNCATED_PROMPT * (len(prompt) < len(ids.prompt))
            | Flag.TRUNCATED_CHOSEN * (len(chosen) < len(ids.chosen))
            | Flag.TRUNCATED_REJECTED * (len(rejected) < len(ids.rejected))
            | Flag.IDENTICAL * (chosen == rejected)
        )
        return PairIds(prompt, chosen, rejected, ids.flags | flags)

    def _end_of_prompt(self, prompt: list[int], keep: int | None) -> list[int]:
        if keep is None or len(prompt) <= keep:
            return prompt
        if keep > 1 and prompt[0] == self.bos_token_id:
            return prompt[:1] + prompt[1 - keep :]
        return prompt[-keep:]
