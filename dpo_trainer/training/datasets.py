"""The datasets of a run: rows of any form made ready, counted, and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import nn
from transformers.utils import logging

from ..config import DPOConfig
from ..data import DataOptions, DataReport, Needs, prepare_mixture, report_table, write_reports
from ..data.batches.packs import check_rows_fit
from ..data.batches.sampling import BalancedSampler
from ..data.content import dataset_digest
from ..data.files.dataset_inputs import Rows, datasets_of, refuse_columns
from ..data.files.local_files import AnyDataset
from ..losses import Objective
from ..models.positions import table_of_positions, window_of
from ..models.vocabulary import smallest_vocabulary
from ..reference import Reference
from ..scoring.layout import Layout

logger = logging.get_logger(__name__)


class DatasetPreparer(Protocol):
    """Prepares the datasets of one run: `RunData` for preference pairs, `PromptData` for online DPO."""

    reports: dict[str, DataReport]
    """What became of the rows, by dataset. Empty where datasets are not counted."""

    def prepare(self, dataset: Rows | Sequence[Rows], name: str) -> AnyDataset:
        """Rows of any form -> token ids. `name` is used in errors and reports: train, eval, test."""

    def check_budget(self, layout: Layout, datasets: Mapping[str, AnyDataset | None]) -> None:
        """Refuse data with a row that is above `--max_tokens_per_micro_batch` by itself."""


class RunData:
    """Prepares datasets of preference pairs under the options of one run.

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
            datasets = datasets_of(dataset, name)
        if self.args.world_size > 1:
            refuse_split_streams(datasets, name)
        with self.args.main_process_first(desc=f"preparing the {name} data"):
            prepared, reports = prepare_mixture(datasets, self.tokenizer, self.options, name=name, needs=self.needs)
        if self.args.world_size > 1:
            refuse_different_tables(prepared, name)
        refuse_weightless(prepared, name)
        self.reports.update(reports)
        return prepared

    def check_budget(self, layout: Layout, datasets: Mapping[str, AnyDataset | None]) -> None:
        """Of tables. Rows of a stream are checked by the collator."""
        budget, multiple = self.args.max_tokens_per_micro_batch, self.args.pad_to_multiple_of
        for name, rows in datasets.items():
            if budget is not None and isinstance(rows, Dataset):
                check_rows_fit(rows, name, budget, padded=layout.name == "padded", multiple=multiple)


def by_name(evaluation: Any) -> dict[str, Any]:
    """Evaluation datasets by their names: one dataset is called eval."""
    return evaluation if isinstance(evaluation, dict) else {"eval": evaluation}


def prepare_evaluation(
    data: DatasetPreparer, datasets: Rows | Sequence[Rows] | Mapping[str, Rows]
) -> AnyDataset | dict[str, AnyDataset]:
    """One dataset, or several by name."""
    if isinstance(datasets, Mapping):
        refuse_columns(datasets, "eval")
        return {name: data.prepare(rows, f"eval {name}") for name, rows in datasets.items()}
    return data.prepare(datasets, "eval")


def report_datasets(args: DPOConfig, reports: Mapping[str, DataReport]) -> None:
    """One table of what was kept, truncated and dropped; the same as data_report.json in the output folder."""
    if args.process_index > 0 or not reports:
        return
    write_reports(reports, Path(args.output_dir))
    if any(report.rows for report in reports.values()):  # a stream counts while it is read
        logger.warning("Data, by rows:\n" + report_table(list(reports.values())))
    for warning in (line for report in reports.values() for line in report.warnings()):
        logger.warning(warning)


def clear_streams(reports: Mapping[str, DataReport]) -> None:
    """Forget the counts of streams, which will be read again."""
    for report in reports.values():
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


def needs_of_models(args: DPOConfig, model: nn.Module, reference: Reference, objective: Objective) -> Needs:
    """What the model, the references beside it and the losses demand of every row."""
    references = [second for _, second in reference.own]
    found = [table_of_positions(each) for each in (model, *references)]
    least = min((positions for positions in found if positions is not None), default=None)
    return Needs(
        **smallest_vocabulary(model, references[0] if references else None),
        # Padding takes positions too.
        positions=least if least is None else least - least % (args.pad_to_multiple_of or 1),
        window=window_of(model),
        unusable_margin=objective.unusable_margin if objective.needs_margin else None,
    )


GIVE_ALL_ROWS = (
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


def refuse_split_streams(datasets: Sequence[AnyDataset], name: str) -> None:
    """ValueError for a stream of which this process has only its share: most of its rows would never be read."""
    # A private attribute: `datasets` tells in no other way. It stays through map, filter, shuffle, and in mixtures.
    if any(getattr(each, "_distributed", None) is not None for each in datasets):
        raise ValueError(f"The {name} data were split between the processes by split_dataset_by_node. {GIVE_ALL_ROWS}")


def refuse_different_tables(table: AnyDataset, name: str) -> None:
    """ValueError, on all processes, if they do not hold the same rows: some would be lost, or one process would wait for
    the others for ever. All must call. A stream is not read."""
    if not isinstance(table, Dataset):
        return
    held = gather_object([(dataset_digest(table), len(table))])
    if len(set(held)) > 1:
        counts = ", ".join(str(rows) for _, rows in held)
        raise ValueError(f"The processes hold different {name} data ({counts} rows, by process). {GIVE_ALL_ROWS}")
