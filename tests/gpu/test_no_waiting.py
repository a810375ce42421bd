"""A training step on a GPU never waits for the device: the host runs ahead, and looks at numbers once per optimizer step.

    make test-gpu

Written without a GPU at hand, and not run yet.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from dpo_trainer import DPOConfig, DPOTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (make test-gpu)")

SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
ROWS = [{"prompt_ids": [1, 2, 3 + i], "chosen_ids": [5, 6, 7 + i], "rejected_ids": [8, 9 + i]} for i in range(16)]


class Steps(TrainerCallback):
    """`training_step` (forward, backward, all of a micro-batch) under torch's watch, after the first has settled the layout."""

    def __init__(self, trainer: DPOTrainer):
        self.watched, step = 0, trainer.training_step

        def watched(*args, **kwargs):
            if trainer.state.global_step == 0:
                return step(*args, **kwargs)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return step(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                self.watched += 1

        trainer.training_step = watched  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": False},
        {"gradient_checkpointing": True},
        {"activation_offloading": True},
        {"loss_type": "aot"},
        {"loss_type": "bco_pair"},
        {"max_tokens_per_micro_batch": 10},
    ],
    ids=str,
)
def test_no_micro_batch_waits_for_the_device(tmp_path: Path, options: dict):
    args = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        bf16=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        **options,
    )
    model = Qwen2ForCausalLM(Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **SHAPE))
    trainer = DPOTrainer(model, args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tiny.tokenizer())
    assert trainer.layout.name == "flat"
    steps = Steps(trainer)
    trainer.train()
    assert steps.watched == 6, "two micro-batches of the second, third and fourth step"


def test_the_watch_sees_a_wait():
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device="cuda").item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
