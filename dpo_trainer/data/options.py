"""The options of the data: fields of `DPOConfig`, their bounds, and what they mean for the preparation of rows."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..registry import check_at_least, check_choices, choices
from .images.source import ImageAccess
from .tokens.dates import checked_date
from .tokens.truncate import Limits


@dataclass
class RowOptions:
    """What becomes of rows on their way to token ids. docs/data.md."""

    # --- the data ---
    max_length: int | None = field(
        default=1024,
        metadata={
            "help": "Most tokens of prompt + completion. Truncated pairs are counted and reported. None: no limit."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens of a prompt; its beginning is cut (its end stays, next to the answer)."},
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Most tokens of a completion; its end is cut."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata=choices(
            "keep_start",
            "keep_end",
            help="Where a pair over --max_length is cut: the end of its completions, or the beginning of its prompt "
            "(and only then the end of its completions).",
        ),
    )
    too_long: str = field(
        default="truncate",
        metadata=choices(
            "truncate",
            "drop",
            "error",
            help="What to do with rows over --max_length, --max_prompt_length or --max_completion_length: cut them, drop "
            "them with a count, or stop.",
        ),
    )
    useless_pairs: str = field(
        default="drop",
        metadata=choices(
            "drop",
            "error",
            help="What to do with pairs that cannot teach anything (chosen equals rejected, the prompt leaves no room for a "
            "completion, all scores equal): drop them with a count, or stop.",
        ),
    )
    deduplicate: bool = field(
        default=False,
        metadata={"help": "Drop rows that repeat the prompt and the completions of an earlier row, and count them."},
    )
    max_pairs_per_prompt: int | None = field(
        default=None,
        metadata={
            "help": "Most pairs of one row with several rejected or ranked completions: those of the largest margin, or the "
            "first. None: all."
        },
    )
    allow_special_tokens_in_text: bool = field(
        default=False,
        metadata={
            "help": "Read the text of a special token inside a row (such as <|im_end|>) as that token. Off, it is text: a "
            "user cannot end a turn. Switch it on for files that already contain a chat template."
        },
    )
    template_date: str | None = field(
        default=None,
        metadata={
            "help": "The date, YYYY-MM-DD, for chat templates that write the current date. Default: the date of the checkpoint in the "
            "output folder, else of the reference cache, else today. The date stays the same for the whole run."
        },
    )
    dataset_num_proc: int | None = field(
        default=None,
        metadata={"help": "Processes for tokenization. The fast tokenizer already uses every core in one."},
    )

    # --- images ---
    image_root: str | None = field(
        default=None,
        metadata={
            "help": "Root folder of image paths: relative paths start here, and no path may leave it. Default: paths start at the "
            "working directory and may lead anywhere."
        },
    )
    allow_image_urls: bool = field(
        default=False, metadata={"help": "Download images that are URLs (and keep them in the cache of datasets)."}
    )
    allow_private_image_urls: bool = field(
        default=False,
        metadata={
            "help": "With --allow_image_urls: also download from loopback, link-local, private and reserved addresses. A row can then "
            "make this machine send requests to any server that it can reach."
        },
    )


@dataclass(kw_only=True)
class DataOptions(RowOptions):
    """The same for `prepare_dataset` by itself: without a limit of length."""

    max_length: int | None = None
    disable_tqdm: bool = False

    def __post_init__(self):
        check_choices(self)
        check_row_options(self)

    @classmethod
    def from_config(cls, args: Any) -> DataOptions:
        """Those among the options of a run."""
        return cls(**{option.name: getattr(args, option.name) for option in fields(cls)})

    @property
    def image_access(self) -> ImageAccess:
        return ImageAccess(
            root=self.image_root,
            allow_urls=self.allow_image_urls,
            allow_private_urls=self.allow_private_image_urls,
        )

    def limits(self, bos_token_id: int | None) -> Limits:
        return Limits(
            max_length=self.max_length,
            max_prompt_length=self.max_prompt_length,
            max_completion_length=self.max_completion_length,
            truncation_mode=self.truncation_mode,
            too_long=self.too_long,
            max_pairs=self.max_pairs_per_prompt,
            bos_token_id=bos_token_id,
        )


def check_row_options(config: RowOptions) -> None:
    for name, least in LEAST.items():
        check_at_least(least, name, getattr(config, name))
    if config.max_length is not None and (config.max_prompt_length or 0) >= config.max_length:
        raise ValueError(
            f"--max_prompt_length {config.max_prompt_length} leaves no room for a completion in --max_length "
            f"{config.max_length}: raise --max_length or lower --max_prompt_length."
        )
    if config.template_date is not None and checked_date(config.template_date) is None:
        raise ValueError(
            f"--template_date must be a day as YYYY-MM-DD, such as 2026-11-30, got {config.template_date!r}."
        )
    if config.allow_private_image_urls and not config.allow_image_urls:
        raise ValueError("--allow_private_image_urls has no effect without --allow_image_urls: pass both, or neither.")


LEAST = {
    "max_length": 2,
    "max_prompt_length": 1,
    "max_completion_length": 1,
    "max_pairs_per_prompt": 1,
    "dataset_num_proc": 1,
}
"""The smallest value of options that are an integer or None."""
