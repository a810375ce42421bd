"""Rows -> pairs -> token ids -> batches.

row -> Pair            schema.py, columns.py, parts.py, messages.py, conversation.py, ranking.py, implicit.py; tokenized.py
Pair -> token ids      render.py, encode.py, ends.py, tokenize.py, truncate.py
whole datasets         mapping.py, prepare.py, stream.py, options.py, needs.py, report.py
images                 image_columns.py, image_source.py (_pixels, _download), image_places.py, image_text.py, image_inputs.py
rows -> PairBatch      packs.py, collate.py, uncollate.py
"""

from .batches.collate import DataCollatorForPreference
from .mapping import FEATURES
from .options import DataOptions
from .prepare import prepare_dataset, prepare_mixture
from .report import DataReport, report_table, write_reports
from .rows.needs import Needs
from .rows.schema import form_of, pair_from_row
from .stream import FilledStream, RepeatedStream
from .tokens.encode import check_tokenizer
from .tokens.tokenize import tokenize_pairs
from .tokens.truncate import Limits

__all__ = [
    "FEATURES",
    "DataCollatorForPreference",
    "DataOptions",
    "DataReport",
    "FilledStream",
    "Limits",
    "Needs",
    "RepeatedStream",
    "check_tokenizer",
    "form_of",
    "pair_from_row",
    "prepare_dataset",
    "prepare_mixture",
    "report_table",
    "tokenize_pairs",
    "write_reports",
]
