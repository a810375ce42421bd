"""Preparing a dataset that is read as it goes: tokenized in batches, useless pairs dropped and counted on the way."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import IterableDataset

from .mapping import BATCH, FEATURES, PairMapper
from .report import DataReport
from .schema import TOKENIZED, check_columns

logger = logging.getLogger(__name__)

PATIENCE = 1000
"""A stream whose first rows are all useless is refused after this many: it would be read to its end for nothing."""


def prepare_stream(
    dataset: IterableDataset, mapper: PairMapper, useless_pairs: str, num_proc: int | None
) -> tuple[IterableDataset, DataReport]:
    """Nothing is read yet: the report fills as rows flow. Rows go through one to one, then the gate drops."""
    columns = dataset.column_names  # None where a stream does not know them before it is read
    if columns is not None:
        check_columns(columns, mapper.name)
    logger.info("%s is a stream: its pairs are tokenized, dropped and counted as they are read.", mapper.name)
    if num_proc is not None and num_proc > 1:
        logger.warning(
            "--dataset_num_proc %d does not apply to %s, a stream: use --dataloader_num_workers.",
            num_proc,
            mapper.name,
        )
    report = DataReport(name=mapper.name, streaming=True)
    stream = dataset.with_format(None).map(
        mapper, batched=True, batch_size=BATCH, with_indices=True, remove_columns=columns
    )
    stream = stream.filter(
        StreamGate(report=report, useless_pairs=useless_pairs),
        input_columns=["flags", *TOKENIZED],
        with_indices=True,
        batched=True,
        batch_size=BATCH,
    )
    return stream.select_columns(list(FEATURES)).cast(FEATURES), report


@dataclass(kw_only=True)
class StreamGate:
    """Counts the rows of a stream as they flow, and lets the useful ones through: bool per row."""

    report: DataReport
    useless_pairs: str

    def __call__(
        self, flags: list[int], prompts: list, chosen: list, rejected: list, indices: list[int]
    ) -> list[bool]:
        before = self.report.dropped
        lengths = [[len(ids) for ids in pair] for pair in zip(prompts, chosen, rejected, strict=True)]
        keep = self.report.add(np.asarray(flags), np.asarray(lengths), first_row=indices[0])
        if self.report.dropped > before:
            self._refuse_or_warn(before)
        return keep.tolist()

    def _refuse_or_warn(self, before: int) -> None:
        """Warns at the first dropped pair, the 10th, the 100th: a stream may be long."""
        nothing_useful = self.report.rows >= PATIENCE and not self.report.kept
        if self.useless_pairs == "error" or nothing_useful:
            self.report.refuse_or_warn(self.useless_pairs)
        elif not before or len(str(self.report.dropped)) > len(str(before)):
            lines = "; ".join(self.report.dropped_lines())
            logger.warning("%s: %s, of %d rows so far.", self.report.name, lines, self.report.rows)


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
        for _ in range(-count % self.rows_of_all_ranks):
            yield {**row, "weight": 0.0}
