"""Data: files or datasets come in, batches go out.

files/      names -> datasets of rows                     rows/      a row -> Pair
images/     what an image is, its tensors                 tokens/    Pair -> TokenizedPair
batches/    TokenizedPair -> PairBatch
mapping.py, prepare.py, stream.py   whole datasets        report.py  what happened to their rows
"""

from .batches.collate import DataCollatorForPreference
from .mapping import FEATURES
from .options import DataOptions
from .prepare import prepare_dataset, prepare_mixture
from .report import DataReport, report_table, write_reports
from .rows.requirements import Needs
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
