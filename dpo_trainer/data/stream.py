"""Preparing a dataset that is read as it goes: tokenized in batches, useless pairs dropped and counted on the way."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Features, IterableDataset

from .images.image_columns import undecoded
from .mapping import BATCH, FEATURES, NOTES, STREAMED_IMAGES, PairMapper, facts_of
from .options import DataOptions
from .report import DataReport
from .rows.column_kinds import kinds_of_features
from .rows.column_names import announce_unread, check_columns, compared_columns, read_columns
from .rows.requirements import Needs

logger = logging.getLogger(__name__)

PATIENCE = 1000
"""A stream whose first rows are all useless is refused after this many: it would be read to its end for nothing."""

PADDING_ROW_ID = -(2**63)
"""The `example_id` of a row that only fills a batch. Rows of a stream are named by a hash, which is never negative."""


def prepare_stream(
    dataset: IterableDataset, mapper: PairMapper, options: DataOptions, needs: Needs
) -> tuple[IterableDataset, DataReport]:
    """Nothing is read yet: the report fills as rows flow. Rows go through one to one, then the gate drops."""
    columns = dataset.column_names  # None where a stream does not know them before it is read
    if columns is not None:
        kinds = kinds_of_features(dataset.features)
        check_columns(columns, mapper.label, kinds)
        announce_unread(columns, mapper.label, kinds)
    if options.deduplicate:
        raise ValueError(
            f"--deduplicate would have to remember all of {mapper.label}, a stream: leave out --streaming or --deduplicate."
        )
    logger.info("%s is a stream: its pairs are tokenized, dropped and counted as they are read.", mapper.label)
    if (options.dataset_num_proc or 1) > 1:
        logger.warning(
            "--dataset_num_proc %d does not apply to %s, a stream: use --dataloader_num_workers.",
            options.dataset_num_proc,
            mapper.label,
        )
    report = DataReport(name=mapper.name, source=mapper.source, streaming=True)
    plain = undecoded(dataset.with_format(None), mapper.label)
    if columns is not None:
        columns = read_columns(columns) + compared_columns(columns)  # what is the user's own is not even decoded
        plain = plain.select_columns(columns)
    stream = plain.map(mapper, batched=True, batch_size=BATCH, with_indices=True, remove_columns=columns)
    stream = stream.filter(
        StreamGate(report=report, options=options, needs=needs),
        input_columns=GATE_COLUMNS,
        with_indices=True,
        batched=True,
        batch_size=BATCH,
    )
    features = Features(FEATURES | STREAMED_IMAGES) if mapper.images is not None else FEATURES
    return stream.select_columns(list(features)).cast(features), report


def warn_of_templated(report: DataReport) -> None:
    """Where most rows hold control tokens, a chat template was put around them already."""
    found = report.counts["control_text"]
    if 2 * found > report.kept:
        logger.warning(
            "%s: %d of %d rows hold the text of control tokens, as rows do that a chat template was put around already. It is kept as "
            "text, which the model does not take for turns: say --allow_special_tokens_in_text true to read them as tokens.",
            report.label,
            found,
            report.kept,
        )


GATE_COLUMNS = [*NOTES, "prompt_ids", "pairs", "margin", "length"]


@dataclass(kw_only=True)
class StreamGate:
    """Counts the rows of a stream as they flow, and lets the useful ones through: bool per row."""

    report: DataReport
    options: DataOptions
    needs: Needs
    warned_of_window: bool = False

    def __deepcopy__(self, memo: dict) -> StreamGate:
        """`interleave_datasets` copies its streams; their counts still belong into this report."""
        return self

    def __call__(self, *values: list) -> list[bool]:
        *columns, indices = values
        batch = dict(zip(GATE_COLUMNS, columns, strict=True))
        before = self.report.dropped
        numbers = np.asarray(indices)
        first = not self.report.rows
        keep = self.report.add(facts_of(batch), numbers)
        if first:
            warn_of_templated(self.report)
        if self.report.dropped > before:
            self._refuse_or_warn(before)
        longest = np.asarray(batch["longest"])
        self.needs.check(np.asarray(batch["largest_id"]), longest, batch["margin"], keep, numbers, self.report.label)
        self.warned_of_window = self.warned_of_window or self.needs.warn_beyond_window(
            longest, keep, numbers, self.report.label
        )
        return keep.tolist()

    def _refuse_or_warn(self, before: int) -> None:
        """Warns at the first dropped row, the 10th, the 100th: a stream may be long."""
        self.report.refuse_unwanted(useless_pairs=self.options.useless_pairs, too_long=self.options.too_long)
        if self.report.rows >= PATIENCE:
            self.report.refuse_empty()
        if not before or len(str(self.report.dropped)) > len(str(before)):
            lines = "; ".join(self.report.dropped_lines())
            logger.warning("%s: %s, of %d rows so far.", self.report.label, lines, self.report.rows)


class FilledStream(torch.utils.data.IterableDataset):
    """A prepared stream, filled up at its end with rows of weight 0 until all ranks have full batches.

    accelerate would repeat the first rows of the stream there, and count them again.
    """

    def __init__(self, stream: IterableDataset, rows_of_all_ranks: int):
        self.stream = stream
        self.rows_of_all_ranks = rows_of_all_ranks

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        count = 0
        for row in self.stream:
            count += 1
            yield row
        if not count:
            refuse_empty_stream()
        for _ in range(-count % self.rows_of_all_ranks):
            yield {**row, "example_id": PADDING_ROW_ID, "weight": 0.0}


class RepeatedStream(torch.utils.data.IterableDataset):
    """A prepared stream to train on, pass after pass, as one long one.

    A pass that ends inside an optimizer step is followed by the next one in the same step, and a resumed run finds its
    place by counting rows, in whichever pass it lies. A stream without a row is refused; one that comes back empty in a
    later pass, as a generator that can be read only once, has ended.
    """

    def __init__(self, stream: IterableDataset):
        self.stream = stream

    def __iter__(self) -> Iterator[dict]:
        for number in itertools.count():
            self.stream.set_epoch(number)
            empty = True
            for row in self.stream:
                empty = False
                yield row
            if empty and not number:
                refuse_empty_stream()
            if empty:
                return


def refuse_empty_stream() -> None:
    """ValueError, for a run that has nothing to read would end at once as if all were well. One of several data loader
    workers may well have no rows: the others have them."""
    worker = torch.utils.data.get_worker_info()
    if worker is None or worker.num_workers == 1:
        raise ValueError(
            "A stream has no row left: it is empty, or all of its rows were dropped (data_report.json in the output "
            "folder counts why). Check its files, or raise --max_length where rows are too long."
        )
