"""Models that are saved under other names than they have in memory, resumed: a mixture of experts as it was published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dpo_trainer.checkpointing import load_renamed

STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}


def trainer(folder: Path, **how: Any) -> Any:
    return tiny.trainer(folder, model=tiny.mixtral(), **{**STEPS, **how})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Any:
    made = trainer(tmp_path_factory.mktemp("whole"))
    made.train()
    return made


def test_names_differ_or_this_proves_nothing(trained):
    checkpoint = Path(trained.args.output_dir, "checkpoint-2", "model.safetensors")
    with safe_open(checkpoint, "pt") as file:
        assert trained.model.state_dict().keys() - set(file.keys())


def test_resumes_with_the_weights_of_the_checkpoint(trained, tmp_path):
    """To the bit; those of the experts had moved by then, so that others would show."""
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(Path(trained.args.output_dir, "checkpoint-2")))
    want = tiny.weights(trained.model)
    assert all(torch.equal(weight, want[name]) for name, weight in tiny.weights(resumed.model).items())
    began = tiny.weights(tiny.mixtral())
    assert all((want[name] - began[name]).abs().max() > 1e-6 for name in want if "experts" in name)


def test_the_best_model_comes_back_whole(tmp_path):
    """On rows that it does not train on, the loss rises: the first evaluation is the best one."""
    how = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": False}
    made = trainer(tmp_path, parts={"eval_dataset": tiny.dataset(4, seed=1)}, metric_for_best_model="loss", **how)
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    fresh = tiny.mixtral()
    load_renamed(fresh, made.state.best_model_checkpoint)
    want = tiny.weights(fresh)
    assert all(torch.equal(weight, want[name]) for name, weight in tiny.weights(made.model).items())


def test_a_checkpoint_that_lacks_weights_is_refused(trained, tmp_path):
    checkpoint = Path(trained.args.output_dir, "checkpoint-2")
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    weights = load_file(checkpoint / "model.safetensors")
    weights.pop(next(name for name in weights if "norm" in name))
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of the model"):
        load_renamed(tiny.mixtral(), tmp_path)
