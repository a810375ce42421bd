"""The datasets of a run: rows of any form made ready, counted, and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers.utils import logging

from ..config import DPOConfig
from ..data import DataOptions, DataReport, Needs, prepare_mixture, report_table, write_reports
from ..data.batches.sampling import BalancedSampler
from ..data.content import dataset_digest
from ..data.files.dataset_inputs import Rows, datasets_of, refuse_columns
from ..data.files.local_files import AnyDataset
from ..models.positions import table_of_positions, window_of
from ..models.vocabulary import smallest_vocabulary

logger = logging.get_logger(__name__)


class RunData:
    """Prepares datasets under the options of one run.

    Args:
        needs: what every row that is kept must satisfy.
        date: what the chat template writes for today, YYYY-MM-DD.
    """

    def __init__(self, args: DPOConfig, tokenizer: Any, needs: Needs, date: str | None = None):
        self.args, self.tokenizer, self.needs = args, tokenizer, needs
        self.options = replace(DataOptions.from_config(args), template_date=date)
        self.reports: dict[str, DataReport] = {}

    def prepare(self, dataset: Rows | Sequence[Rows], name: str) -> AnyDataset:
        """Rows of any form -> token ids, counted. A list of datasets is one mixture."""
        with self.args.main_process_first(desc=f"loading the {name} data"):
            parts = datasets_of(dataset, name)
        if self.args.world_size > 1:
            refuse_split_streams(parts, name)
        with self.args.main_process_first(desc=f"preparing the {name} data"):
            prepared, reports = prepare_mixture(parts, self.tokenizer, self.options, name=name, needs=self.needs)
        if self.args.world_size > 1:
            refuse_different_tables(prepared, name)
        refuse_weightless(prepared, name)
        self.reports.update(reports)
        return prepared

    def prepare_evaluation(
        self, datasets: Rows | Sequence[Rows] | Mapping[str, Rows]
    ) -> AnyDataset | dict[str, AnyDataset]:
        if isinstance(datasets, Mapping):
            refuse_columns(datasets, "eval")
            return {name: self.prepare(rows, f"eval {name}") for name, rows in datasets.items()}
        return self.prepare(datasets, "eval")

    def report(self) -> None:
        """One table of what was kept, cut and dropped; the same as data_report.json in the output folder."""
        if self.args.process_index == 0 and self.reports:
            reports = list(self.reports.values())
            write_reports(self.reports, Path(self.args.output_dir))
            if any(report.rows for report in reports):  # a stream counts as it is read
                logger.warning("Data, by rows:\n" + report_table(reports))
            for warning in (line for report in reports for line in report.warnings()):
                logger.warning(warning)

    def has_stream(self) -> bool:
        return any(report.streaming for report in self.reports.values())

    def count_streams_anew(self) -> None:
        """They were read for something else, and will be read again."""
        for report in self.reports.values():
            if report.streaming:
                report.clear()


def balanced_sampler(rows: Dataset, args: DPOConfig, batch_size: int, generator: torch.Generator) -> BalancedSampler:
    """The sampler of `--train_sampling_strategy batch_rebalance`. `batch_size`: rows of one rank in one micro-batch."""
    return BalancedSampler(
        rows[args.length_column_name],
        batch_size=batch_size,
        ranks=args.world_size,
        accumulation=args.gradient_accumulation_steps,
        generator=generator,
    )


def needs_of_models(
    model: nn.Module, references: Sequence[nn.Module], *, unusable_margin: Any, multiple: int | None
) -> Needs:
    """What the model, and the references beside it, demand of every row. `multiple`: padding takes positions too."""
    found = [table_of_positions(each) for each in (model, *references)]
    least = min((positions for positions in found if positions is not None), default=None)
    return Needs(
        **smallest_vocabulary(model, references[0] if references else None),
        positions=least if least is None else least - least % (multiple or 1),
        window=window_of(model),
        unusable_margin=unusable_margin,
    )


WHOLE = (
    "Give every process the full dataset, without split_dataset_by_node or shard: each process takes its own shard here, and the "
    "data would be sharded twice."
)


def refuse_weightless(table: AnyDataset, name: str) -> None:
    """ValueError where no row of a table counts. A stream is not read."""
    if not isinstance(table, Dataset) or "weight" not in table.column_names or not len(table):
        return
    if table.with_format("numpy", columns=["weight"])["weight"][:].max() == 0:
        raise ValueError(
            f"Every row of the {name} data has the weight 0: give some rows another, or leave the column out."
        )


def refuse_split_streams(parts: Sequence[AnyDataset], name: str) -> None:
    """ValueError for a stream of which this process has only its share: most of its rows would never be read."""
    # A private attribute: `datasets` tells in no other way. It stays through map, filter, shuffle, and in mixtures.
    if any(getattr(part, "_distributed", None) is not None for part in parts):
        raise ValueError(f"The {name} data were split between the processes by split_dataset_by_node. {WHOLE}")


def refuse_different_tables(table: AnyDataset, name: str) -> None:
    """ValueError, on all processes, if they do not hold the same rows: some would be lost, or one process would wait for
    the others for ever. All must call. A stream is not read."""
    if not isinstance(table, Dataset):
        return
    held = gather_object([(dataset_digest(table), len(table))])
    if len(set(held)) > 1:
        counts = ", ".join(str(rows) for _, rows in held)
        raise ValueError(f"The processes hold different {name} data ({counts} rows, by process). {WHOLE}")
