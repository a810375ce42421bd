"""Prompt-only data: rows -> token ids of the prompt, with all other columns kept for rewards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers.utils import logging

from ..data import DataReport
from ..data.caching import map_cached
from ..data.errors import bad
from ..data.files.dataset_inputs import Rows, datasets_of
from ..data.files.local_files import AnyDataset
from ..data.images.source import IMAGES, REFUSED, images_of
from ..data.images.text import is_processor
from ..data.rows.messages import image_count, read_messages
from ..data.tokens.encode import eos_token_id, tokenizer_fingerprint
from ..data.tokens.tokenize import tokenize_prompts
from ..scoring.layout import Layout
from ..training.datasets import refuse_different_tables, refuse_split_streams
from ..types import Text
from .config import OnlineDPOConfig

logger = logging.get_logger(__name__)

OURS = ("example_id", "prompt_ids", "length")
NO_IMAGES = "Online DPO reads text alone: leave the row out, or train on pairs with DPOTrainer"
VERSION = 1
"""Of the prepared columns: part of the cache key of `datasets`."""


@dataclass(frozen=True)
class PromptMapper:
    """Batches of rows -> the same with `example_id`, `prompt_ids` and `length`.

    limit: most tokens of a prompt, so that a completion of --max_new_tokens fits behind it; None: no limit.
    cut: cut the beginning of a longer one. Otherwise it stays as it is, and is dropped later.
    """

    tokenizer: Any
    name: str
    limit: int | None
    cut: bool
    allow_special_tokens_in_text: bool
    vocabulary_size: int | None

    def __call__(self, batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        if "prompt" not in batch:
            raise ValueError(
                f"The {self.name} data have no column 'prompt' (they have {', '.join(batch)}): online DPO samples answers to "
                "prompts. Rename the column, or use --columns prompt=NAME."
            )
        where = [f"Row {index} of the {self.name} data" for index in indices]
        prompts = [read_prompt(value, at) for value, at in zip(batch["prompt"], where, strict=True)]
        for number, at in enumerate(where):
            if images_of({name: batch[name][number] for name in (*IMAGES, *REFUSED) if name in batch}, at):
                raise bad(at, "images", "holds images", NO_IMAGES)
        allow = self.allow_special_tokens_in_text
        ids = tokenize_prompts(prompts, self.tokenizer, where, allow_special_tokens_in_text=allow)
        lengths = list(map(len, ids))
        for row, at in zip(ids, where, strict=True):
            if self.vocabulary_size is not None and max(row) >= self.vocabulary_size:
                problem = f"holds the token id {max(row)}, and the model knows {self.vocabulary_size}"
                raise bad(at, "prompt", problem, "Use the tokenizer of the model")
        if self.cut and self.limit is not None:
            ids = [row[-self.limit :] for row in ids]
        return {"prompt": prompts, "example_id": indices, "prompt_ids": ids, "length": lengths}

    def fingerprint(self, dataset: Dataset) -> str | None:
        """The cache key of the mapped dataset; None where the tokenizer has none."""
        tokenizer = tokenizer_fingerprint(self.tokenizer)
        if tokenizer is None:
            return None
        options = [self.limit, self.cut, self.allow_special_tokens_in_text, self.vocabulary_size]
        parts = [VERSION, dataset._fingerprint, *options, tokenizer]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=8).hexdigest()


def read_prompt(value: Any, where: str) -> Text:
    """A string that says something, or messages that wait for an answer.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, str):
        if not value.strip():
            raise bad(where, "prompt", "is empty", "Give a prompt, or leave the row out")
        return value
    if not isinstance(value, list | tuple | Mapping):
        raise bad(where, "prompt", f"is {value!r:.40}", "Give a string or a list of messages")
    messages = read_messages(value, where, "prompt")
    if any(map(image_count, messages)):
        raise bad(where, "prompt", "has an image", NO_IMAGES)
    if messages[-1]["role"] == "assistant":
        raise bad(where, "prompt", "ends with an answer", "End it with a turn that asks for one")
    return messages


