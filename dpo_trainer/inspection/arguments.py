"""The command line of an inspection: the options of training, which decide what is found, and three of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import HfArgumentParser

from ..cli import ModelArguments, ScriptArguments, parse_args
from ..config import DPOConfig
from ..storage.folders import check_folder


@dataclass
class InspectionArguments:
    """What is not an option of training; `output_dir` is another folder than the model's."""

    output_dir: str = field(
        default="out/inspection", metadata={"help": "Where index.html and inspection.json are written."}
    )
    show: int = field(default=3, metadata={"help": "Rows to show token by token; 0 for none."})
    max_rows: int | None = field(
        default=None,
        metadata={"help": "Read this many rows: random ones by --seed, the first ones of a stream. Default: all."},
    )

    def __post_init__(self):
        check_folder("--output_dir", self.output_dir)
        if self.show < 0:
            raise ValueError(f"--show must be 0 or more, got {self.show}.")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"--max_rows must be at least 1, got {self.max_rows}.")


def parse(
    argv: Sequence[str] | None = None,
) -> tuple[InspectionArguments, ScriptArguments, ModelArguments, DPOConfig]:
    """As `scripts/dpo.py` parses its arguments, so that the file and the flags of a run can be given here unchanged.

    An `output_dir` in a file of options is the model's, and not used here; the flag is this command's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    own = HfArgumentParser(InspectionArguments, add_help=False, allow_abbrev=False, usage="%(prog)s [option ...]")
    if {"-h", "--help"} & set(words):
        print(own.format_help())
        print("And every option of training:\n")
    inspection, rest = own.parse_args_into_dataclasses(words, return_remaining_strings=True)
    script, model, config, _ = parse_args(rest)
    if (script.dataset_name is None and script.datasets is None) or model.model_name_or_path is None:
        raise ValueError(
            "What shall be inspected? --dataset_name (or --datasets) names the preference pairs, --model_name_or_path the model (or a "
            "folder with its tokenizer alone)."
        )
    return inspection, script, model, config
