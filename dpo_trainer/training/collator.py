"""The collator of a run: ours, as layout, cache and budget want it; one of the user's, refused where it lacks what they need."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import DPOConfig
from ..data import DataCollatorForPreference
from ..losses import Objective
from ..scoring.layout import Layout
from ..types import with_scored_tokens
from .micro_batches import default_micro_batch_tokens


@dataclass(frozen=True)
class ScoredOnTheHost:
    """A collator for other libraries, whose masks say which tokens are scored: read before they are on a GPU, which would be
    waited for in every micro-batch, and by the workers of the data loader."""

    collator: Callable

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return with_scored_tokens(self.collator(rows))


def run_collator(
    of_user: Callable | None, args: DPOConfig, layout: Layout, objective: Objective, pad_token_id: int, keyed: bool
) -> Callable:
    """The collator of the user, or ours. `keyed`: whether batches need the cache keys of their completions.

    Raises:
        ValueError: for a collator that does not do what an option needs.
    """
    budget = args.max_tokens_per_micro_batch
    if of_user is None:
        own = DataCollatorForPreference(
            pad_token_id,
            layout.name,
            args.pad_to_multiple_of,
            keyed=keyed,
            max_tokens=budget,
            pack_tokens=default_micro_batch_tokens(args, objective),
            images=layout.images,
        )
        layout.collators.append(own)
        return own
    if getattr(of_user, "max_tokens", None) != budget:
        raise ValueError(
            f"--max_tokens_per_micro_batch is {budget}, and the data_collator, which splits batches, has max_tokens "
            f"{getattr(of_user, 'max_tokens', None)}: use DataCollatorForPreference(..., max_tokens={budget}) or a subclass "
            "of it, or set the option to what yours has."
        )
    if keyed and not getattr(of_user, "keyed", False):
        raise ValueError(
            "--precompute_ref_log_probs looks log-probs up by the content of completions, which the data_collator does not "
            "tell: use DataCollatorForPreference(..., keyed=True) or a subclass of it, or leave the option off."
        )
    if layout.images is not None and isinstance(of_user, DataCollatorForPreference) and of_user.images is None:
        of_user = copy.copy(of_user)
        of_user.images = layout.images  # which only the trainer knows
    return of_user if isinstance(of_user, DataCollatorForPreference) else ScoredOnTheHost(of_user)
