"""A dataset of rows -> a dataset of token ids within the limits, useless rows dropped, everything counted."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset

from ..types import Flag, PairIds
from .caching import map_cached
from .content import content_id
from .images.image_columns import beside, image_columns, same_image_types, undecoded
from .images.source import images_of
from .images.text import ImageText
from .mapping import BATCH, FEATURES, NOTES, PairMapper
from .options import DataOptions
from .processor import text_tokenizer
from .report import USELESS, DataReport, RowFacts
from .rows.column_kinds import kinds_of_features
from .rows.column_names import announce_unread, check_columns, compared_columns, read_columns
from .rows.requirements import Needs
from .stream import prepare_stream, warn_of_templated
from .tokens.dates import dated

logger = logging.getLogger(__name__)

READERS = ("json", "csv", "parquet", "arrow", "text", "generator", None)
"""Names that `datasets` gives by itself, and that do not tell which dataset it is."""


def prepare_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: Any,
    options: DataOptions | None = None,
    *,
    name: str = "train",
    needs: Needs | None = None,
    first_id: int = 0,
) -> tuple[Dataset | IterableDataset, DataReport]:
    """Rows of any form (schema.py) -> the columns of `mapping.FEATURES`, beside those of images where `tokenizer` is a
    processor: of an image nothing but its header is read.

    `example_id` is the row number in the dataset given (from `first_id` on), before anything is dropped; for streams,
    which know none, a 63-bit hash of the token ids: the same on every rank and worker and after a resume, and equal for
    equal rows. `length` is prompt + completions, the tokens of the row in the flat layout. Rows that are token ids
    already keep their `example_id` and need no tokenizer (None); preparing the result again changes nothing.

    Useless rows (report.DROPPED) are dropped and counted, or refused. Results are cached by the dataset's fingerprint,
    the tokenizer's content and the options. `needs` are checked of every row that is kept.
    """
    options = options or DataOptions()
    source = _source(dataset)
    images = ImageText.of(tokenizer, options.image_access)
    tokenizer = dated(text_tokenizer(tokenizer), options.template_date)
    mapper = PairMapper(
        tokenizer=tokenizer,
        limits=options.limits(getattr(tokenizer, "bos_token_id", None)),
        name=name,
        source=source,
        streaming=isinstance(dataset, IterableDataset),
        announces=isinstance(dataset, IterableDataset) and dataset.column_names is None,
        allow_special_tokens_in_text=options.allow_special_tokens_in_text,
        first_id=first_id,
        row_numbers=row_numbers(dataset),
        images=images,
    )
    if isinstance(dataset, Dataset):
        _check_table(dataset, mapper.label)
        return _prepare_table(dataset, mapper, options, needs or Needs())
    if isinstance(dataset, IterableDataset):
        return prepare_stream(dataset, mapper, options, needs or Needs())
    raise ValueError(
        f"{name} is a {type(dataset).__name__}, not a datasets.Dataset or IterableDataset. {_way_out(dataset)}"
    )


def prepare_mixture(
    parts: Sequence[Dataset | IterableDataset],
    tokenizer: Any,
    options: DataOptions | None = None,
    *,
    name: str = "train",
    needs: Needs | None = None,
) -> tuple[Dataset | IterableDataset, dict[str, DataReport]]:
    """Several datasets as one, each prepared on its own: one after another, or for streams row by row in turn until all
    have ended. Ids count on from one table to the next. Reports by name: `name`, or "`name` 0", "`name` 1" ... of several.
    """
    if not parts or len({isinstance(part, IterableDataset) for part in parts}) > 1:
        raise ValueError(
            f"{name}: a mixture needs at least one dataset, and all of them tables or all of them streams."
        )
    names = [name] if len(parts) == 1 else [f"{name} {number}" for number in range(len(parts))]
    prepared, reports, first_id = [], {}, 0
    for own, part in zip(names, parts, strict=True):
        rows, reports[own] = prepare_dataset(part, tokenizer, options, name=own, needs=needs, first_id=first_id)
        first_id += len(part) if isinstance(part, Dataset) else 0
        prepared.append(rows)
    if len(prepared) == 1:
        return prepared[0], reports
    if isinstance(prepared[0], IterableDataset):
        return datasets.interleave_datasets(prepared, stopping_strategy="all_exhausted_without_replacement"), reports
    with _progress_bars(not (options or DataOptions()).disable_tqdm):
        return datasets.concatenate_datasets(same_image_types(prepared)), reports


def _source(dataset: Any) -> str:
    """Where a dataset came from, if it knows."""
    source = getattr(getattr(dataset, "info", None), "dataset_name", None)
    return "" if source in READERS else source


def row_numbers(dataset: Any) -> np.ndarray | None:
    """Of a dataset that was made by selecting rows of another: where they stand there."""
    selected = getattr(dataset, "_indices", None)
    return None if selected is None else selected.column(0).to_numpy()


def _way_out(dataset: Any) -> str:
    if isinstance(dataset, dict):
        return f"Name one of its splits: {', '.join(map(repr, dataset))}."
    return "Build one with Dataset.from_list(rows) or IterableDataset.from_generator(function)."


def _check_table(dataset: Dataset, name: str) -> None:
    if not len(dataset):
        raise ValueError(f"{name} has no rows. Check its file or its split.")
    columns, kinds = dataset.column_names, kinds_of_features(dataset.features)
    check_columns(columns, name, kinds)
    announce_unread(columns, name, kinds)


def _prepare_table(
    dataset: Dataset, mapper: PairMapper, options: DataOptions, needs: Needs
) -> tuple[Dataset, DataReport]:
    plain = undecoded(dataset.with_format(None), mapper.label)
    columns = plain.column_names
    read = read_columns(columns) + compared_columns(columns)  # what is the user's own is not even decoded
    with _progress_bars(not options.disable_tqdm):
        mapped = map_cached(
            plain.select_columns(read),
            mapper,
            mapper.tokenizer,
            mapper.fingerprint(plain),
            options.dataset_num_proc,
            batched=True,
            batch_size=BATCH,
            with_indices=True,
            remove_columns=read,
            features=Features(FEATURES | NOTES),
            desc=f"Tokenizing {mapper.label}",
        )
    facts = _facts(mapped)
    if options.deduplicate:
        shown = plain.select_columns(image_columns(plain)) if mapper.images is not None else None
        facts.flags[_repeated(mapped, shown, facts.flags & USELESS == 0)] |= Flag.DUPLICATE
    report = DataReport(name=mapper.name, source=mapper.source)
    numbers = np.arange(len(mapped)) if mapper.row_numbers is None else mapper.row_numbers
    keep = report.add(facts, numbers)
    report.refuse_unwanted(useless_pairs=options.useless_pairs, too_long=options.too_long)
    report.refuse_empty()
    warn_of_templated(report)
    margins = mapped["margin"] if needs.unusable_margin else ()
    longest = np.asarray(mapped["longest"])
    needs.check(np.asarray(mapped["largest_id"]), longest, margins, keep, numbers, mapper.label)
    needs.warn_beyond_window(longest, keep, numbers, mapper.label)
    mapped = mapped.remove_columns(list(NOTES))
    if mapper.images is not None and (columns := image_columns(plain)):
        with _progress_bars(not options.disable_tqdm):
            mapped = beside(mapped, plain.select_columns(columns))
    if report.dropped:
        mapped = mapped.select(np.flatnonzero(keep))
    return mapped, report


def _facts(mapped: Dataset) -> RowFacts:
    """From offsets alone: no token is read."""
    table = mapped.with_format("arrow")[:]
    prompt = pc.list_value_length(table["prompt_ids"]).to_numpy()
    return RowFacts(
        flags=table["flags"].to_numpy().copy(),
        pairs=pc.list_value_length(table["pairs"]).to_numpy(),
        left_out=table["left_out"].to_numpy(),
        prompt_tokens=prompt,
        completion_tokens=table["length"].to_numpy() - prompt,
    )


def _repeated(mapped: Dataset, shown: Dataset | None, used: np.ndarray) -> np.ndarray:
    """Row numbers of those with the prompt, its images (`shown`) and the completions of an earlier row that is used."""
    seen: set[int] = set()
    repeated = []
    for number in np.flatnonzero(used).tolist():
        row = mapped[number]
        ids = PairIds(row["prompt_ids"], [row["chosen_ids"], row["rejected_ids"], *row["more_ids"]])
        content = content_id(ids, images_of(shown[number], "") if shown is not None and shown.column_names else ())
        if content in seen:
            repeated.append(number)
        seen.add(content)
    return np.asarray(repeated, dtype=np.int64)


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
