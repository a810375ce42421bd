"""The runs that one process and two must agree on. Imported by the worker (under torchrun) and by the test (alone)."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
import torch
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from dpo_trainer import DPOTrainer, register_loss
from dpo_trainer.types import PairLogps

GLOBAL_BATCH = 8  # pairs of one micro-batch over all ranks; the test's only process takes them all

REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
LORA = {"learning_rate": 1.0}
MOMENTUM = {"optim_args": "momentum=0.5"}  # a checkpoint has something to restore

BUDGET = {
    "max_tokens_per_micro_batch": 90
}  # three or four rows of a rank have 33 tokens each; one process has no budget

# Options of the config, and under "rows" how many pairs there are: 24 fill every batch; 22 and 19 leave a short last one.
# Under "pairs": another size of a micro-batch over all ranks.
CELLS: dict[str, dict[str, Any]] = {
    "full flat": {"rows": 24, "max_steps": 3, "layout": "flat"},
    "full padded": {"rows": 24, "max_steps": 2, "layout": "padded"},
    "full flat reentrant": {"rows": 24, "max_steps": 2, "layout": "flat", **REENTRANT},
    "full flat accumulated": {"rows": 32, "max_steps": 2, "layout": "flat", "gradient_accumulation_steps": 2},
    "lora flat accumulated": {"rows": 32, "max_steps": 2, "layout": "flat", "gradient_accumulation_steps": 2, **LORA},
    "lora flat reentrant": {"rows": 24, "max_steps": 2, "layout": "flat", **REENTRANT, **LORA},
    "lora continued": {"rows": 24, "max_steps": 2, **LORA},
    "short last batch": {"rows": 22, "max_steps": 6},  # over two epochs: 8 + 8 + 6
    "last batch of one rank": {"rows": 19, "max_steps": 3},  # 8 + 8 + 3: the other rank has nothing but repeats
    "short last batch accumulated": {"rows": 27, "max_steps": 2, "gradient_accumulation_steps": 2},  # 16, then 8 + 3
    "lora padded": {"rows": 24, "max_steps": 2, "layout": "padded", **LORA},
    "named full": {"rows": 24, "max_steps": 2},
    "evaluated first": {"rows": 24, "max_steps": 2},
    "bf16": {"rows": 24, "max_steps": 2, "bf16": True, "loss_type": ["sigmoid", "nan_if_rounded"]},
    "weighted bf16": {"rows": 24, "max_steps": 2, "bf16": True, "loss_type": "odpo"},
    "budget": {"rows": 22, "max_steps": 4, **BUDGET},
    "budget accumulated": {"rows": 22, "max_steps": 2, "gradient_accumulation_steps": 2, **BUDGET},
    "budget lora": {"rows": 22, "max_steps": 3, **BUDGET, **LORA},
    "budget padded": {"rows": 22, "max_steps": 3, "max_tokens_per_micro_batch": 160, "layout": "padded"},
    "aot": {"rows": 24, "max_steps": 3, "loss_type": "aot"},
    "aot halves": {"rows": 24, "max_steps": 3, "loss_type": "aot", "gradient_accumulation_steps": 2, "pairs": 4},
    "aot_unpaired short": {"rows": 22, "max_steps": 3, "loss_type": "aot_unpaired"},
    "bco_pair": {"rows": 22, "max_steps": 4, "loss_type": "bco_pair"},
    "stream": {"rows": 24, "max_steps": 3},
    "cached full": {"rows": 22, "max_steps": 3, "precompute_ref_log_probs": True},
    "cached lora": {"rows": 24, "max_steps": 3, "precompute_ref_log_probs": True, **LORA},
    "cached stream": {"rows": 24, "max_steps": 2, "precompute_ref_log_probs": True},
    "moving full": {"rows": 24, "max_steps": 3, "sync_ref_model": True, "ref_model_sync_steps": 1},
    "cached padded": {"rows": 24, "max_steps": 2, "layout": "padded", "precompute_ref_log_probs": True},
    "moving padded": {
        "rows": 24,
        "max_steps": 2,
        "layout": "padded",
        "sync_ref_model": True,
        "ref_model_sync_steps": 1,
    },
    "moving lora": {"rows": 24, "max_steps": 3, "sync_ref_model": True, "ref_model_sync_steps": 2, **LORA},
    "balanced": {"rows": 22, "max_steps": 5, "train_sampling_strategy": "batch_rebalance"},
    "skipped step": {"rows": 24, "max_steps": 3, "nonfinite": "skip", "loss_type": "nan_for_long_chosen"},
    "resumed moving": {"rows": 22, "max_steps": 4, "sync_ref_model": True, "ref_model_sync_steps": 2, **MOMENTUM},
    "resumed lora": {"rows": 24, "max_steps": 4, **LORA, **MOMENTUM},
    "resumed": {"rows": 22, "max_steps": 4, "logging_steps": 2, **MOMENTUM},  # from step 3, between two lines
    "resumed in the epoch": {"rows": 22, "max_steps": 4, **MOMENTUM},  # from step 2 of 3, before the short last batch
}
EVAL_ROWS = 7


@register_loss("nan_for_long_chosen", needs_reference=False)
def nan_for_long_chosen(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """NaN for pairs whose chosen completion has more than 30 tokens; of `bad_rows` that is one."""
    return -beta * policy.margin() + torch.where(policy.chosen_lengths > 30, torch.nan, 0.0)


@register_loss("nan_if_rounded", needs_reference=False)
def nan_if_rounded(policy: PairLogps, reference: PairLogps) -> Tensor:
    """0; NaN where the log-probs of tokens came through bfloat16, as an engine may round what a model returns."""
    assert policy.tokens is not None
    logps = policy.tokens.logps.detach()
    return torch.where((logps == logps.bfloat16().float()).all(), torch.nan, 0.0) * torch.ones_like(policy.chosen)


def bad_rows(n: int, at: int) -> Dataset:
    rows = tiny.rows(n)
    rows[at]["chosen"] = " " + "a" * 40
    return Dataset.from_list(rows)


def with_numbers(rows: Dataset) -> Dataset:
    """With weights and margins that bfloat16 would round."""
    places = range(len(rows))
    return rows.add_column("weight", [1.001 + i / 7 for i in places]).add_column(
        "margin", [1.003 + i / 3 for i in places]
    )


def model(name: str, folder: Path) -> PreTrainedModel | str:
    if name.startswith(("cached", "named")):  # by name: rows that come after training ask for the reference again
        start = folder / "start"
        tiny.llama().save_pretrained(start)  # writes on the main process alone
        if dist.is_initialized():
            dist.barrier()
        return str(start)
    if name != "lora continued":
        return tiny.llama()
    adapted = get_peft_model(tiny.llama(), tiny.lora(), adapter_name="style")
    tiny.fill_adapters(adapted)
    return adapted


def saved_at(name: str) -> int:
    return 2 if name == "resumed in the epoch" else 3


def stream(rows: Dataset) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


def make(
    name: str, folder: Path, ranks: int, engine: dict[str, Any], *, saving: bool = False, **parts: Any
) -> DPOTrainer:
    options = dict(CELLS[name]) | ({"save_strategy": "steps", "save_steps": saved_at(name)} if saving else {})
    n, pairs = options.pop("rows"), options.pop("pairs", GLOBAL_BATCH)
    if ranks == 1:
        options.pop("max_tokens_per_micro_batch", None)
    rows = bad_rows(n, at=13) if name == "skipped step" else tiny.dataset(n)
    if name.startswith("weighted"):
        rows = with_numbers(rows)
    if name.startswith("aot"):  # margins of another model, in another order: else sorting would hardly show
        parts["ref_model"] = tiny.llama(seed=5)
    if options.get("precompute_ref_log_probs"):
        options["ref_cache_dir"] = str(folder / f"cache of {name}")
    if "lora" in name and name != "lora continued":
        parts["peft_config"] = tiny.lora()
    return tiny.trainer(
        folder / name,
        model=model(name, folder),
        train=stream(rows) if "stream" in name else rows,
        parts=parts,
        per_device_train_batch_size=pairs // ranks,
        per_device_eval_batch_size=4 // ranks,
        **{
            "train_sampling_strategy": "sequential" if "stream" in name or name == "skipped step" else "random",
            **options,
            **engine,
        },
    )


def run(
    name: str,
    folder: Path,
    ranks: int,
    *,
    engine: dict[str, Any] | None = None,
    look: Callable[[DPOTrainer], None] = lambda trainer: None,
    write_checkpoint: bool = True,
) -> dict[str, Any]:
    """Train, save, then evaluate on a few rows, as a table and as a stream: numbers as JSON takes them.

    `engine`: what `engines.start` returned. `write_checkpoint` False: a cell that resumes takes the one that is there.
    """
    seen: list[Any] = []
    start = partial(make, name, folder, ranks, engine or {})
    resumes = name.startswith("resumed")
    if resumes and write_checkpoint:
        start(saving=True).train()
    trainer = start(compute_metrics=lambda prediction: seen.append(prediction) or {})
    if name == "evaluated first":
        trainer.evaluate(tiny.dataset(EVAL_ROWS, seed=4))
    checkpoint = folder / name / f"checkpoint-{saved_at(name)}"
    trainer.train(resume_from_checkpoint=str(checkpoint) if resumes else None)
    look(trainer)
    trainer.save_model(str(folder / name / "trained"))
    rows = with_numbers(tiny.dataset(EVAL_ROWS, seed=3))
    metrics = trainer.evaluate(rows)
    streamed = trainer.evaluate(stream(rows)) if "stream" in name else {}
    return {
        "lines": [line for line in trainer.state.log_history if "learning_rate" in line],
        "eval": metrics,
        "eval of the stream": streamed,
        "state": trainer.loss_objective.state_dict(),
        "identity": trainer.run_identity(),
        "example_ids": seen[-1].label_ids.tolist(),
        "logps": seen[-1].predictions["logps/chosen"].tolist(),
    }


def trained_weights(name: str, folder: Path) -> dict[str, Tensor]:
    """As they were saved: of the model, or of the adapter."""
    files = (folder / name / "trained").rglob("*model.safetensors")
    return load_file(min(files, key=lambda file: len(file.parts)))  # deeper lies an adapter that is a reference
