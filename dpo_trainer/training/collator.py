"""The collator of a run: ours, as layout, cache and budget want it; one of the user's, refused where it lacks what they need."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from ..config import DPOConfig
from ..data import DataCollatorForPreference
from ..data.batches.packs import check_rows_fit
from ..losses import Objective
from ..scoring.layout import Layout
from ..types import with_scored_tokens
from .micro_batches import tokens_of_a_part


@dataclass(frozen=True)
class ScoredOnTheHost:
    """A collator for other libraries, whose masks say which tokens are scored: read before they are on a GPU, which would be
    waited for in every micro-batch, and by the workers of the data loader."""

    collator: Callable

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return with_scored_tokens(self.collator(rows))


def run_collator(
    given: Callable | None, args: DPOConfig, *, layout: Layout, objective: Objective, pad_token_id: int, keyed: bool
) -> Callable:
    """`given`, or ours. `keyed`: whether completions must say what they are, for a cache of reference log-probs.

    Raises:
        ValueError: for a collator that does not do what an option needs.
    """
    budget = args.max_tokens_per_micro_batch
    if given is None:
        own = DataCollatorForPreference(
            pad_token_id,
            layout.name,
            args.pad_to_multiple_of,
            keyed=keyed,
            max_tokens=budget,
            pack_tokens=tokens_of_a_part(args, objective),
            images=layout.images,
        )
        layout.collators.append(own)
        return own
    if getattr(given, "max_tokens", None) != budget:
        raise ValueError(
            f"--max_tokens_per_micro_batch is {budget}, and the data_collator, which splits batches, has max_tokens "
            f"{getattr(given, 'max_tokens', None)}: use DataCollatorForPreference(..., max_tokens={budget}) or a subclass "
            "of it, or set the option to what yours has."
        )
    if keyed and not getattr(given, "keyed", False):
        raise ValueError(
            "--precompute_ref_log_probs looks log-probs up by the content of completions, which the data_collator does not "
            "tell: use DataCollatorForPreference(..., keyed=True) or a subclass of it, or leave the option off."
        )
    if layout.images is not None and isinstance(given, DataCollatorForPreference) and given.images is None:
        given = copy.copy(given)
        given.images = layout.images  # which only the trainer knows
    return given if isinstance(given, DataCollatorForPreference) else ScoredOnTheHost(given)


def check_budget(args: DPOConfig, layout: Layout, datasets: Mapping[str, Any]) -> None:
    """Refuse tables with a row that is above `--max_tokens_per_micro_batch` by itself. Of a stream the collator does."""
    budget = args.max_tokens_per_micro_batch
    for name, rows in datasets.items():
        if budget is not None and isinstance(rows, Dataset):
            check_rows_fit(rows, name, budget, padded=layout.name == "padded", multiple=args.pad_to_multiple_of)
