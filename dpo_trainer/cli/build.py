"""The trainer that the arguments of a script describe, and its run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import DPOConfig
from ..models.adapters import make_quantization_config
from ..models.load import load_processing_class
from ..storage.folders import naming
from ..trainer import DPOTrainer
from .arguments import ModelArguments, ScriptArguments, make_peft_config, merged_init_kwargs
from .data import load_data

if TYPE_CHECKING:
    from ..online import OnlineDPOConfig, OnlineDPOTrainer


def build_trainer(script: ScriptArguments, model: ModelArguments, config: DPOConfig) -> DPOTrainer:
    """With its data, tokenizer and adapter."""
    return DPOTrainer(**_parts(script, model, config))


def build_online_trainer(script: ScriptArguments, model: ModelArguments, config: OnlineDPOConfig) -> OnlineDPOTrainer:
    """The same for prompts; judge and rewards are among the options of `config`."""
    from ..online.trainer import OnlineDPOTrainer  # its judges load libraries that DPO does without

    return OnlineDPOTrainer(**_parts(script, model, config))


def _parts(script: ScriptArguments, model: ModelArguments, config: DPOConfig) -> dict[str, Any]:
    """What both trainers are made of."""
    assert model.model_name_or_path is not None
    with config.main_process_first(desc="loading the data"):
        train, evaluation = load_data(script, config.seed)
    config.model_init_kwargs = merged_init_kwargs(model, config)
    return {
        "model": model.model_name_or_path,
        "ref_model": model.ref_model_name_or_path,
        "args": config,
        "train_dataset": train,
        "eval_dataset": evaluation,
        "processing_class": load_processing_class(
            model.model_name_or_path, trust_remote_code=config.trust_remote_code, revision=model.model_revision
        ),
        "quantization_config": make_quantization_config(
            load_in_4bit=model.load_in_4bit,
            load_in_8bit=model.load_in_8bit,
            bnb_4bit_quant_type=model.bnb_4bit_quant_type,
            use_bnb_nested_quant=model.use_bnb_nested_quant,
            compute_dtype=torch.bfloat16 if config.bf16 else torch.float32,
        ),
        "peft_config": make_peft_config(model),
    }


def train_and_save(trainer: DPOTrainer) -> None:
    """Train, evaluate where there is something to evaluate on, save. A run that was told to stop ends with its exit code."""
    result = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    if trainer.stopped_by_signal:
        raise SystemExit(trainer.exit_code)
    trainer.save_model()  # before anything that may fail
    _report(trainer, "train", result.metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        _report(trainer, "eval", trainer.evaluate())
        trainer.create_model_card()  # with the evaluation
    if trainer.args.push_to_hub:
        trainer.push_to_hub()


def _report(trainer: DPOTrainer, split: str, metrics: dict[str, Any]) -> None:
    trainer.log_metrics(split, metrics)
    with naming(Path(trainer.args.output_dir) / f"{split}_results.json"):
        trainer.save_metrics(split, metrics)
