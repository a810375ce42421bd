"""Step by step, `DPOTrainer` computes what TRL 1.16 computes: same rows, weights, shuffling, optimizer, arguments.

TRL's side was recorded by `benchmarks/record_trl_losses.py` (TRL is no dependency); what both sides share is in
`fixtures/trl_setup.py`. Every case trains 12 or 16 optimizer steps and the losses move by tens of per cent, so that a
wrong gradient shows in the next step's loss, and a wrong order of the rows in the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from dpo_trainer import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))
import trl_setup as setup

RECORDED = json.loads(setup.FIXTURE.read_text())

# What has another name or another default here than in TRL.
OURS = {"sigmoid_sft": {"rpo_normalization": "token"}}

# Metrics that TRL averages over micro-batches and we over tokens: equal only when a log line is one micro-batch.
PER_TOKEN = {"entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected"}

# LD-DPO shortens log-probs inside the loss; TRL logs the shortened ones and their rewards, we log those of the whole text.
LOGGED_OTHERWISE = {"ld_alpha": ("logps/", "rewards/")}

# float32 on one CPU. The loss: the 1e-5; TRL's own float32 is within 5e-6 of its float64 in every case. Log-probs
# are sums of up to 60 nats, and a tenth or half of their difference is a reward. An accuracy is a count.
ATOL = {"loss": 1e-5, "grad_norm": 1e-4, "logps/chosen": 1e-4, "logps/rejected": 1e-4}
ATOL_ELSE = 5e-5


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in the order in which they were recorded."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(case: str, folder: Path, **more) -> DPOTrainer:
    """Our trainer on one case; asserts that it starts from the recorded weights."""
    arguments = {**setup.case_arguments(case), **OURS.get(case, {}), **more}
    trainer = DPOTrainer(
        model=setup.model(),
        args=DPOConfig(output_dir=str(folder), **arguments),
        train_dataset=Dataset.from_list(setup.rows()),
        processing_class=setup.tokenizer(),
        peft_config=LoraConfig(**setup.LORA) if setup.uses_lora(case) else None,
    )
    setup.fill_lora(trainer.model)
    assert setup.weights_checksum(trainer.model) == RECORDED["cases"][case]["start_sha256"]
    trainer.train()
    return trainer


def assert_equals_recording(trainer: DPOTrainer, case: str) -> None:
    want = RECORDED["cases"][case]["steps"]
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == len(want["loss"]) >= 12
    skipped = tuple(PER_TOKEN) if trainer.args.gradient_accumulation_steps > 1 else LOGGED_OTHERWISE.get(case, ())
    for key in (key for key in want if not key.startswith(skipped)):
        first = 1 if key == "rewards/accuracies" else 0  # all margins of the first step are 0, give or take a rounding
        got = [line[key] for line in lines]
        torch.testing.assert_close(
            torch.tensor(got[first:], dtype=torch.float64),
            torch.tensor(want[key][first:], dtype=torch.float64),
            rtol=1e-4 if key == "grad_norm" else 0,
            atol=ATOL.get(key, ATOL_ELSE),
            msg=lambda text, key=key: f"{case}, {key}, one number per step: {text}",
        )


def test_fixture_belongs_to_this_setup():
    """Rows, tokenizer and weights are still those that the numbers were recorded with."""
    assert RECORDED["rows_sha256"] == setup.rows_checksum()
    assert RECORDED["model_sha256"] == setup.weights_checksum(setup.model())
    assert RECORDED["versions"]["trl"] == "1.16.0"
    assert {name: record["arguments"] for name, record in RECORDED["cases"].items()} == setup.CASES


def test_recording_could_catch_a_difference():
    """Losses move, every loss is told from `sigmoid` by far more than the tolerance, and the truncated case is cut."""
    losses = {name: torch.tensor(record["steps"]["loss"]) for name, record in RECORDED["cases"].items()}
    for name, steps in losses.items():
        assert steps.max() - steps.min() > 0.25, name
        assert len(steps.unique()) >= len(steps) - 1, name
    for name in set(losses) - {"sigmoid", "sigmoid_checkpointing", "sigmoid_accumulate_2"}:
        assert (losses[name] - losses["sigmoid"]).abs().max() > 10 * ATOL["loss"], name
    whole, cut = (RECORDED["cases"][name]["steps"]["logps/chosen"][0] for name in ("sigmoid", "truncation"))
    assert cut > whole + 1, "--max_length of the truncation case cut nothing"


@pytest.mark.parametrize("case", setup.CASES)
def test_every_step_equals_trl(case, tmp_path):
    assert_equals_recording(train(case, tmp_path), case)


def test_padded_layout_equals_trl(tmp_path):
    """The other layout, with the same recording: one row per completion, as TRL itself lays a batch out."""
    assert_equals_recording(train("sigmoid", tmp_path, layout="padded"), "sigmoid")


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_equals_trl_without_it(use_reentrant, tmp_path):
    trainer = train(
        "sigmoid",
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
    )
    assert trainer.model.is_gradient_checkpointing  # else this repeats the plain case
    assert_equals_recording(trainer, "sigmoid")
