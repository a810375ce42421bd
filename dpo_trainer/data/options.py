"""What a user may say about the preparation of data: the fields of `DPOConfig` of the same names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from .images.source import ImageAccess
from .tokens.truncate import Limits


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """See `DPOConfig` (docs/config.md) for what each one does."""

    max_length: int | None = None
    max_prompt_length: int | None = None
    max_completion_length: int | None = None
    truncation_mode: str = "keep_start"
    too_long: str = "truncate"
    useless_pairs: str = "drop"
    max_pairs_per_prompt: int | None = None
    deduplicate: bool = False
    allow_special_tokens_in_text: bool = False
    template_date: str | None = None
    dataset_num_proc: int | None = None
    disable_tqdm: bool = False
    image_root: str | None = None
    allow_image_urls: bool = False
    allow_private_image_urls: bool = False

    def __post_init__(self):
        if self.useless_pairs not in ("drop", "error"):
            raise ValueError(f"useless_pairs must be 'drop' or 'error', got {self.useless_pairs!r}.")
        if self.allow_private_image_urls and not self.allow_image_urls:
            raise ValueError(
                "--allow_private_image_urls has no effect without --allow_image_urls, which fetches images at all: pass both, or "
                "neither."
            )

    @classmethod
    def from_config(cls, args: Any) -> DataOptions:
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
