"""The cache of `--precompute_ref_log_probs`, filled for the datasets of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from ..config import DPOConfig
from ..data.files.local_files import AnyDataset
from ..distributed.engines import shards_weights
from ..reference import CachedReference
from ..reference.precompute import Filled, Precompute
from ..scoring.layout import Layout


def fill_cache(
    reference: CachedReference,
    model: nn.Module,
    datasets: Mapping[str, AnyDataset],
    *,
    args: DPOConfig,
    layout: Layout,
    pad_token_id: int,
    accelerator: Accelerator,
    place: Callable[[], None],
) -> list[Filled]:
    """Look up every completion of the datasets, and compute the log-probs that are missing.

    Args:
        place: moves the models of the reference to the device.
    """
    precompute = Precompute(
        reference=reference,
        layout=layout,
        pad_token_id=pad_token_id,
        accelerator=accelerator,
        max_tokens=args.precompute_ref_max_tokens,
        disable_tqdm=args.disable_tqdm,
        in_step=shards_weights(args),
        place=place,
    )
    return [precompute(model, rows, name, rows_to_read(args, rows, name)) for name, rows in datasets.items()]


def rows_to_read(args: DPOConfig, dataset: AnyDataset, name: str) -> int | None:
    """How many rows of a training stream the run reads; None, all, for any other dataset."""
    if name != "train" or isinstance(dataset, Dataset):
        return None
    return args.max_steps * args.gradient_accumulation_steps * args.train_batch_size * args.world_size
