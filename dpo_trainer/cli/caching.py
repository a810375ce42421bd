"""The command that fills the cache of reference log-probs, shows what is in it, and makes room."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from transformers import HfArgumentParser

from ..printable import printable
from ..reference.cache import Summary, prune, summaries
from ..storage.folders import cache_folder
from .parsing import parse_args

OUTPUT = "out/reference"
LABELLED = ("computed in",)  # the other texts say themselves what they are


@dataclass
class CacheArguments:
    """What is not an option of training."""

    stats: bool = field(default=False, metadata={"help": "Show what the cache holds, and do nothing else."})
    prune: bool = field(
        default=False,
        metadata={"help": "Delete what --older_than_days or --prune_reference names, and do nothing else."},
    )
    older_than_days: float | None = field(
        default=None, metadata={"help": "With --prune: references that were not used for so long."}
    )
    prune_reference: list[str] = field(
        default_factory=list, metadata={"help": "Delete these references; the first digits of each are enough."}
    )

    def __post_init__(self):
        self.prune = self.prune or bool(self.prune_reference)
        if self.prune and self.older_than_days is None and not self.prune_reference:
            raise ValueError(
                "--prune of what? Say --older_than_days 30, or --prune_reference and the digits that --stats shows."
            )
        if self.older_than_days is not None and not (self.prune and self.older_than_days >= 0):
            raise ValueError(f"--older_than_days {self.older_than_days} needs --prune, and a number of at least 0.")


def main(argv: Sequence[str] | None = None) -> None:
    """Raises ValueError for everything that cannot work."""
    words = list(sys.argv[1:] if argv is None else argv)
    own = HfArgumentParser(CacheArguments, add_help=False, allow_abbrev=False, usage="%(prog)s [option ...]")
    if {"-h", "--help"} & set(words):
        print(own.format_help())
        print("And every option of training:\n")
    arguments, rest = own.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if arguments.stats or arguments.prune:
        look_after(arguments, _folder(rest))
    else:
        fill(rest)


def fill(argv: Sequence[str]) -> None:
    """What a training run with these options would compute before its first step."""
    script, model, config, given = parse_args([*argv, "--precompute_ref_log_probs", "true"])
    if model.model_name_or_path is None:
        raise ValueError(
            "Whose log-probs, of which pairs? Give --model_name_or_path and --dataset_name as for training, or --stats."
        )
    from .build import build_trainer  # slow to import, and only this needs it

    if "output_dir" not in given:  # of what is written, only the report of the data
        config.output_dir = OUTPUT
    trainer = build_trainer(script, model, config)
    trainer.precompute_reference()
    print(
        f"Computed in {trainer.inputs.precision}: a run that computes in another precision has another reference, and finds "
        "nothing here. Say --bf16 (or --bf16 false) to both where this machine and that one differ."
    )


def look_after(arguments: CacheArguments, folder: Path) -> None:
    if arguments.prune:
        age = None if arguments.older_than_days is None else timedelta(days=arguments.older_than_days)
        deleted = prune(folder, older_than=age, references=arguments.prune_reference)
        show(deleted, f"Deleted from {folder}")
    if arguments.stats:
        show(summaries(folder), f"Reference log-probs in {folder}")


def show(found: Sequence[Summary], title: str) -> None:
    """Two lines for each reference: what it is, and how it was used."""
    print(f"{printable(title)}: {len(found)}, {sum(each.bytes for each in found) / 1e6:,.1f} MB.")
    for each in found:
        known = (
            f"{label} {text}" if label in LABELLED else text for label, text in each.about.items() if text != "none"
        )
        print(f"\n{each.reference[:12]}  {printable(each.problem or '; '.join(known))}")
        print(
            f"{'':12}  {each.entries:,} log-probs, {each.bytes / 1e6:,.1f} MB; {each.hits:,} found, {each.computed:,} computed; "
            f"last used {each.used:%Y-%m-%d %H:%M} UTC"
        )


def _folder(words: Sequence[str]) -> Path:
    """Where to look; other options of training have no say in it, and would be ignored."""
    given: str | None = None
    if words:
        flag, _, value = words[0].partition("=")
        rest = list(words[1:]) if not value else [value, *words[1:]]
        if flag != "--ref_cache_dir" or len(rest) != 1:
            raise ValueError(f"--stats and --prune take --ref_cache_dir and nothing else, got {' '.join(words)}.")
        given = rest[0]
    return cache_folder(given, "reference")
