"""Train on preference pairs with DPO, or a loss of its family.

    python scripts/dpo.py                                     # the embedded demo: a tiny model, nothing to download
    python scripts/dpo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --output_dir out
    python scripts/dpo.py scripts/configs/lora.yaml --beta 0.2 --output_dir out        # flags override the file
    accelerate launch --config_file accelerate_configs/ddp.yaml scripts/dpo.py scripts/configs/full.yaml --output_dir out

With the sigmoid loss the first log line must show a loss of about 0.693 (= ln 2) and rewards/margins near 0: policy and
reference are still the same model. (--logging_steps 1 shows the first step alone: 0.6931 and 0.) If not, stop: dropout is
on, or the two see different tokens. Later lines show the loss falling and rewards/accuracies rising above 0.5; a warning
appears if that is bought with falling log-probs of the chosen answers. The model is then in --output_dir, with
train_results.json and eval_results.json beside it. `--help` lists every option.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a checkout that is not installed

from dpo_trainer.cli import ModelArguments, ScriptArguments, make_peft_config, merged_init_kwargs, parse_args

if TYPE_CHECKING:
    from dpo_trainer import DPOConfig, DPOTrainer


def main(argv: list[str] | None = None) -> None:
    try:
        script, model, config, given = parse_args(argv)
    except ValueError as error:
        raise SystemExit(f"dpo.py: {error}") from None
    if model.model_name_or_path is None:
        from dpo_trainer.demo import run_demo

        run_demo(config, given)
        return
    if "output_dir" not in given and config.process_index == 0:
        print(f"No --output_dir was given: writing to {config.output_dir}.")
    run(build(script, model, config), config)


def build(script: ScriptArguments, model: ModelArguments, config: DPOConfig) -> DPOTrainer:
    """The trainer of this run, with its data, tokenizer and adapter."""
    import torch

    from dpo_trainer import DPOTrainer
    from dpo_trainer.cli.data import load_data
    from dpo_trainer.loading import load_tokenizer, make_quantization_config

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


def run(trainer: DPOTrainer, config: DPOConfig) -> None:
    """Train, evaluate where there is something to evaluate on, save."""
    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    report(trainer, "train", result.metrics)
    trainer.save_state()
    if trainer.eval_dataset is not None:
        report(trainer, "eval", trainer.evaluate())
    trainer.save_model()
    if config.push_to_hub:
        trainer.push_to_hub()


def report(trainer: DPOTrainer, split: str, metrics: dict[str, Any]) -> None:
    trainer.log_metrics(split, metrics)
    trainer.save_metrics(split, metrics)


if __name__ == "__main__":
    main()
