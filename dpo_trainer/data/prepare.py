"""A dataset of rows -> a dataset of token ids within the limits, useless pairs dropped, everything counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Value

from .mapping import BATCH, FEATURES, PairMapper
from .report import DataReport
from .schema import TOKENIZED, check_columns, is_tokenized, unread_columns
from .stream import prepare_stream
from .tokenize import text_tokenizer
from .truncate import Limits

logger = logging.getLogger(__name__)


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: Any,
    *,
    max_length: int | None,
    max_prompt_length: int | None,
    max_completion_length: int | None,
    truncation_mode: str,
    useless_pairs: str,
    num_proc: int | None,
    name: str = "train",
    progress: bool = True,
) -> tuple[Dataset | IterableDataset, DataReport]:
    """Rows of any form (schema.py) -> columns example_id, prompt_ids, chosen_ids, rejected_ids, weight, length.

    `example_id` is the row number in the dataset given, before anything is dropped; for streams, which know none, a
    63-bit hash of the three id lists: the same on every rank and worker and after a resume, and equal for equal pairs.
    `length` is prompt + chosen + rejected, the tokens of the pair in the flat layout. Rows that are token ids already
    keep their `example_id` and need no tokenizer (None); preparing the result again changes nothing.

    Useless pairs (report.DROPPED) are dropped and counted, or with `useless_pairs="error"` refused. Results are cached
    by the dataset's fingerprint, the tokenizer's content and the limits. `num_proc` is for datasets that are not streams.
    """
    if useless_pairs not in ("drop", "error"):
        raise ValueError(f"useless_pairs must be 'drop' or 'error', got {useless_pairs!r}.")
    tokenizer = text_tokenizer(tokenizer)
    limits = Limits(
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        truncation_mode=truncation_mode,
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
    )
    if isinstance(dataset, Dataset):
        _check_table(dataset, name)
        mapper = PairMapper(tokenizer=tokenizer, limits=limits, name=name, streaming=False)
        return _prepare_table(dataset, mapper, useless_pairs, num_proc, progress)
    if isinstance(dataset, IterableDataset):
        mapper = PairMapper(tokenizer=tokenizer, limits=limits, name=name, streaming=True)
        return prepare_stream(dataset, mapper, useless_pairs, num_proc)
    raise ValueError(
        f"{name} is a {type(dataset).__name__}, not a datasets.Dataset or IterableDataset. {_way_out(dataset)}"
    )


def _way_out(dataset: Any) -> str:
    if isinstance(dataset, dict):
        return f"Name one of its splits: {', '.join(map(repr, dataset))}."
    return "Build one with Dataset.from_list(rows) or IterableDataset.from_generator(function)."


def _check_table(dataset: Dataset, name: str) -> None:
    if not len(dataset):
        raise ValueError(f"{name} has no rows. Check its file or its split.")
    check_columns(dataset.column_names, name)
    unread = unread_columns(dataset.column_names)
    if unread and "prompt" not in dataset.column_names and not is_tokenized(dataset.column_names):
        logger.warning(
            "%s has no column 'prompt': prompts are what 'chosen' and 'rejected' share. Columns that are not read: %s.",
            name,
            ", ".join(unread),
        )


def _prepare_table(
    dataset: Dataset, mapper: PairMapper, useless_pairs: str, num_proc: int | None, progress: bool
) -> tuple[Dataset, DataReport]:
    plain = dataset.with_format(None)
    with _progress_bars(progress):
        mapped = plain.map(
            mapper,
            batched=True,
            batch_size=BATCH,
            with_indices=True,
            remove_columns=plain.column_names,
            features=Features(FEATURES | {"flags": Value("int16")}),
            num_proc=num_proc,
            new_fingerprint=mapper.fingerprint(plain),
            desc=f"Tokenizing {mapper.name}",
        )
    report = DataReport(name=mapper.name)
    keep = report.add(*_flags_and_lengths(mapped), first_row=0)
    if report.dropped:
        report.refuse_or_warn(useless_pairs)
        mapped = mapped.select(np.flatnonzero(keep))
    return mapped.remove_columns("flags"), report


def _flags_and_lengths(mapped: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Flags [N], and tokens of prompt, chosen and rejected [N, 3], from offsets alone: no token is read."""
    table = mapped.with_format("arrow")[:]
    lengths = [pc.list_value_length(table[column]).to_numpy() for column in TOKENIZED]
    return table["flags"].to_numpy(), np.stack(lengths, axis=1)


@contextmanager
def _progress_bars(wanted: bool) -> Iterator[None]:
    """The bars of `datasets`, which has one switch for all of them, put back as it was."""
    hide = not wanted and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
