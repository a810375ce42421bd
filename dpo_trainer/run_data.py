"""The datasets of a run: rows of any form made ready, counted, and reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from transformers.utils import logging

from .config import DPOConfig
from .data import DataOptions, DataReport, Needs, prepare_mixture, report_table, write_reports

logger = logging.get_logger(__name__)

Rows: TypeAlias = Dataset | IterableDataset


class RunData:
    """Prepares datasets under the options of one run.

    Args:
        needs: what every row that is kept must satisfy.
    """

    def __init__(self, args: DPOConfig, tokenizer: Any, needs: Needs):
        self.args, self.tokenizer, self.needs = args, tokenizer, needs
        self.reports: dict[str, DataReport] = {}

    def prepare(self, dataset: Rows | Sequence[Rows], name: str) -> Rows:
        """Rows of any form -> token ids, counted. A list of datasets is one mixture."""
        parts = dataset if isinstance(dataset, list | tuple) else [dataset]
        with self.args.main_process_first(desc=f"preparing the {name} data"):
            prepared, reports = prepare_mixture(
                parts, self.tokenizer, DataOptions.from_config(self.args), name=name, needs=self.needs
            )
        self.reports.update(reports)
        return prepared

    def prepare_evaluation(self, datasets: Rows | Sequence[Rows] | Mapping[str, Rows]) -> Rows | dict[str, Rows]:
        if isinstance(datasets, Mapping):
            return {name: self.prepare(rows, f"eval {name}") for name, rows in datasets.items()}
        return self.prepare(datasets, "eval")

    def report(self) -> None:
        """One table of what was kept, cut and dropped; the same as data_report.json in the output folder."""
        if self.args.process_index == 0 and self.reports:
            reports = list(self.reports.values())
            write_reports(self.reports, Path(self.args.output_dir))
            if any(report.rows for report in reports):  # a stream counts as it is read
                logger.warning("Data, by rows:\n" + report_table(reports))

    def has_stream(self) -> bool:
        return any(report.streaming for report in self.reports.values())

    def count_streams_anew(self) -> None:
        """They were read for something else, and will be read again."""
        for report in self.reports.values():
            if report.streaming:
                report.clear()
