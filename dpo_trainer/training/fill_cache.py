"""The cache of `--precompute_ref_log_probs`, filled for the datasets of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from accelerate import Accelerator
from datasets import Dataset
from transformers.utils import logging

from ..config import DPOConfig
from ..data.files.local_files import AnyDataset
from ..distributed.engines import shards_weights
from ..reference import CachedReference, Reference
from ..reference.precompute import Filled, Precompute
from ..scoring.layout import Layout
from .datasets import DatasetPreparer, clear_streams

logger = logging.get_logger(__name__)


class CachingTrainer(Protocol):
    """What `fill_cache` needs of a trainer."""

    args: DPOConfig
    model: Any
    reference: Reference
    layout: Layout
    data: DatasetPreparer
    pad_token_id: int
    accelerator: Accelerator

    def place_reference(self) -> None: ...


def fill_cache(trainer: CachingTrainer, datasets: Mapping[str, AnyDataset | None]) -> list[Filled]:
    """Look up every completion of the datasets by name, and compute the log-probs that are missing. Without a cache: nothing."""
    if not isinstance(trainer.reference, CachedReference):
        return []
    args = trainer.args
    precompute = Precompute(
        reference=trainer.reference,
        layout=trainer.layout,
        pad_token_id=trainer.pad_token_id,
        accelerator=trainer.accelerator,
        max_tokens=args.precompute_ref_max_tokens,
        disable_tqdm=args.disable_tqdm,
        in_step=shards_weights(args),
        place=trainer.place_reference,
    )
    filled = [
        precompute(trainer.model, rows, name, rows_to_read(args, rows, name))
        for name, rows in datasets.items()
        if rows is not None
    ]
    clear_streams(trainer.data.reports)  # training reads them again
    for each in filled:
        logger.warning(str(each))
    return filled


def rows_to_read(args: DPOConfig, dataset: AnyDataset, name: str) -> int | None:
    """How many rows of a training stream the run reads; None, all, for any other dataset."""
    if name != "train" or isinstance(dataset, Dataset):
        return None
    return args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
