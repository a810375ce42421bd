"""The reference is read at both ends of a run, and said to be wrong if it is."""

from __future__ import annotations

import logging

import pytest
import tiny
import torch

from dpo_trainer import DPOTrainer


def errors(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.levelno == logging.ERROR]


def with_norms(folder, **how) -> DPOTrainer:
    """Its norms train, and as if by a fault nothing is kept of them."""
    made = tiny.trainer(folder, parts={"peft_config": tiny.lora()}, learning_rate=0.5, **how)
    unfreeze_norms(made)
    made.reference.unkept = lambda policy: []
    return made


def unfreeze_norms(trainer: DPOTrainer) -> None:
    for name, parameter in trainer.model.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("moving", [{}, {"sync_ref_model": True, "ref_model_sync_steps": 1}], ids=str)
def test_weights_that_were_unfrozen_too_late(moving, separate, tmp_path):
    separate = None if moving else separate
    parts = {"peft_config": tiny.lora()}
    trainer = tiny.trainer(tmp_path, parts=parts, use_separate_reference_adapter=separate, **moving)
    unfreeze_norms(trainer)
    with pytest.raises(ValueError, match=r"5 weights of the base model .*norm.*after the trainer was built"):
        trainer.train()


@pytest.mark.parametrize("layout", ["flat", "padded"])
def test_a_reference_that_moves_is_said_at_the_end(layout, tmp_path, caplog):
    trainer = with_norms(tmp_path, layout=layout)
    trainer.train()
    (message,) = errors(caplog)
    assert "moved while the policy trained" in message
    assert "train again with a ref_model" in message
    assert len(tiny.losses(trainer)) == 4  # and the weights are there


@pytest.mark.parametrize("layout", ["flat", "padded"])
@pytest.mark.parametrize(
    "how", [{}, {"parts": {"peft_config": tiny.lora()}}, {"parts": {"ref_model": tiny.llama(7)}}], ids=str
)
def test_one_that_stays_is_not(layout, how, tmp_path, caplog):
    trainer = tiny.trained(tmp_path, layout=layout, learning_rate=0.5, **how)
    assert trainer.reference_check.before is not None
    assert errors(caplog) == []


def test_in_half_precision(tmp_path, caplog):
    tiny.trained(tmp_path, bf16=True, parts={"peft_config": tiny.lora()}, learning_rate=0.5)
    assert errors(caplog) == []
    with_norms(tmp_path, bf16=True).train()
    assert len(errors(caplog)) == 1


def test_a_reference_that_is_not_the_start_stops_the_run(tmp_path, monkeypatch):
    """As if a copy were made from other weights than those that train."""
    trainer = tiny.trainer(tmp_path)
    assert trainer.reference.is_start
    (_, copied), *_ = trainer.reference.own
    with torch.no_grad():
        copied.lm_head.weight.mul_(1.01)
    before = tiny.weights(trainer.model)
    with pytest.raises(ValueError, match=r"is not the model that training starts from.*ref_model"):
        trainer.train()
    tiny.assert_same_weights(tiny.weights(trainer.model), before)


def test_a_resumed_run_is_not_at_the_start(tmp_path, caplog):
    how = {"parts": {"peft_config": tiny.lora()}, "learning_rate": 0.5}
    tiny.trained(tmp_path, save_strategy="steps", save_steps=2, **how)
    again = tiny.trainer(tmp_path, **how)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.reference_check.before is not None
    assert errors(caplog) == []


def test_a_second_run_of_one_trainer_is_held_to_the_first(tmp_path, caplog):
    trainer = with_norms(tmp_path, max_steps=1)
    trainer.train()
    trainer.args.max_steps = 2
    trainer.train()
    assert len(errors(caplog)) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"sync_ref_model": True, "ref_model_sync_steps": 1},
        {"precompute_ref_log_probs": True},
        {"loss_type": "simpo"},
        {"reference_free": True},
    ],
    ids=str,
)
def test_where_there_is_nothing_to_check_nothing_is_computed(options, tmp_path, monkeypatch, caplog):
    trainer = tiny.trainer(tmp_path, **options)
    trainer.train()
    assert trainer.reference_check.before is None
    assert errors(caplog) == []


def test_it_draws_no_random_numbers(tmp_path, monkeypatch):
    how = {"parts": {"peft_config": tiny.lora(lora_dropout=0.2)}}
    checked = tiny.trained(tmp_path, **how)
    monkeypatch.setattr("dpo_trainer.reference.check.ReferenceCheck.begin", lambda *_, **__: None)
    unchecked = tiny.trained(tmp_path, **how)
    tiny.assert_same_weights(tiny.weights(checked.model), tiny.weights(unchecked.model))
