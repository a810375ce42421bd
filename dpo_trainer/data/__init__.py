"""Rows -> pairs -> token ids -> batches: schema.py, implicit.py, tokenize.py, truncate.py, prepare.py, collate.py."""

from .collate import DataCollatorForPreference
from .prepare import prepare_dataset
from .report import DataReport
from .schema import pair_from_row
from .stream import FilledStream
from .tokenize import check_tokenizer, tokenize_pairs
from .truncate import Limits

__all__ = [
    "DataCollatorForPreference",
    "DataReport",
    "FilledStream",
    "Limits",
    "check_tokenizer",
    "pair_from_row",
    "prepare_dataset",
    "tokenize_pairs",
]
