"""Every optimizer that transformers knows works here, resuming included, or is refused with the way out."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

from dpo_trainer.options.optimizers import IN_BACKWARD, NOT_RESUMED, OF_TORCH

# To the package, and to what says in transformers that it is there. Those of bitsandbytes train in test_quantised.py.
ELSEWHERE = {
    "adamw_8bit": ("bitsandbytes", "is_bitsandbytes_available"),
    "paged_adamw_8bit": ("bitsandbytes", "is_bitsandbytes_available"),
    "ademamix": ("bitsandbytes", "is_bitsandbytes_available"),
    "rmsprop_bnb": ("bitsandbytes", "is_bitsandbytes_available"),
    "adamw_torch_4bit": ("torchao", "is_torchao_available"),
    "adamw_torch_8bit": ("torchao", "is_torchao_available"),
}


@pytest.mark.parametrize("optim", OF_TORCH)
def test_it_trains_and_resumes_to_the_bit(optim, tmp_path):
    """4 steps, and the last 2 of them from the checkpoint in the middle."""
    how: dict[str, Any] = {"optim": optim, "learning_rate": 1e-3, "save_strategy": "steps", "save_steps": 2}
    whole = tiny.trained(tmp_path / "whole", **how)
    again = tiny.trainer(tmp_path / "again", **how)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    halfway = tiny.trained(tmp_path / "half", **{**how, "max_steps": 2})
    assert tiny.moved(tiny.weights(halfway.model), tiny.weights(whole.model)) > 1e-5
    tiny.assert_same_weights(tiny.weights(again.model), tiny.weights(whole.model))


def test_every_name_is_known_here():
    """One that transformers adds is to be tried: does it train, and does a resumed run equal a whole one?"""
    of_devices = {"adamw_torch_xla", "adamw_torch_npu_fused", "adamw_anyprecision"}
    words = ("8bit", "32bit", "paged", "bnb", "lion", "ademamix", "4bit")
    packages = {name.value for name in OptimizerNames if any(word in name.value for word in words)}
    tried = {*OF_TORCH, *IN_BACKWARD, *NOT_RESUMED, *of_devices, *packages}
    assert {name.value for name in OptimizerNames} == tried
    assert set(ELSEWHERE) <= packages - {*IN_BACKWARD, *NOT_RESUMED}


def refused(folder: Any, **options: Any) -> str:
    with pytest.raises(ValueError) as error:
        tiny.config(folder, **options)
    return str(error.value)


@pytest.mark.parametrize("optim", ELSEWHERE)
def test_a_package_that_is_not_there(optim, tmp_path, monkeypatch):
    package, asked = ELSEWHERE[optim]
    monkeypatch.setattr(trainer_optimizer, asked, lambda: False)
    message = refused(tmp_path, optim=optim)
    assert f"--optim {optim} cannot be used here" in message
    assert package in message
    assert "pip install" in message
    assert "adafactor" in message


@pytest.mark.parametrize(
    ("optim", "package"),
    [("adamw_torch_xla", "torch_xla"), ("adamw_torch_npu_fused", "torch_npu"), ("adamw_anyprecision", "torchdistx")],
)
def test_packages_that_are_not_here(optim, package, tmp_path):
    message = refused(tmp_path, optim=optim)
    assert f"--optim {optim} cannot be used here" in message
    assert package in message


@pytest.mark.parametrize("optim", ["lomo", "adalomo", "galore_adamw_layerwise", "apollo_adamw_layerwise"])
def test_steps_within_backward(optim, tmp_path):
    message = refused(tmp_path, optim=optim)
    assert f"--optim {optim} makes its steps within backward" in message
    assert "--nonfinite" in message
    assert "--optim adamw_8bit" in message


@pytest.mark.parametrize(
    "optim", ["galore_adamw", "galore_adafactor", "apollo_adamw", "schedule_free_sgd", "stable_adamw", "grokadamw"]
)
def test_counts_that_no_checkpoint_brings_back(optim, tmp_path):
    message = refused(tmp_path, optim=optim)
    assert f"--optim {optim} keeps what it counts where a checkpoint does not bring it back" in message
    assert "--optim adamw_8bit" in message


@pytest.mark.parametrize(("name", "hint"), [("adamw_apex_fused", "adamw_torch_fused"), ("adamw", "adam")])
def test_names_that_nobody_knows(name, hint, tmp_path):
    message = refused(tmp_path, optim=name)
    assert f"--optim {name} is not an optimizer of transformers. Did you mean" in message
    assert hint in message.split("Did you mean")[1]


def test_arguments_of_optimizers(tmp_path):
    assert tiny.config(tmp_path, optim="sgd", optim_args="momentum=0.9").optim_args == "momentum=0.9"
    message = refused(tmp_path, optim="sgd", optim_args="momentum")
    assert "--optim sgd --optim_args momentum cannot be used here" in message
    message = refused(tmp_path, optim_target_modules="all-linear", optim="sgd")
    assert "--optim_target_modules all-linear would be ignored by --optim sgd" in message
    assert "--lora_target_modules" in message


@pytest.mark.parametrize(
    ("optim", "given", "ignored"),
    [
        ("adamw_torch", "weight_decay=0.1", "weight_decay"),
        ("sgd", "momentum=0.9,nestrov=true", "nestrov"),
        ("rmsprop", "alpha=0.9, centred=true", "centred"),
    ],
)
def test_arguments_that_would_be_ignored(optim, given, ignored, tmp_path):
    assert f"--optim_args: {ignored} would be ignored by --optim {optim}." in refused(
        tmp_path, optim=optim, optim_args=given
    )


@pytest.mark.parametrize(
    ("optim", "given"),
    [
        ("sgd", "momentum=0.0, nesterov=false"),  # defaults, and read all the same
        ("rmsprop", "alpha=0.9,centered=true"),
        ("adagrad", "lr_decay=0"),
    ],
)
def test_arguments_that_are_read(optim, given, tmp_path):
    assert tiny.config(tmp_path, optim=optim, optim_args=given).optim_args == given


@pytest.mark.parametrize("optim", ["adamw_torch", OptimizerNames.ADAMW_TORCH])
def test_a_name_as_text_or_as_transformers_has_it(optim, tmp_path):
    assert tiny.config(tmp_path, optim=optim).optim is OptimizerNames.ADAMW_TORCH


# --- an optimizer as an object ---


def sgd(model: torch.nn.Module, *parts: str) -> tuple[torch.optim.Optimizer, None]:
    named = [(n, p) for n, p in model.named_parameters() if not parts or any(part in n for part in parts)]
    return torch.optim.SGD([p for _, p in named], lr=0.1), None


def test_an_optimizer_made_before_the_adapter(tmp_path):
    model = tiny.llama()
    with pytest.raises(ValueError, match=r"lacks 28 of the 28 weights.*made before the adapter of peft_config"):
        tiny.trainer(tmp_path, model=model, parts={"optimizers": sgd(model), "peft_config": tiny.lora()})


def test_an_optimizer_that_misses_some(tmp_path):
    model = tiny.llama()
    with pytest.raises(ValueError, match=r"lacks 1 of the \d+ weights to be trained \(lm_head.weight\)"):
        tiny.trainer(tmp_path, model=model, parts={"optimizers": sgd(model, "model.")})
    model.lm_head.requires_grad_(False)  # the way out, as are frozen weights in it
    trainer = tiny.trained(tmp_path, model=model, parts={"optimizers": sgd(model)})
    assert tiny.losses(trainer)[-1] != tiny.losses(trainer)[0]


def test_an_optimizer_of_tied_weights(tmp_path):
    """`named_parameters` names a tied weight once."""
    model = tiny.llama(tie_word_embeddings=True)
    trainer = tiny.trained(tmp_path, model=model, parts={"optimizers": sgd(model)})
    assert tiny.losses(trainer)[-1] != tiny.losses(trainer)[0]
