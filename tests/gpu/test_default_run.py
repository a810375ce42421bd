"""A run with every option at its default, on a GPU: float32 weights under bfloat16 autocast, gradient checkpointing, a copy as reference.

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
from dpo_trainer.scoring import attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (make test-gpu)")

LAYERS, MICRO_BATCHES = 2, 2
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "vocab_size": 512}
ROWS = [{"prompt_ids": [1, 2, 3 + i], "chosen_ids": [5, 6, 7 + i], "rejected_ids": [8, 9 + i]} for i in range(16)]


class Calls(TrainerCallback):
    """How often the kernel ran in each optimizer step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.calls, self.by_step, call = 0, [], attention.varlen_attention

        def counted(*args, **kwargs):
            self.calls += 1
            return call(*args, **kwargs)

        monkeypatch.setattr(attention, "varlen_attention", counted)

    def on_step_begin(self, *_, **__):
        self.calls = 0

    def on_step_end(self, *_, **__):
        self.by_step.append(self.calls)


@pytest.mark.parametrize("offloading", [False, True])
def test_the_kernel_runs_once_per_layer_and_forward(offloading, tmp_path: Path, monkeypatch):
    """In the policy, again when backward recomputes it, and in the reference. The first step checks the layout as well."""
    calls = Calls(monkeypatch)
    args = DPOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=MICRO_BATCHES,
        max_steps=3,
        logging_steps=1,
        activation_offloading=offloading,
        save_strategy="no",
        report_to=[],
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **SHAPE))
    trainer = DPOTrainer(
        model,
        args=args,
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tiny.tokenizer(),
        callbacks=[calls],
    )
    trainer.train()
    assert args.bf16
    assert trainer.layout.name == "flat", "after the check on the first batch"
    assert calls.by_step[1:] == [3 * LAYERS * MICRO_BATCHES] * 2
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[0] == pytest.approx(0.6931, abs=1e-4), "policy and reference are the same model"