class PromptData:
    """Prepares the prompts of one run: a `DatasetPreparer`.

    window: most tokens of prompt + completion that model and --max_length allow; None: no limit.
    """

    def __init__(self, args: OnlineDPOConfig, tokenizer: Any, window: int | None, *, vocabulary_size: int | None):
        if is_processor(tokenizer):
            raise ValueError(
                f"processing_class is a {type(tokenizer).__name__}, and online DPO reads text alone: pass its tokenizer "
                "(processor.tokenizer), or train on pairs with DPOTrainer."
            )
        self.args, self.tokenizer, self.vocabulary_size = args, tokenizer, vocabulary_size
        self.longest = 0  # tokens of a prompt
        limits = [args.max_prompt_length, None if window is None else window - args.max_new_tokens]
        self.limit = min((limit for limit in limits if limit is not None), default=None)
        if self.limit is not None and self.limit < 1:
            raise ValueError(
                f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt in the model's window of {window} tokens: "
                "lower it."
            )
        self.reports: dict[str, DataReport] = {}  # all is said while preparing

    def prepare(self, dataset: Rows | Sequence[Rows], name: str) -> AnyDataset:
        with self.args.main_process_first(desc=f"loading the {name} data"):
            parts = datasets_of(dataset, name)
        if len(parts) > 1 or (isinstance(dataset, list | tuple) and parts[0] is dataset[0]):
            raise ValueError(
                f"The {name} data are a list of datasets: give one, such as datasets.concatenate_datasets(...)."
            )
        dataset = parts[0]
        eos_token_id(self.tokenizer)
        if self.args.world_size > 1:
            refuse_split_streams([dataset], name)
        allow = self.args.allow_special_tokens_in_text
        cut = self.args.too_long == "truncate"
        mapper = PromptMapper(self.tokenizer, name, self.limit, cut, allow, self.vocabulary_size)
        if isinstance(dataset, IterableDataset):
            if name == "train" and len(self.args.betas) > 1:
                raise ValueError(
                    f"--beta {self.args.betas} has one for each epoch, and a stream is a single one: give one beta, or load the data "
                    "without --streaming."
                )
            self.longest = max(self.longest, self.limit or 0)
            return self._limited_stream(dataset.map(mapper, batched=True, with_indices=True), name)
        with self.args.main_process_first(desc=f"preparing the {name} prompts"):
            prepared = self._limited_table(self._mapped(dataset, mapper), name)
        if self.args.world_size > 1:
            refuse_different_tables(prepared, name)
        return prepared

    def check_budget(self, layout: Layout, datasets: Mapping[str, AnyDataset | None]) -> None:
        """Of the longest prompt with the longest completions that sampling can make, before anything is sampled."""
        args = self.args
        budget, new = args.max_tokens_per_micro_batch, args.max_new_tokens
        compared = 2 if args.pair_selection == "best_worst" else args.num_generations
        most = self.longest + compared * new if layout.name == "flat" else compared * (self.longest + new)
        if budget is not None and most > budget:
            raise ValueError(
                f"The longest prompt with its {compared} completions may have {most} tokens, more than "
                f"--max_tokens_per_micro_batch {budget}: raise that, or lower --max_new_tokens or --max_length."
            )

    def _mapped(self, dataset: Dataset, mapper: PromptMapper) -> Dataset:
        if not len(dataset):
            raise ValueError(f"The {mapper.name} data have no rows: give at least one prompt.")
        return map_cached(
            dataset,
            mapper,
            mapper.tokenizer,
            mapper.fingerprint(dataset),
            self.args.dataset_num_proc,
            batched=True,
            with_indices=True,
            desc=f"tokenizing the {mapper.name} prompts",
        )

    def _limited_table(self, rows: Dataset, name: str) -> Dataset:
        lengths = rows["length"]
        over = [place for place, length in enumerate(lengths) if self.limit is not None and length > self.limit]
        if over:
            self._say(f"{len(over)} of {len(rows)}", name, f"row {over[0]} has {lengths[over[0]]}")
        if self.args.too_long == "drop" and over:
            rows = rows.select(sorted(set(range(len(rows))) - set(over)))
        self.longest = max([self.longest, *map(len, rows["prompt_ids"])])
        if not len(rows):
            raise ValueError(f"No prompt of the {name} data is within {self.limit} tokens: raise --max_length.")
        return rows

    def _limited_stream(self, rows: IterableDataset, name: str) -> IterableDataset:
        limit, too_long = self.limit, self.args.too_long
        if limit is None or too_long == "truncate":
            return rows

        def fits(row: dict[str, Any]) -> bool:
            if row["length"] > limit and too_long == "error":
                raise ValueError(_over(limit, name, f"row {row['example_id']} has {row['length']}"))
            return row["length"] <= limit

        return rows.filter(fits)

    def _say(self, how_many: str, name: str, example: str) -> None:
        assert self.limit is not None
        if self.args.too_long == "error":
            raise ValueError(_over(self.limit, name, example))
        done = "their beginning is cut" if self.args.too_long == "truncate" else "dropped"
        logger.warning(
            f"{how_many} prompts of the {name} data are longer than {self.limit} tokens ({example}): {done}."
        )


def _over(limit: int, name: str, example: str) -> str:
    return (
        f"Prompts of the {name} data are longer than {limit} tokens, what --max_length (or the model's window) leaves beside "
        f"--max_new_tokens: {example}. Raise --max_length, or let them be cut or dropped (--too_long)."
    )


@dataclass(frozen=True)
class PromptBatch:
    """Rows of prompts. Not a mapping: code that moves tensors between devices ignores it."""

    rows: list[dict[str, Any]]


def collate_prompts(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows -> {"example_ids": [P], "prompts": PromptBatch}. The tensor tells accelerate the batch size."""
    return {"example_ids": torch.tensor([row["example_id"] for row in rows]), "prompts": PromptBatch(rows)}
