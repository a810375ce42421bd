"""Cutting a tokenized pair to its limits. Lengths count tokens.

Both completions stand after one and the same prompt: the flat layout computes it once, and a preference between answers
to two different prompts means nothing. So the prompt is cut once per pair, where trainers that cut each sequence
(prompt + completion) on its own may give the two completions prompts of different lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from ...types import Flag, PairIds
from ..report import USELESS


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
    models are lost without it; the cut then comes right after it. The tokens of images are never cut: the words before,
    between and after them are, from the beginning on. A prompt whose images alone are beyond a limit leaves no room.

    `too_long` says what becomes of a row that these limits would cut: it is cut (`truncate`), dropped (`drop`), or stops
    the run (`error`). A ranked row is cut as a whole, for its completions share one prompt; of its useful pairs the
    `max_pairs` clearest stay: those of the largest margin, the first ones where margins are equal or unknown.
    """

    max_length: int | None
    max_prompt_length: int | None
    max_completion_length: int | None
    truncation_mode: str = "keep_start"
    too_long: str = "truncate"
    max_pairs: int | None = None
    bos_token_id: int | None = None

    def __post_init__(self):
        for name, allowed in {
            "truncation_mode": ("keep_start", "keep_end"),
            "too_long": ("truncate", "drop", "error"),
        }.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        for name in ("max_length", "max_prompt_length", "max_completion_length", "max_pairs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, or None for no limit, got {value}.")

    def apply(self, ids: PairIds) -> PairIds:
        """The row within its limits, with flags for every cut, and without pairs that are useless now.

        A row that is dropped comes back uncut: no completion is ever emptied. So does one that is useless already.
        """
        if ids.flags & USELESS:
            return ids
        cut = self._cut(ids)
        if cut is not ids and self.too_long != "truncate":
            return ids._replace(flags=ids.flags | Flag.TOO_LONG)
        if cut is None:
            return ids._replace(flags=ids.flags | Flag.NO_ROOM)
        if ids.unscored:
            cut = cut.drop_pairs(
                lambda pair: not (cut.scored(pair.chosen) and cut.scored(pair.rejected)), Flag.NO_ROOM
            )
            if cut.flags & Flag.NO_ROOM:
                return ids._replace(flags=ids.flags | Flag.NO_ROOM)
        useful = cut.drop_pairs(
            lambda pair: cut.completions[pair.chosen] == cut.completions[pair.rejected], Flag.IDENTICAL
        )
        return self._clearest(useful)

    def _clearest(self, ids: PairIds) -> PairIds:
        if self.max_pairs is None or len(ids.pairs) <= self.max_pairs:
            return ids
        stay = sorted(ids.pairs, key=lambda pair: -(pair.margin or 0.0))[: self.max_pairs]
        return ids.drop_pairs(lambda pair: pair not in stay, Flag(0))

    def _cut(self, ids: PairIds) -> PairIds | None:
        """The same object where nothing is too long, None where the prompt leaves no room."""
        longest = max(map(len, ids.completions))
        room = longest if self.max_completion_length is None else min(longest, self.max_completion_length)
        most = len(ids.prompt) if self.max_prompt_length is None else self.max_prompt_length
        fixed = sum(end - start for start, end in ids.images)
        if fixed > most:
            return None
        if self.max_length is not None:
            if self.truncation_mode == "keep_end":
                most = min(most, max(1, fixed, self.max_length - room))
            room = min(room, self.max_length - min(most, len(ids.prompt)))
            if room < 1:
                return None
        if len(ids.prompt) <= most and room == longest:
            return ids
        prompt, images = self._end_of_prompt(ids, most)
        shorter = [len(completion) > room for completion in ids.completions]
        return ids._replace(
            prompt=prompt,
            completions=[completion[:room] for completion in ids.completions],
            unscored=tuple((n, start, min(end, room)) for n, start, end in ids.unscored if start < room),
            images=images,
            flags=ids.flags
            | Flag.TRUNCATED_PROMPT * (len(prompt) < len(ids.prompt))
            | Flag.TRUNCATED_CHOSEN * any(shorter[pair.chosen] for pair in ids.pairs)
            | Flag.TRUNCATED_REJECTED * any(shorter[pair.rejected] for pair in ids.pairs),
        )

    def _end_of_prompt(self, ids: PairIds, most: int) -> tuple[list[int], tuple[tuple[int, int], ...]]:
        """The prompt without as many of its first words as are too many, and where its images are then."""
        prompt = ids.prompt
        excess = len(prompt) - most
        if excess <= 0:
            return prompt, ids.images
        if not ids.images:
            if most > 1 and prompt[0] == self.bos_token_id:
                return prompt[:1] + prompt[1 - most :], ()
            return prompt[-most:], ()
        fixed = {place for start, end in ids.images for place in range(start, end)}
        if most > len(fixed) and prompt[0] == self.bos_token_id:
            fixed.add(0)
        cut = set([place for place in range(len(prompt)) if place not in fixed][:excess])
        before = list(accumulate((place in cut for place in range(len(prompt))), initial=0))
        moved = tuple((start - before[start], end - before[start]) for start, end in ids.images)
        return [number for place, number in enumerate(prompt) if place not in cut], moved
