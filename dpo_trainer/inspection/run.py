"""An inspection from beginning to end: rows read as training reads them, counted, and written down."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from ..cli import ModelArguments, ScriptArguments
from ..config import DPOConfig
from ..data.images.text import ImageText
from ..data.options import DataOptions
from ..data.processor import text_tokenizer
from ..data.tokens.dates import dated
from ..data.tokens.encode import eos_token_id
from ..models.load import load_processing_class
from ..printable import printable
from ..storage.folders import write_text
from ..training.template_date import settle_date
from .arguments import InspectionArguments
from .collect import Collection
from .estimate import optimizer_steps
from .facts import columns_of, sizes_of
from .measure import batch_tokens, difference_histogram, histogram, length_bias, lengths
from .page import write_page
from .parts import Part, in_order, load_parts, read_parts, size_of
from .plan import layout_of, memory_of, model_shape
from .result import Inspection
from .rows import RowReader
from .show import show_row
from .similar import repeats, similar
from .terminal import print_inspection


def run(arguments: InspectionArguments, script: ScriptArguments, model: ModelArguments, config: DPOConfig) -> int:
    """Print and write what was found. 1 if a row could not be read, else 0."""
    assert model.model_name_or_path is not None
    parts = load_parts(script, config.seed)
    tokenizer = load_processing_class(
        model.model_name_or_path, trust_remote_code=config.trust_remote_code, revision=model.model_revision
    )
    found = inspect(parts, tokenizer, config, model, arguments)
    folder = write(found, Path(arguments.output_dir))
    print_inspection(found)
    written = f"Written: {folder / 'index.html'} and {folder / 'inspection.json'} ({found.seconds:.1f} s)."
    print(printable(written))
    if found.rows.bad:
        print(f"{found.rows.bad} of {found.rows.read} rows cannot be read: training would stop at the first of them.")
    return int(found.rows.bad > 0)


def write(found: Inspection, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    numbers = json.dumps(found.to_json(), indent=1, allow_nan=False)
    write_text(folder / "inspection.json", numbers + "\n")
    write_page(found, folder / "index.html")
    return folder


def inspect(
    data: Dataset | IterableDataset | Sequence[Part],
    tokenizer: Any,
    config: DPOConfig,
    model: ModelArguments | str,
    arguments: InspectionArguments | None = None,
) -> Inspection:
    """Everything that can be known before training, printing and writing nothing.

    Args:
        data: a dataset of rows in any form, or the parts of a mixture (`parts.in_order`).
        tokenizer: the one to train with, or the processor.
        config: the options of the run: limits, batch size, losses, precision.
        model: where its config.json lies, or all arguments of the model (adapter, quantisation).
        arguments: `show` and `max_rows`.
    """
    started = time.perf_counter()
    parts = in_order(["train"], [data]) if isinstance(data, Dataset | IterableDataset) else data
    model = ModelArguments(model_name_or_path=model) if isinstance(model, str) else model
    arguments = arguments or InspectionArguments()
    options = replace(DataOptions.from_config(config), template_date=settle_date(config, tokenizer))
    images = ImageText.of(tokenizer, options.image_access)
    tokenizer = dated(text_tokenizer(tokenizer), options.template_date)
    reader = RowReader(
        tokenizer=tokenizer,
        images=images,
        limits=options.limits(getattr(tokenizer, "bos_token_id", None)),
        allow_special_tokens_in_text=options.allow_special_tokens_in_text,
    )
    seen = Collection(tokenizer, images, show=arguments.show, seed=config.seed, deduplicate=options.deduplicate)
    eos_token_id(tokenizer)  # refuses a tokenizer that has none
    for row in reader.read(read_parts(parts, arguments.max_rows, config.seed)):
        seen.see(row)
    columns, kept = columns_of(seen.facts), seen.trained_on
    batches = batch_tokens(
        sizes_of(kept),
        config.per_device_train_batch_size,
        seed=config.seed,
        pad_to_multiple_of=config.pad_to_multiple_of,
    )
    rows = seen.row_counts(of=size_of(parts))
    shape, no_memory = model_shape(model, config)
    layout = layout_of(config, shape)
    return Inspection(
        dataset=" + ".join(part.name for part in parts),
        parts=[(part.name, part.first) for part in parts] if len(parts) > 1 else [],
        model=str(model.model_name_or_path),
        options=_options(config, options),
        rows=rows,
        lengths={side: lengths(values) for side, values in columns._asdict().items()},
        histogram=histogram(columns._asdict()),
        difference=difference_histogram(columns.chosen - columns.rejected),
        length_bias=length_bias(columns.chosen, columns.rejected),
        similar=similar([(f.keys.row, value) for f in seen.facts for value in f.similarity]),
        repeats=repeats([f.keys for f in seen.facts]),
        control_text=seen.control_text.found,
        endings=seen.endings.found,
        template=seen.template.found,
        unknown_ids=seen.unknown_ids.found,
        batches=batches,
        layout=layout,
        steps=optimizer_steps(
            round(rows.kept * (rows.of or rows.read) / max(rows.read, 1)),
            batch_size=config.per_device_train_batch_size,
            accumulation=config.gradient_accumulation_steps,
            epochs=config.num_train_epochs,
            max_steps=config.max_steps,
            drop_last=config.dataloader_drop_last,
        ),
        memory=memory_of(shape, batches, layout, model, config) if shape and batches else None,
        no_memory=no_memory or (None if batches else "no row is left to train on"),
        shown=[show_row(row, tokenizer) for row in seen.sample.chosen()],
        seconds=time.perf_counter() - started,
    )


def _options(config: DPOConfig, data: DataOptions) -> dict[str, Any]:
    """What the numbers depend on."""
    without_effect = ("dataset_num_proc", "disable_tqdm")
    of_data = {option.name: getattr(data, option.name) for option in fields(data) if option.name not in without_effect}
    of_run = {
        name: getattr(config, name)
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_steps",
            "gradient_checkpointing",
            "pad_to_multiple_of",
            "bf16",
            "fp16",
            "seed",
        )
    }
    return of_data | of_run
