"""The trainer that the arguments of a script describe."""

from __future__ import annotations

import torch

from ..config import DPOConfig
from ..loading import load_tokenizer, make_quantization_config
from ..trainer import DPOTrainer
from .arguments import ModelArguments, ScriptArguments, make_peft_config, merged_init_kwargs
from .data import load_data


def build_trainer(script: ScriptArguments, model: ModelArguments, config: DPOConfig) -> DPOTrainer:
    """With its data, tokenizer and adapter."""
    assert model.model_name_or_path is not None
    with config.main_process_first(desc="loading the data"):
        train, evaluation = load_data(script, config.seed)
    config.model_init_kwargs = merged_init_kwargs(model, config)
    return DPOTrainer(
        model=model.model_name_or_path,
        ref_model=model.ref_model_name_or_path,
        args=config,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=load_tokenizer(
            model.model_name_or_path, trust_remote_code=config.trust_remote_code, revision=model.model_revision
        ),
        quantization_config=make_quantization_config(
            load_in_4bit=model.load_in_4bit,
            load_in_8bit=model.load_in_8bit,
            bnb_4bit_quant_type=model.bnb_4bit_quant_type,
            use_bnb_nested_quant=model.use_bnb_nested_quant,
            compute_dtype=torch.bfloat16 if config.bf16 else torch.float32,
        ),
        peft_config=make_peft_config(model),
    )
