"""Which date the chat template of a run writes: decided once, the same on all ranks, and the one of the run that is resumed."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ..checkpointing import names_a_folder, of_this_run
from ..checkpointing.run_state import date_of_run
from ..config import DPOConfig
from ..data.processor import text_tokenizer
from ..data.tokens.dates import checked_date, writes_date
from ..storage.folders import atomic_write, cache_folder

logger = logging.get_logger(__name__)


class RunDate(NamedTuple):
    date: str  # YYYY-MM-DD
    source: str  # where it comes from, in words


def settle_date(args: DPOConfig, processing_class: Any) -> str | None:
    """The date (YYYY-MM-DD) that the chat template writes in this run; None where it writes none. All ranks must call.

    In this order: `--template_date`; that of the checkpoint that is resumed, or of the newest one in the output folder; with
    `--precompute_ref_log_probs` the date under which its cache was last filled for this template, so that a run of
    another day finds what is in it; today.

    Raises:
        ValueError: for `--template_date` where the template writes no date.
    """
    tokenizer = text_tokenizer(processing_class)
    if not writes_date(tokenizer):
        if args.template_date is not None:
            raise ValueError(
                f"--template_date {args.template_date} would be ignored: the chat template writes no date (it does not use "
                "strftime_now). Leave it out."
            )
        return None
    remembered = _remembered(args, tokenizer)
    answer: list[Any] = [_decided(args, remembered) if args.process_index == 0 else None]
    if args.world_size > 1:
        broadcast_object_list(answer)
    found: RunDate = RunDate(*answer[0])
    logger.warning(
        f"The chat template writes the date: {found.date} in all of this run, {found.source} (--template_date sets another)."
    )
    if remembered is not None and args.process_index == 0:
        _remember(remembered, found.date)
    return found.date


def _decided(args: DPOConfig, remembered: Path | None) -> RunDate:
    if args.template_date is not None:
        return RunDate(args.template_date, "as --template_date says")
    for folder in _checkpoints(args):
        if (date := checked_date(date_of_run(folder))) is not None:
            return RunDate(date, f"that of {folder}")
    if remembered is not None and (date := _recall(remembered)) is not None:
        return RunDate(date, f"that of the log-probs in {remembered.parent}")
    return RunDate(datetime.now().strftime("%Y-%m-%d"), "today's")


def _checkpoints(args: DPOConfig) -> list[Path]:
    """That may be resumed, as far as can be known before `train` is called: the likeliest first."""
    if names_a_folder(args.resume_from_checkpoint):
        return [Path(str(args.resume_from_checkpoint))]
    return of_this_run(Path(str(args.output_dir)))


# --- beside a cache of the reference, which has no use for tokens of another day ---


def _remembered(args: DPOConfig, tokenizer: Any) -> Path | None:
    """The file beside the cache with the date of this template."""
    if not args.precompute_ref_log_probs:
        return None
    content = json.dumps(tokenizer.chat_template, sort_keys=True)
    name = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
    return cache_folder(args.ref_cache_dir, "reference") / f"{name}.date"


def _recall(file: Path) -> str | None:
    try:
        return checked_date(file.read_text().strip())
    except (OSError, UnicodeDecodeError):
        return None


def _remember(file: Path, date: str) -> None:
    if _recall(file) == date:
        return
    try:
        with atomic_write(file) as written:
            written.write_text(date)
    except OSError:  # the cache says so itself where it cannot be written
        return
